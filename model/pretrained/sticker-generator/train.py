"""Train the bundled sticker generators: a script around the package's training loop, without Ray, Prefect or MLflow.

It reads sticker parquet files (columns key, style, license, captions, webp), built by make_stickers.py in this folder.
OpenMoji and Twemoji are excluded, so that they remain unseen domains. The other images are embedded with the bundled
sticker-clip, and the neighbours of each image are found among them. Captions are never read. An interrupted run resumes
from its last checkpoint when the command is repeated. A run that ends after ``--minutes`` saves its weights, and
resumes in the same way. Several short runs add up. ``samples-*.png`` in the output folder show samples for OpenMoji.

    base      the continuous generator, for generation and editing: a transformer trained with flow matching
    codes     the discrete generator's autoencoder: 256 codes per image
    discrete  the discrete generator: a transformer over those codes, trained with mask-and-replace

Hardware, run times and results are in the model cards (README.md) of the two generators. The first three commands
trained the bundled generators (the discrete one began as a longer run, see its card). The others run on a CPU in a few
hours, at 32 px:

    python model/pretrained/sticker-generator/train.py base --stickers STICKERS --out OUT --device cuda
    python model/pretrained/sticker-generator/train.py codes --stickers STICKERS --out OUT --device cuda --batch 256
    python model/pretrained/sticker-generator/train.py discrete --stickers STICKERS --out OUT --device cuda --watch 1000
    python model/pretrained/sticker-generator/train.py base --stickers STICKERS --out OUT --images 400000 \
        --size 32 --width 192 --batch 32 --rate 3e-3
    python model/pretrained/sticker-generator/train.py codes --stickers STICKERS --out OUT --images 48000 \
        --size 32 --channels 32 64 128 --batch 32 --ema 0.995
    python model/pretrained/sticker-generator/train.py discrete --stickers STICKERS --out OUT --images 89600 \
        --size 32 --width 256 --layers 6 --batch 64 --rate 2e-3 --ema 0.997
"""

import argparse
import hashlib
import io
import itertools
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import VQModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from model.configs import ConditioningConfig, RestorationConfig, TrainingConfig, TransformerConfig, VQTransformerConfig
from model.diffusion.conditioning import condition_tokens
from model.diffusion.flow_matching import Denoiser, flow_matching_loss, sample_sigmas
from model.diffusion.vq_diffusion import Transitions, sample_codes, step_divergence
from model.encoder.clip import Encoder
from model.images import image_grid, image_to_array, to_model_range, to_pil
from model.networks.denoiser import as_denoiser
from model.networks.dit import build_transformer
from model.networks.editor import is_editor, widen_input, with_reference
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder, decode_codes, encode_codes
from model.networks.vq_transformer import build_vq_transformer
from model.pipeline import new_pipeline
from model.saved_generator import weights_digest
from model.step_random import StepRandom
from model.training.alignment import align_all
from model.training.data import TrainingRows, TrainingSet
from model.training.ema import ema_copy
from model.training.interfaces import Objective
from model.training.loop import InterruptedTrainingError, train
from model.training.objectives.autoencoder import AutoencoderObjective
from model.training.objectives.restoration import Restoration
from model.training.objectives.vq_diffusion import MaskAndReplace

UNSEEN = frozenset({"openmoji", "twemoji"})
WATCHED = "openmoji"
NEIGHBOURS, POOL = 10, 20
SIDE = 64
"""Side in px of the images in the files, and of the encoder's input."""
GENERATION_SHARE = 0.7
"""Share of the base's samples without an image to restore: they train generation, the rest trains editing."""
SAMPLING = {
    "query": "mean", "neighbours": 3, "candidates": 2,
    "num_inference_steps": 6, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.95),
}  # fmt: skip
"""Sampling defaults of the base, chosen for at most 2 seconds per image on 2 CPU cores (see its card)."""
DISCRETE_SAMPLING = {"query": "mean", "neighbours": 3, "candidates": 2, "num_inference_steps": 7, "guidance_scale": 2.0}
"""Sampling defaults of the discrete generator."""
CHANNEL_ORDERS = ((1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2))
log = logging.getLogger("sticker-generator")


class Folder:
    """Checkpoints in a local folder, replaced atomically by renaming."""

    def __init__(self, folder: Path) -> None:
        """Store ``checkpoint.pt`` in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._state = folder / "checkpoint.pt"

    def latest(self) -> Path | None:
        """Return the path of the checkpoint, or None."""
        return self._state if self._state.exists() else None

    def scratch(self) -> Path:
        """Return the path for writing the next checkpoint."""
        return self._state.with_suffix(".partial")

    def save(self, step: int, state: Path) -> None:
        """Replace the checkpoint by the file ``state``."""
        state.rename(self._state)


class Log:
    """Metrics as log lines and in ``metrics.jsonl``; samples as image grids."""

    def __init__(self, folder: Path, unseen: "Unseen | None") -> None:
        """Write to ``folder``; evaluate the ``unseen`` domain, if given."""
        self._folder, self._unseen = folder, unseen

    def log(self, *, images: int, values: dict[str, float]) -> None:
        """Log metrics as one line."""
        log.info("%9d images  %s", images, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"images": images, **values}) + "\n")

    def grid(self, *, images: int, average: nn.Module) -> None:
        """Write a grid of samples for the unseen domain and log the loss on it."""
        if self._unseen is None:
            return
        self._unseen.save_grid(average, self._folder / f"samples-{images:09d}.png")
        self.log(images=images, values={"unseen_loss": self._unseen.loss(average)})


class Unseen:
    """Images of a domain that is not trained on, with their neighbours, to monitor training."""

    def __init__(self, pixels: NDArray[np.uint8], rows: NDArray[np.float16], device: str, count: int = 512) -> None:
        """Select ``count`` of the images (N, S, S, 3) with rows (N, D), each with its neighbours among the others."""
        chosen = np.random.default_rng(0).permutation(len(rows))[:count]
        found = rows[nearest(rows, min(NEIGHBOURS, len(rows) - 1), device)[chosen]]
        query, near = (torch.from_numpy(part).float().to(device) for part in (rows[chosen], found))
        self._images = to_model_range(torch.from_numpy(pixels[chosen]).to(device))
        self._tokens = condition_tokens(query, near, dimension=rows.shape[1], batch=len(chosen))

    @torch.inference_mode()
    def loss(self, network: nn.Module) -> float:
        """Return the flow matching loss with the full condition and the same noise at every call."""
        rng = StepRandom(0, 0, device=self._images.device)
        sigma, noise = sample_sigmas(len(self._images), rng), rng.normal(*self._images.shape)
        return float(flow_matching_loss(_denoiser(network), self._images, self._tokens, sigma, noise))

    @torch.inference_mode()
    def save_grid(self, network: nn.Module, path: Path) -> None:
        """Write a grid of samples, 8 per row."""
        image_grid(to_pil(self.sample(network, self._tokens[:64]).cpu())).save(path)

    def sample(self, network: nn.Module, tokens: Tensor, steps: int = 20) -> Tensor:
        """Sample images (B, 3, S, S) in [−1, 1] for tokens (B, T, E) by Euler steps without guidance."""
        shape = (len(tokens), *self._images.shape[1:])
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(tokens.device)
        levels = torch.linspace(1, 0, steps + 1, device=tokens.device)
        levels = 2 * levels / (1 + levels)  # shift 2
        for now, following in itertools.pairwise(levels):
            image += (following - now) * _denoiser(network)(image, now.expand(len(image)), tokens)
        return image.clamp(-1, 1)


class UnseenCodes(Unseen):
    """Unseen images for the discrete generator."""

    def __init__(self, pixels: NDArray[np.uint8], rows: NDArray[np.float16], device: str, vae: VQModel) -> None:
        """Take the arguments of :class:`Unseen` and the autoencoder of the codes."""
        super().__init__(pixels, rows, device)
        self._vae, self._codes = vae, encode_codes(vae, self._images)
        self._transitions = Transitions(codes=vae.config.num_vq_embeddings)

    @torch.inference_mode()
    def loss(self, network: nn.Module) -> float:
        """Return the bound on −log p(x_0) in nats per token, with the full condition and fixed t and noise."""
        rng = StepRandom(0, 0, device=self._codes.device)
        t = (rng.uniform(len(self._codes)) * self._transitions.timesteps).long() + 1
        noisy = self._transitions.corrupt(self._codes, t, rng.uniform(*self._codes.shape, 2))
        log_clean = network(noisy, t, self._tokens).float().log_softmax(2)
        divergence = step_divergence(log_clean, self._codes, noisy, t, self._transitions)
        return float(divergence.mean()) * self._transitions.timesteps

    def sample(self, network: nn.Module, tokens: Tensor, steps: int = 20) -> Tensor:
        """Sample images for tokens in ``steps`` strides without guidance."""
        shape = (len(tokens), steps, self._codes.shape[1])
        uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(tokens.device)
        return decode_codes(self._vae, sample_codes(network, tokens, uniforms, transitions=self._transitions))


def _denoiser(network: nn.Module) -> Denoiser:
    denoiser = as_denoiser(network, "velocity")
    return with_reference(denoiser, None) if is_editor(network) else denoiser


def load(path: Path, limit: int | None) -> NDArray[np.uint8]:
    """Read the images of a style, (N, SIDE, SIDE, 3) uint8."""
    encoded = pq.read_table(path, columns=["webp"])["webp"].to_pylist()[:limit]

    def decode(webp: bytes) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(webp)) as image:
            return image_to_array(image.convert("RGB"), SIDE)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(decode, encoded)))


def resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resize images (N, SIDE, SIDE, 3) to (N, side, side, 3)."""
    if side == SIDE:
        return pixels
    return np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in pixels])


def nearest(rows: NDArray[np.float16], k: int, device: str) -> NDArray[np.int64]:
    """Return ids (N, k) of the k nearest other rows of each of ``rows`` (N, D), without exact copies of the row."""
    dense = torch.from_numpy(rows).float().to(device)
    groups = torch.from_numpy(np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)).to(device)
    found = []
    for start in range(0, len(dense), 1024):
        scores = dense[start : start + 1024] @ dense.T
        scores[groups[start : start + 1024, None] == groups] = -2
        found.append(scores.topk(k, dim=1).indices)
    return torch.cat(found).cpu().numpy()


def mirrored(pixels: NDArray[np.uint8], styles: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Mirror images horizontally. ``styles`` is unused."""
    return np.ascontiguousarray(pixels[:, :, ::-1])


def recoloured(pixels: NDArray[np.uint8], styles: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Permute the colour channels, with the same permutation for all images of a style."""
    orders = np.array(CHANNEL_ORDERS)[styles % len(CHANNEL_ORDERS)]
    return np.take_along_axis(pixels, orders[:, None, None], axis=3)


# A variant is a separate domain with its own embeddings and neighbours. The network must therefore take the colours
# from the neighbours. The number is how often an epoch contains each image of the variant.
Change = Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.uint8]]
VARIANTS: dict[str, tuple[int, Change]] = {
    "as they are": (4, lambda pixels, styles: pixels),
    "mirrored": (1, mirrored),
    "recoloured": (1, recoloured),
}


def prepare(options: argparse.Namespace) -> dict[str, NDArray[Any]]:
    """Compute pixels, embeddings, neighbours, aligned references and weights of all variants; cache them in a file."""
    cache = options.out / f"data-{data_digest(options)[:12]}.npz"
    if cache.exists():
        return dict(np.load(cache))
    encoder = Encoder(device=options.device)
    paths = {path.stem: path for path in sorted(options.stickers.glob("*.parquet"))}
    loaded = {name: load(path, options.limit) for name, path in paths.items() if name not in UNSEEN}
    pixels = np.concatenate(list(loaded.values()))
    styles = np.repeat(np.arange(len(loaded)), [len(images) for images in loaded.values()])
    for name, images in loaded.items():
        log.info("%-28s %5d images", name, len(images))
    pool = min(POOL, len(pixels) - 1)
    near = nearest(embedded(pixels, encoder), pool, options.device)
    aligned = align_all(resized(pixels, options.size), near)
    log.info("%.0f%% of the first neighbours were aligned", 100 * aligned.converged)
    parts: dict[str, list[NDArray[Any]]] = {}
    for number, (weight, change) in enumerate(VARIANTS.values()):
        changed = change(pixels, styles)
        rows = embedded(changed, encoder)
        arrays: dict[str, NDArray[Any]] = {
            "pixels": resized(changed, options.size),
            "rows": rows,
            "neighbours": nearest(rows, pool, options.device) + number * len(pixels),
            "references": change(aligned.pixels, styles),
            "weights": np.full(len(pixels), weight),
        }
        for name, part in arrays.items():
            parts.setdefault(name, []).append(part)
    data = {name: np.concatenate(part) for name, part in parts.items()}
    unseen = load(paths[WATCHED], options.limit)
    data["unseen_pixels"], data["unseen_rows"] = resized(unseen, options.size), embedded(unseen, encoder)
    unfinished = cache.with_suffix(".partial.npz")
    np.savez(unfinished, **data)  # type: ignore[arg-type]
    unfinished.rename(cache)
    return data


def data_digest(options: argparse.Namespace) -> str:
    """Return the digest of the image files, the size and the limit per style."""
    files = {path.name: file_digest(path) for path in sorted(options.stickers.glob("*.parquet"))}
    return hashlib.sha256(json.dumps([files, options.size, options.limit]).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def embedded(pixels: NDArray[np.uint8], encoder: Encoder) -> NDArray[np.float16]:
    """Return float16 embeddings (N, D), as stored by the embedding stage."""
    return encoder.embed_pixels(pixels).numpy().astype(np.float16)


def training_set(data: dict[str, NDArray[Any]], device: str, *, references: bool = False) -> TrainingSet:
    """Return the training set, each image repeated by its weight; with aligned neighbours for editing."""
    chosen = np.repeat(np.arange(len(data["pixels"])), data["weights"])
    rows = TrainingRows(
        images=data["pixels"][chosen],
        embeddings=data["rows"][chosen],
        neighbours=data["neighbours"][chosen],
        reference=data["references"][chosen] if references else None,
    )
    return TrainingSet(rows, data["rows"], device=device, window_rows=len(chosen))


def run(
    network: nn.Module,
    objective: Objective,
    dataset: TrainingSet,
    options: argparse.Namespace,
    unseen: "Unseen | None",
    **settings: Any,
) -> nn.Module:
    """Train in the command's output folder and return the averaged network on the CPU."""
    name = options.command
    folder = options.out / name
    checkpoints = Folder(folder)
    require_same_run(folder / "settings.json", options)
    training = TrainingConfig(
        images=options.images,
        batch_size=options.batch,
        learning_rate=options.rate,
        warmup_images=200 * options.batch,
        ema_decay=options.ema,
        weight_decay=0.05,
        checkpoint_images=options.watch * options.batch,
        log_images=200 * options.batch,
        grid_images=options.watch * options.batch,
        **settings,
    )
    log.info("%s: %.1fM parameters, %d images", name, sum(p.numel() for p in network.parameters()) / 1e6, len(dataset))
    stop_requested, started, metrics = threading.Event(), time.monotonic(), Log(folder, unseen)
    deadline = options.started + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: stop_requested.set())  # finish and save the current step first
    try:
        average = train(
            network, objective, dataset, training, checkpoints=checkpoints, metrics=metrics, device=options.device,
            stop=lambda: stop_requested.is_set() or time.monotonic() >= deadline,
        )  # fmt: skip
    except InterruptedTrainingError as interruption:
        if stop_requested.is_set():
            raise SystemExit(f"{name}: {interruption}") from None
        log.info("--minutes %g: %s", options.minutes, interruption)
        state = torch.load(folder / "checkpoint.pt", map_location=options.device, weights_only=True)
        average = ema_copy(network)
        average.load_state_dict(state["average"])
        metrics.grid(images=state["step"] * options.batch, average=average)
    log.info("trained in %.0f s on %s", time.monotonic() - started, options.device)
    return average.cpu()


def require_same_run(stored: Path, options: argparse.Namespace) -> None:
    """Store the settings of a run, or exit if its checkpoint was trained with other settings.

    Only the number of images may change, so a run can be extended.
    """
    settings = {name: getattr(options, name) for name in ("size", "width", "head", "layers", "batch", "rate", "ema")}
    settings |= {"channels": list(options.channels), "data": data_digest(options)}
    if options.command == "discrete":
        settings["codes"] = weights_digest(str(options.out / "codes" / "vae"))
    if not stored.exists():
        stored.write_text(json.dumps(settings, indent=1))
    before = json.loads(stored.read_text())
    changed = [
        f"{name} {before.get(name)}, now {value}" for name, value in settings.items() if before.get(name) != value
    ]
    if changed:
        raise SystemExit(
            f"settings differ from those of the run in {stored.parent}: {'; '.join(changed)}; use another --out, or "
            "remove that folder"
        )


def save(network: Any, folder: Path, **settings: Any) -> None:
    """Save the pipeline of ``network`` in float16 to ``folder``."""
    pipeline = new_pipeline(network.half(), Encoder().identity, trained_neighbours=NEIGHBOURS, **settings)
    pipeline.save_pretrained(folder / "pipeline")


def base(options: argparse.Namespace) -> None:
    """Train the continuous generator; a share of its samples has an image to restore."""
    data = prepare(options)
    size = TransformerConfig(
        image_size=options.size, layers=options.layers, heads=options.width // options.head, head_width=options.head
    )
    network = widen_input(build_transformer(size, embedding_dimension=data["rows"].shape[1], seed=0))
    conditioning = ConditioningConfig(neighbours=NEIGHBOURS, pool=POOL)
    pasting = RestorationConfig(drop_reference=GENERATION_SHARE)
    objective = Restoration(conditioning, pasting, prediction=size.prediction)
    dataset = training_set(data, options.device, references=True)
    unseen = Unseen(data["unseen_pixels"], data["unseen_rows"], options.device)
    average = run(network, objective, dataset, options, unseen)
    save(average, options.out / "base", **SAMPLING)


def codes(options: argparse.Namespace) -> None:
    """Train the autoencoder of the discrete generator."""
    data = prepare(options)
    channels = tuple(options.channels)
    size = AutoencoderConfig(image_size=options.size, channels=channels, downscale=2 ** (len(channels) - 1))
    steps = options.images // options.batch
    objective = AutoencoderObjective(size.codes, edge_weight=0.5, warm_steps=steps // 5, restart_steps=steps * 3 // 5)
    network = build_autoencoder(size, seed=0)
    average = run(network, objective, training_set(data, options.device), options, None, bfloat16_copy=False)
    assert isinstance(average, VQModel)  # noqa: S101 - training returns the type of its network
    average.save_pretrained(options.out / "codes" / "vae")
    images = to_model_range(torch.from_numpy(data["unseen_pixels"][:512]))
    found = encode_codes(average, images)
    error = (decode_codes(average, found) - images).square().mean()
    log.info("unseen: %d codes used, PSNR %.1f dB", len(torch.unique(found)), 10 * np.log10(4 / error.item()))


def discrete(options: argparse.Namespace) -> None:
    """Train the discrete generator."""
    data = prepare(options)
    autoencoder = VQModel.from_pretrained(options.out / "codes" / "vae").to(options.device)
    chunks = torch.split(torch.from_numpy(data["pixels"]), 512)
    found = [encode_codes(autoencoder, to_model_range(chunk.to(options.device))).short().cpu() for chunk in chunks]
    data["pixels"] = torch.cat(found).numpy()
    size = VQTransformerConfig(
        codes=autoencoder.config.num_vq_embeddings,
        tokens=data["pixels"].shape[1],
        layers=options.layers,
        heads=options.width // options.head,
        head_width=options.head,
    )
    network = build_vq_transformer(size, embedding_dimension=data["rows"].shape[1], seed=0)
    objective = MaskAndReplace(Transitions(codes=size.codes), ConditioningConfig(neighbours=NEIGHBOURS, pool=POOL))
    unseen = UnseenCodes(data["unseen_pixels"], data["unseen_rows"], options.device, autoencoder)
    average = run(network, objective, training_set(data, options.device), options, unseen)
    save(average, options.out / "discrete", vae=autoencoder.cpu().half(), **DISCRETE_SAMPLING)


COMMANDS = {"base": base, "codes": codes, "discrete": discrete}
LENGTHS = {"base": 2_048_000, "codes": 400_000, "discrete": 1_240_000}
LAYERS = {"base": 6, "codes": 6, "discrete": 5}
"""Default layers; 5 keep the discrete generator and its autoencoder below 60 MB. ``codes`` ignores the value."""


def main() -> None:
    """Parse the command line and run the command."""
    started = time.monotonic()
    options = _options()
    options.started = started
    options.images = options.images or LENGTHS[options.command]
    options.layers = options.layers or LAYERS[options.command]
    options.out.mkdir(parents=True, exist_ok=True)
    COMMANDS[options.command](options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--stickers", type=Path, required=True, help="folder of the parquet files, one per style")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, samples and weights")
    parser.add_argument("--images", type=int, help="number of training images")
    parser.add_argument(
        "--minutes", type=float, default=math.inf,
        help="minutes until the run stops, preparation included, and saves the weights so far; run again to resume",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=64, help="image side in px")
    parser.add_argument("--width", type=int, default=512, help="width of the transformer, a multiple of --head")
    parser.add_argument("--head", type=int, default=64, help="width of an attention head")
    parser.add_argument("--layers", type=int, help="layers of the transformer")
    parser.add_argument(
        "--channels", type=int, nargs="+", default=AutoencoderConfig().channels,
        help="channels of the autoencoder at each resolution, each half of the previous one",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--watch", type=int, default=2000, help="steps between checkpoints and sample grids")
    parser.add_argument("--limit", type=int, help="images per style, for a trial run")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.width % options.head:
        parser.error(f"--width is not a multiple of --head {options.head}: {options.width}; change one of them")
    return options


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
