"""The command line."""

import argparse
import math
import time
from pathlib import Path
from typing import get_args

from model.configs import Prediction
from model.networks.vq_autoencoder import AutoencoderConfig

LENGTHS = {"base": 2_048_000, "codes": 400_000, "discrete": 1_240_000, "distil": 256_000}
WATCH = {"distil": 100}
"""Default of ``--watch`` by command, and 2,000 for the others: a distillation has few steps, each of many calls."""
UNLIMITED = 10**12
"""Images of a run that only ``--minutes`` limits."""
LAYERS = {"base": 6, "codes": 6, "discrete": 5}
"""Default layers; 5 keep the discrete generator and its autoencoder below 60 MB. ``codes`` ignores the value."""
ONLY = {
    "choose": ("base",), "start_from": ("base", "distil"), "export": ("base", "distil"), "image_tokens": ("base",),
    "guide_share": ("base",), "patch": ("base",), "prediction": ("base",), "rotary": ("base",), "steps": ("distil",),
}  # fmt: skip
"""Commands that accept an option that not all accept."""


def share(text: str) -> float:
    """Parse a number in [0, 1]."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"not in [0, 1]: {text}; give a share")
    return number


def parse(description: str | None) -> argparse.Namespace:
    """Parse the command line, and note the time at which the command started."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*LENGTHS, "pack"])
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
    parser.add_argument(
        "--watch", type=int, help="steps between checkpoints and sample grids (default: 2000; 100 for distil)"
    )
    parser.add_argument(
        "--own-style-share", type=share, default=0.0,
        help="share of the samples whose neighbours are of the image's own style",
    )  # fmt: skip
    parser.add_argument(
        "--balanced",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="divide the weight of an image among near-duplicates",
    )
    parser.add_argument(
        "--fewer-neighbours", type=share, default=0.1, help="share of the samples with fewer neighbours than the most"
    )
    parser.add_argument(
        "--mean-query", type=share, default=0.0, help="share of the samples with the neighbours' mean as query"
    )
    parser.add_argument(
        "--image-tokens", type=int, default=0, metavar="N",
        help="images of neighbours that the network sees as tokens, at most 4 (base)",
    )  # fmt: skip
    parser.add_argument("--patch", type=int, default=4, help="side of a patch in px; --size is a multiple of it (base)")
    parser.add_argument(
        "--prediction", choices=get_args(Prediction), default="velocity",
        help="output of the network: the velocity, or the clean image; the loss is on the velocity (base)",
    )  # fmt: skip
    parser.add_argument(
        "--rotary",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="rotary positions in the self-attention (base)",
    )
    parser.add_argument("--sigma-mean", type=float, default=0.0, help="mean of the noise levels' logits")
    parser.add_argument("--sigma-deviation", type=float, default=1.0, help="deviation of the noise levels' logits")
    parser.add_argument(
        "--schedule", choices=["cosine", "wsd"], default="cosine",
        help="course of the learning rate: a cosine over --images, or warm-up, constant and decay in every run",
    )  # fmt: skip
    parser.add_argument(
        "--choose", choices=["last", "gap"], default="last",
        help="weights to save: the last ones, or a snapshot whose condition helps more on the unseen style (base)",
    )  # fmt: skip
    parser.add_argument(
        "--start-from", type=Path, help="pipeline whose weights a new run starts from (base), or the teacher (distil)"
    )
    parser.add_argument(
        "--guide-share", type=share, default=0.0,
        help="share of the run after which a snapshot is kept as the guide of the generator; 0 for none (base)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=4, help="network calls of a distilled generator (distil)")
    parser.add_argument(
        "--export", type=Path, help="folder for weights, figures and grids of at most 16 MiB (base, distil)"
    )
    parser.add_argument("--encoder", type=Path, help="folder of an image encoder in an archive of pack")
    parser.add_argument("--limit", type=int, help="images per style, for a trial run")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.width % options.head:
        parser.error(f"--width is not a multiple of --head {options.head}: {options.width}; change one of them")
    for name, commands in ONLY.items():
        if options.command not in commands and getattr(options, name) != parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is not an option of {options.command}; use it with {' or '.join(commands)}")
    if options.command == "distil" and options.steps < 1:
        parser.error(f"--steps is below 1: {options.steps}; give at least 1")
    if options.command == "distil" and options.start_from is None:
        parser.error("distil needs a generator to learn from; give --start-from")
    if options.command == "base" and options.size % options.patch:
        parser.error(f"--size is not a multiple of --patch {options.patch}: {options.size}; change one of them")
    if options.command == "codes" and options.schedule == "wsd":
        parser.error("--schedule wsd is not an option of codes; its restarts need the length of the run")
    unlimited = options.schedule == "wsd" and options.minutes < math.inf
    options.started = started
    options.images = options.images or (UNLIMITED if unlimited else LENGTHS.get(options.command))
    options.watch = options.watch or WATCH.get(options.command, 2000)
    if options.guide_share and options.watch * options.batch > options.guide_share * options.images:
        parser.error(
            f"--guide-share {options.guide_share:g} is before the first grid; give a --watch of at most "
            f"{int(options.guide_share * options.images / options.batch)}"
        )
    options.layers = options.layers or LAYERS.get(options.command)
    return options
