"""Measure the retrieval of an encoder on the styles that no training uses, as in the card of sticker-clip.

Command:   python model/pretrained/sticker-clip/evaluate.py --stickers STICKERS
           python model/pretrained/sticker-clip/evaluate.py --stickers STICKERS --encoder local-dir:build/sticker-clip
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from clip_recipe.data import UNSEEN, read_style
from clip_recipe.retrieval import retrieval
from torch import Tensor

from model.encoder.clip import Encoder


def main() -> None:
    """Print the figures of every unseen style of the folder as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stickers", type=Path, required=True, help="folder of the parquet files, one per style")
    parser.add_argument("--encoder", default="sticker-clip", help="name of an open_clip model, or local-dir:FOLDER")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    encoder = Encoder(options.encoder, device=options.device)

    def embed_images(images: Tensor) -> Tensor:
        return encoder.embed_pixels(images.permute(0, 2, 3, 1).numpy())

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return encoder.embed_texts(texts)

    paths = [path for path in sorted(options.stickers.glob("*.parquet")) if path.stem in UNSEEN]
    if not paths:
        raise SystemExit(
            f"no unseen style: {options.stickers}; build {', '.join(sorted(UNSEEN))} with make_stickers.py"
        )
    figures = {path.stem: retrieval(*read_style(path), embed_images, embed_texts) for path in paths}
    print(json.dumps(figures, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
