"""Train the bundled sticker generators: a script around the package's training loop, without Ray, Prefect or MLflow.

This file has the commands. ``sticker_recipe`` has the data, the monitoring, the runs and the command line.
It reads sticker parquet files (columns key, style, license, captions, webp), built by make_stickers.py in this folder.
OpenMoji, Twemoji and EmojiOne are excluded, so that they remain unseen domains. The other images are embedded with the
bundled sticker-clip, and the neighbours of each image are found among them. Captions are never read. An interrupted
run resumes from its last checkpoint when the command is repeated. A run that ends after ``--minutes`` saves its
weights, and resumes in the same way. Several short runs add up. ``samples-*.png`` in the output folder show samples for
OpenMoji.

    base      the continuous generator, for generation and editing: a transformer trained with flow matching
    codes     the discrete generator's autoencoder: 256 codes per image
    discrete  the discrete generator: a transformer over those codes, trained with mask-and-replace
    distil    a copy of a continuous generator that needs 4 network calls and no guidance, but cannot edit
    pack      an archive of at most 60 MB with all that ``base`` needs on another machine

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

A network of 128 px with patches of 8 px has as many tokens as the default. It needs files of make_stickers.py
``--side 128``:

    python model/pretrained/sticker-generator/train.py base --stickers STICKERS --out OUT --device cuda \
        --size 128 --patch 8 --rotary

``distil`` learns from any saved pipeline. Its figure ``distance`` is the mean squared distance of its samples for
OpenMoji to those of the teacher:

    python model/pretrained/sticker-generator/train.py distil --stickers STICKERS --out OUT \
        --start-from OUT/base/pipeline --steps 4 --device cuda

A GPU that is available for minutes at a time runs the archive. OUT gets the weights, figures and grids of samples, in
files of at most 16 MiB. The other machine needs this package's dependencies, but no installation of the package:

    python model/pretrained/sticker-generator/train.py pack --stickers STICKERS --out OUT
    tar xf sticker-generator.tar.gz && ./run.sh MINUTES OUT     # on the other machine; repeat it to train further
    cat OUT/pipeline.tar.* | tar x                              # the pipeline, in shards

``run.sh`` uses ``--rotary`` and ``--image-tokens 1``: the network also sees the image of the nearest neighbour. It
chooses its data by ``--own-style-share 0.5 --balanced --mean-query 0.33 --fewer-neighbours 0.5``.
``--schedule wsd`` is a warm-up and a constant learning rate for 80% of the minutes, then a decay to 0. The next run
resumes from before the decay, from the checkpoint in ``state`` on that machine (about 400 MB). On a new machine,
``--start-from pipeline`` starts from the exported weights, with a new optimizer; weights without image tokens gain
them, and weights without rotary positions need ``--no-rotary``. ``--choose gap`` exports an earlier snapshot if its
condition helps clearly more on OpenMoji: the loss with the condition minus that without.
"""

import argparse
import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from sticker_recipe.data import WATCHED, all_variants, conditioning, prepare, training_set
from sticker_recipe.distil import distil
from sticker_recipe.monitoring import Log, Unseen, UnseenCodes
from sticker_recipe.options import parse
from sticker_recipe.pack import pack
from sticker_recipe.results import EarlySnapshot, Snapshots, export, write_results
from sticker_recipe.runs import Folder, open_continuous, run, save
from sticker_recipe.styles import UNSEEN

from model.configs import Prediction, RestorationConfig, TransformerConfig, VQTransformerConfig
from model.diffusion.flow_matching import NoiseLevels
from model.diffusion.vq_diffusion import Transitions
from model.errors import ModelError
from model.images import to_model_range
from model.networks.build import config_of_network
from model.networks.dit import build_transformer
from model.networks.editor import widen_input
from model.networks.image_tokens import add_image_tokens, takes_images
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder, decode_codes, encode_codes
from model.networks.vq_transformer import build_vq_transformer
from model.training.objectives.autoencoder import AutoencoderObjective
from model.training.objectives.restoration import Restoration
from model.training.objectives.vq_diffusion import MaskAndReplace

GENERATION_SHARE = 0.7
"""Share of the base's samples without an image to restore: they train generation, the rest trains editing."""
SAMPLING = {
    "query": "mean", "neighbours": 3, "candidates": 2,
    "num_inference_steps": 6, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.95),
}  # fmt: skip
"""Sampling defaults of the base, chosen for at most 2 seconds per image on 2 CPU cores (see its card)."""
GUIDED_SCALE = 2.0
"""Guidance scale of a base with a guide, which the comparison in docs/results.md found better than 3."""
DISCRETE_SAMPLING = {"query": "mean", "neighbours": 3, "candidates": 2, "num_inference_steps": 7, "guidance_scale": 2.0}
"""Sampling defaults of the discrete generator."""
log = logging.getLogger("sticker-generator")


def base(options: argparse.Namespace) -> None:
    """Train the continuous generator; a share of its samples has an image to restore."""
    size = TransformerConfig(
        image_size=options.size, layers=options.layers, heads=options.width // options.head, head_width=options.head,
        patch_size=options.patch, prediction=options.prediction, rotary=options.rotary,
        neighbour_images=options.image_tokens, neighbour_patch=2 * options.patch,
    )  # fmt: skip
    data = prepare(options)
    network = widen_input(build_transformer(size, embedding_dimension=data["rows"].shape[1], seed=0))
    pasting = RestorationConfig(drop_reference=GENERATION_SHARE)
    levels = NoiseLevels(mean=options.sigma_mean, deviation=options.sigma_deviation)
    objective = Restoration(conditioning(options), pasting, prediction=size.prediction, levels=levels)
    dataset = training_set(data, options, references=True)
    names = [name for name in sorted(UNSEEN) if f"{name}_rows" in data]
    unseen = {
        name: Unseen(data[f"{name}_pixels"], data[f"{name}_rows"], options.device, prediction=options.prediction)
        for name in names
    }
    folder = options.out / "base"
    snapshots = Snapshots(folder / "best.pt") if options.choose == "gap" else None
    early = EarlySnapshot(folder / "early.pt", options) if options.guide_share else None
    metrics = Log(folder, unseen[WATCHED], [one.offer for one in (snapshots, early) if one is not None])
    if options.start_from:
        start_from(options, network, size.prediction, folder)
    trained = run(network, objective, dataset, options, metrics)
    chosen = trained.images
    if snapshots is not None:
        losses = unseen[WATCHED].condition_losses(trained.network.to(options.device))
        chosen = snapshots.choose(trained.images, trained.network, losses)
    guide = None if early is None else early.network(trained.network)
    # before the figures: they may fail
    sampling = SAMPLING if guide is None else SAMPLING | {"guidance_scale": GUIDED_SCALE}
    save(copy.deepcopy(trained.network), options, guide=guide, prediction=size.prediction, **sampling)
    figures = {"images": trained.images, "chosen_images": chosen, "new_images": trained.new_images}
    figures |= {"seconds": trained.seconds, "images_per_s": trained.new_images / trained.seconds}
    write_results(trained.network, unseen, data["rows"], options, figures)
    if options.export:
        export(folder, options.export)


def start_from(options: argparse.Namespace, network: Any, prediction: Prediction, folder: Path) -> None:
    """Load the weights of the pipeline ``--start-from`` into the network of a new run. A resumed run has its own."""
    if Folder(folder).latest() is not None:
        return
    opened = open_continuous(options)
    trained = opened.transformer
    try:
        if takes_images(network) and not takes_images(trained):
            config = network.config
            trained = add_image_tokens(trained, images=config.neighbour_images, patch=config.neighbour_patch)
        found, wanted = config_of_network(trained, opened.config.prediction), config_of_network(network, prediction)
        if found != wanted:
            raise ModelError(f"{found}, not {wanted}")
        network.load_state_dict(trained.state_dict())
    except (ModelError, RuntimeError) as error:
        raise SystemExit(
            f"--start-from {options.start_from}: another network ({error}); give its size, layers, patch, "
            "rotary positions, image tokens and prediction"
        ) from error


def codes(options: argparse.Namespace) -> None:
    """Train the autoencoder of the discrete generator."""
    data = prepare(options)
    channels = tuple(options.channels)
    size = AutoencoderConfig(image_size=options.size, channels=channels, downscale=2 ** (len(channels) - 1))
    steps = options.images // options.batch
    objective = AutoencoderObjective(size.codes, edge_weight=0.5, warm_steps=steps // 5, restart_steps=steps * 3 // 5)
    network = build_autoencoder(size, seed=0)
    metrics = Log(options.out / "codes", None)
    average = run(network, objective, training_set(data, options), options, metrics, bfloat16_copy=False).network
    average.save_pretrained(options.out / "codes" / "vae")
    images = to_model_range(torch.from_numpy(data[f"{WATCHED}_pixels"][:512]))
    found = encode_codes(average, images)
    error = (decode_codes(average, found) - images).square().mean()
    log.info("unseen: %d codes used, PSNR %.1f dB", len(torch.unique(found)), 10 * np.log10(4 / error.item()))


def discrete(options: argparse.Namespace) -> None:
    """Train the discrete generator."""
    data = prepare(options)
    autoencoder = VQModel.from_pretrained(options.out / "codes" / "vae").to(options.device)
    images = all_variants(data)
    chunks = (torch.from_numpy(images[start : start + 512]) for start in range(0, len(images), 512))
    found = [encode_codes(autoencoder, to_model_range(chunk.to(options.device))).short().cpu() for chunk in chunks]
    tokens = torch.cat(found).numpy()
    size = VQTransformerConfig(
        codes=autoencoder.config.num_vq_embeddings,
        tokens=tokens.shape[1],
        layers=options.layers,
        heads=options.width // options.head,
        head_width=options.head,
    )
    network = build_vq_transformer(size, embedding_dimension=data["rows"].shape[1], seed=0)
    objective = MaskAndReplace(Transitions(codes=size.codes), conditioning(options))
    unseen = UnseenCodes(data[f"{WATCHED}_pixels"], data[f"{WATCHED}_rows"], options.device, autoencoder)
    metrics = Log(options.out / "discrete", unseen)
    average = run(network, objective, training_set(data, options, codes=tokens), options, metrics).network
    save(average, options, vae=autoencoder.cpu().half(), **DISCRETE_SAMPLING)


COMMANDS = {"base": base, "codes": codes, "discrete": discrete, "distil": distil, "pack": pack}


def main() -> None:
    """Parse the command line and run the command."""
    options = parse(__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    COMMANDS[options.command](options)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
