"""Train the embedded sticker generator: a plain script over the package's own loop, without Ray, Prefect or MLflow.

It reads the sticker parquet files (columns key, style, license, captions, webp), leaves OpenMoji and Twemoji out so
that they stay unseen domains, embeds the rest with the embedded sticker-clip, finds each picture's neighbours among the
others, and trains. Captions are never read. Killed at any point, the same command goes on from its last checkpoint.

Hardware, run time and the figures reached are in README.md beside this file. Command:

    python model/pretrained/sticker-generator/train.py --stickers STICKERS --out OUT --images 400000
    python model/pretrained/sticker-generator/train.py --stickers STICKERS --out OUT --images 6000000 \
        --size 64 --width 384 --layers 10 --batch 512 --device cuda        # the larger one, for a GPU
"""

import argparse
import io
import logging
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from model.clip import Encoder
from model.diffusion.conditioning import ConditioningConfig
from model.networks.dit import TransformerConfig, build_transformer
from model.pipeline import new_pipeline
from model.training.data import TrainingSet, picture_to_array
from model.training.loop import TrainingConfig, train

UNSEEN = frozenset({"openmoji", "twemoji"})
NEIGHBOURS = 10
log = logging.getLogger("sticker-generator")


class Folder:
    """Checkpoints in a folder: written aside and renamed, so the one that is there is whole."""

    def __init__(self, folder: Path) -> None:
        """Keep ``checkpoint.pt`` in ``folder``."""
        self._state = folder / "checkpoint.pt"

    def latest(self) -> Path | None:
        """The checkpoint if there is one."""
        return self._state if self._state.exists() else None

    def scratch(self) -> Path:
        """Where the next one is written."""
        return self._state.with_suffix(".partial")

    def save(self, step: int, state: Path) -> None:
        """Put the new one in the old one's place."""
        state.rename(self._state)


class Log:
    """Metrics as log lines."""

    def log(self, *, images: int, values: dict[str, float]) -> None:
        """One line."""
        log.info("%9d images  %s", images, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))


def load(stickers: Path, side: int, limit: int | None) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Pixels (N, side, side, 3) uint8 and embeddings (N, D) float16 of every style that may be seen."""
    encoder = Encoder()
    pixels, rows = [], []
    for path in sorted(stickers.glob("*.parquet")):
        if path.stem in UNSEEN:
            continue
        encoded = pq.read_table(path, columns=["webp"])["webp"].to_pylist()[:limit]
        pictures = [Image.open(io.BytesIO(webp)).convert("RGB") for webp in encoded]
        pixels.append(np.stack([picture_to_array(picture, side) for picture in pictures]))
        rows.append(encoder.embed_images(pictures).numpy().astype(np.float16))
        log.info("%-28s %5d pictures", path.stem, len(pictures))
    return np.concatenate(pixels), np.concatenate(rows)


def nearest(rows: NDArray[np.float16], k: int) -> NDArray[np.int64]:
    """The k nearest other rows of each (N, D), as ids (N, k)."""
    dense = torch.from_numpy(rows).float()
    found = []
    for start in range(0, len(dense), 1024):
        scores = dense[start : start + 1024] @ dense.T
        scores[torch.arange(len(scores)), torch.arange(start, start + len(scores))] = -2
        found.append(scores.topk(k, dim=1).indices)
    return torch.cat(found).numpy()


def main() -> None:
    """Load, train, save the averaged weights as a float16 pipeline."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    cache = options.out / f"data-{options.size}.npz"
    if not cache.exists():
        pixels, rows = load(options.stickers, options.size, options.limit)
        np.savez(cache, pixels=pixels, rows=rows, neighbours=nearest(rows, NEIGHBOURS))
    data = np.load(cache)
    dataset = TrainingSet(data["pixels"], data["rows"], data["neighbours"], data["rows"])
    log.info("%d pictures, %d px", len(dataset), options.size)
    size = TransformerConfig(
        image_size=options.size, layers=options.layers, heads=options.width // 32, head_width=32, patch_size=4
    )
    training = TrainingConfig(
        images=options.images,
        batch_size=options.batch,
        learning_rate=options.rate,
        warmup_images=200 * options.batch,
        ema_decay=0.999,
        checkpoint_images=500 * options.batch,
        log_images=100 * options.batch,
    )
    conditioning = ConditioningConfig(neighbours=NEIGHBOURS)
    network = build_transformer(size, embedding_dimension=data["rows"].shape[1], seed=training.seed)
    log.info("%.1fM parameters", sum(parameter.numel() for parameter in network.parameters()) / 1e6)
    started = time.monotonic()
    average = train(
        network, dataset, training, conditioning, prediction=size.prediction,
        checkpoints=Folder(options.out), metrics=Log(), device=options.device,
    )  # fmt: skip
    log.info("trained in %.0f s on %s", time.monotonic() - started, options.device)
    pipeline = new_pipeline(average.cpu(), Encoder().identity, prediction=size.prediction, neighbours=NEIGHBOURS)
    pipeline.to(dtype=torch.float16).save_pretrained(options.out / "pipeline")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stickers", type=Path, required=True, help="folder of the parquet files, one a style")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the pipeline")
    parser.add_argument("--images", type=int, default=400_000, help="images to see")
    parser.add_argument("--size", type=int, default=32, help="side in px")
    parser.add_argument("--width", type=int, default=192, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--limit", type=int, help="pictures a style, for a trial")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
