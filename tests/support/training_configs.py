"""Small training configs, and generators and autoencoders to start from."""

from pathlib import Path
from typing import Any

from support import tiny_models
from support.tiny_training import POOL, small_kl

from model.configs import ConditioningConfig, TrainingConfig, UNetConfig, VQTransformerConfig
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder
from model.pipeline import new_pipeline
from tasks.train.config import TrainConfig

SHORT = TrainingConfig(
    images=24, batch_size=4, warmup_images=8, checkpoint_images=8, log_images=8, grid_images=24, ema_decay=0.5
)
SMALL = tiny_models.size(image_size=16)
WITH_IMAGES = tiny_models.size(image_size=16, neighbour_images=2)
VQ = AutoencoderConfig(image_size=16, downscale=4, codes=16, code_width=4, channels=(8, 8, 8))
CODES = VQTransformerConfig(codes=16, tokens=16, timesteps=10, layers=1, heads=1, head_width=16)
UNET = UNetConfig(image_size=16, widths=(32, 64), layers=1)
LATENTS = tiny_models.size(image_size=8, channels=4, patch_size=2)
VQ_LATENTS = tiny_models.size(image_size=4, channels=VQ.code_width, patch_size=2)


def configured(**changes: Any) -> TrainConfig:
    conditioning = ConditioningConfig(neighbours=2, pool=POOL)
    return TrainConfig(**{"conditioning": conditioning, "training": SHORT, "cpus_per_worker": 1} | changes)


def autoencoders(folder: Path) -> dict[str, str]:
    """Save an autoencoder of each kind."""
    saved_autoencoders: dict[str, Any] = {"kl": small_kl(), "vq": build_autoencoder(VQ, seed=0)}
    for name, autoencoder in saved_autoencoders.items():
        autoencoder.save_pretrained(folder / name)
    return {name: str(folder / name) for name in saved_autoencoders}


def save_generator(folder: Path, *, network: Any = None, **defaults: Any) -> str:
    """Save a generator to fine-tune."""
    network = network or tiny_models.network(image_size=16)
    new_pipeline(network, tiny_models.identity(), **{"neighbours": 3} | defaults).save_pretrained(folder)
    return str(folder)
