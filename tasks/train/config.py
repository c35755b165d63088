"""Settings of the training stage. Importing them needs neither torch nor diffusers."""

import dataclasses
import math
from typing import Annotated

from annotated_types import Ge

from infra import uris
from infra.errors import ConfigError
from model.configs import (
    ConditioningConfig,
    NetworkConfig,
    RestorationConfig,
    TrainingConfig,
    TransformerConfig,
    VQTransformerConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of the training stage: network, conditioning, objective, schedule and workers.

    Attributes:
        network: Network. Default: that of ``start_from``, or a small transformer. With ``start_from`` it may only add
            ``neighbour_images``.
        autoencoder: Folder of a diffusers AutoencoderKL or VQModel. Default: train on pixels.
        image_size: Image side in px. Default: that of the network and its autoencoder.
        editing: Also train restoration, for editing. Needs a transformer over pixels.
        restoration: Regions that restoration pastes.
        conditioning: How training hides parts of the condition.
        training: Length, rates and intervals.
        workers: Number of workers.
        cpus_per_worker: CPU cores per worker.
        use_gpu: Train on GPUs, one per worker.
        window_bytes: Shuffle window in bytes over all workers. Larger sets keep two in memory.
        guidance_scale: Default guidance scale of the pipeline. Default: that of ``start_from``, or 2.
        start_from: Generator to fine-tune: sticker-generator, or the folder of a saved pipeline. Default: random
            weights.
    """

    network: NetworkConfig | None = None
    autoencoder: str | None = None
    image_size: int | None = None
    editing: bool = False
    restoration: RestorationConfig = dataclasses.field(default_factory=lambda: RestorationConfig(drop_reference=0.7))
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    workers: Annotated[int, Ge(1)] = 1
    cpus_per_worker: Annotated[int, Ge(1)] = 2
    use_gpu: bool = False
    window_bytes: Annotated[int, Ge(1)] = 2 << 30
    guidance_scale: float | None = None
    start_from: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for values out of range and for combinations that cannot be trained."""
        uris.hide_fields(self, "autoencoder", "start_from")
        if self.workers < 1 or self.cpus_per_worker < 1:
            raise ConfigError(
                f"workers or cpus_per_worker is below 1: {self.workers}, {self.cpus_per_worker}; give at least 1"
            )
        if self.window_bytes < 1:
            raise ConfigError(f"window_bytes is below 1: {self.window_bytes}; give at least 1")
        if isinstance(self.network, VQTransformerConfig) and not (self.autoencoder or self.start_from):
            raise ConfigError("a network over codes has no autoencoder; set autoencoder to the folder of a VQModel")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale is not finite: {self.guidance_scale}; give a number")
        images = self.network.neighbour_images if isinstance(self.network, TransformerConfig) else 0
        if images and self.autoencoder:
            raise ConfigError(f"neighbour_images needs a network over pixels: {images}; omit autoencoder, or give 0")
        if self.editing and (self.autoencoder or not isinstance(self.network, TransformerConfig | None)):
            raise ConfigError(
                "editing needs a transformer over pixels; omit autoencoder, and choose a TransformerConfig"
            )
