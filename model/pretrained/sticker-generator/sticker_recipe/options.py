"""The command line."""

import argparse
import math
import time
from pathlib import Path

from model.networks.vq_autoencoder import AutoencoderConfig

LENGTHS = {"base": 2_048_000, "codes": 400_000, "discrete": 1_240_000}
LAYERS = {"base": 6, "codes": 6, "discrete": 5}
"""Default layers; 5 keep the discrete generator and its autoencoder below 60 MB. ``codes`` ignores the value."""


def parse(description: str | None) -> argparse.Namespace:
    """Parse the command line, and note the time at which the command started."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=LENGTHS)
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
    options.started = started
    options.images = options.images or LENGTHS[options.command]
    options.layers = options.layers or LAYERS[options.command]
    return options
