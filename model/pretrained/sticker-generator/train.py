"""Train the bundled sticker generators: a script around the package's training loop, without Ray, Prefect or MLflow.

This file has the commands. ``sticker_recipe`` has the data, the monitoring, the runs and the command line.
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
import logging

import numpy as np
import torch
from diffusers import VQModel
from sticker_recipe.data import NEIGHBOURS, POOL, prepare, training_set
from sticker_recipe.monitoring import Unseen, UnseenCodes
from sticker_recipe.options import parse
from sticker_recipe.runs import run, save

from model.diffusion.conditioning import ConditioningConfig
from model.diffusion.vq_diffusion import Transitions
from model.images import to_model_range
from model.networks.dit import TransformerConfig, build_transformer
from model.networks.editor import widen_input
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder, decode_codes, encode_codes
from model.networks.vq_transformer import VQTransformerConfig, build_vq_transformer
from model.training.objectives.autoencoder import AutoencoderObjective
from model.training.objectives.restoration import Restoration, RestorationConfig
from model.training.objectives.vq_diffusion import MaskAndReplace

GENERATION_SHARE = 0.7
"""Share of the base's samples without an image to restore: they train generation, the rest trains editing."""
SAMPLING = {
    "query": "mean", "neighbours": 3, "candidates": 2,
    "num_inference_steps": 6, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.95),
}  # fmt: skip
"""Sampling defaults of the base, chosen for at most 2 seconds per image on 2 CPU cores (see its card)."""
DISCRETE_SAMPLING = {"query": "mean", "neighbours": 3, "candidates": 2, "num_inference_steps": 7, "guidance_scale": 2.0}
"""Sampling defaults of the discrete generator."""
log = logging.getLogger("sticker-generator")


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


def main() -> None:
    """Parse the command line and run the command."""
    options = parse(__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    COMMANDS[options.command](options)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
