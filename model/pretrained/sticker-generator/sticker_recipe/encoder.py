"""The encoder of the recipe: the bundled sticker-clip, or a copy without its text weights, which training never uses.

The text weights are two thirds of the file. The copy has zeros in their place, so a compressed archive is small. It has
the identity of the whole encoder, because its embeddings of images are the same.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import model
from model.encoder.clip import Encoder
from model.encoder.identity import EncoderIdentity

_BUNDLED = Path(model.__file__).parent / "pretrained" / "sticker-clip"
_WEIGHTS, _CONFIG, _IDENTITY = "open_clip_model.safetensors", "open_clip_config.json", "identity.json"


def load_encoder(options: argparse.Namespace) -> Encoder:
    """Load the encoder of ``--encoder``, or the bundled one."""
    if options.encoder is None:
        return Encoder(device=options.device)
    return Encoder(f"local-dir:{options.encoder}", device=options.device)


def encoder_identity(options: argparse.Namespace) -> EncoderIdentity:
    """Return the identity of the encoder that the generator is trained with."""
    if options.encoder is None:
        return Encoder().identity
    return EncoderIdentity(**json.loads((options.encoder / _IDENTITY).read_text()))


def write_image_encoder(folder: Path) -> None:
    """Write the copy of the bundled encoder without its text weights to ``folder``."""
    folder.mkdir(parents=True)
    weights = load_file(_BUNDLED / _WEIGHTS)
    text = [name for name in weights if not name.startswith("visual.")]
    save_file(weights | {name: torch.zeros_like(weights[name]) for name in text}, folder / _WEIGHTS)
    shutil.copyfile(_BUNDLED / _CONFIG, folder / _CONFIG)
    (folder / _IDENTITY).write_text(json.dumps(dataclasses.asdict(Encoder().identity), indent=1))
