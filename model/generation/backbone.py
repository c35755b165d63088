"""The interface between networks and sampling: one protocol for continuous and discrete generators.

Legend: ``B`` images, ``S`` side, ``T`` condition tokens, ``E`` their channels.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.configs import Prediction
from model.diffusion.flow_matching import Denoiser
from model.diffusion.guidance import FULL_INTERVAL
from model.diffusion.solver import Scheduler, new_scheduler
from model.errors import ModelError
from model.generation.continuous import ContinuousBackbone
from model.generation.discrete import DiscreteBackbone
from model.networks.build import AnyNetwork
from model.networks.latents import Autoencoder
from model.networks.vq_transformer import VQTransformer


class Backbone(Protocol):
    """Interface of a generator, continuous or discrete, for sampling and editing."""

    @property
    def side(self) -> int:
        """Width and height of the images, in px."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        ...

    @property
    def condition_channels(self) -> int:
        """E, the channels of the condition tokens."""
        ...

    @property
    def max_steps(self) -> int | None:
        """Maximum number of sampling steps, or None."""
        ...

    @property
    def restorer(self) -> Denoiser | None:
        """The denoiser of a network trained to restore images from a reference, or None for other networks."""
        ...

    @property
    def starts_from_images(self) -> bool:
        """True if :meth:`generate` accepts a ``start``."""
        ...

    def noise_shape(self, steps: int) -> tuple[int, ...]:
        """Return the shape of the noise of one image."""
        ...

    def noise(self, count: int, steps: int, generator: torch.Generator | None, *, shared: bool = False) -> Tensor:
        """Sample the noise of ``count`` images on the CPU: (count, …noise_shape)."""
        ...

    def generate(
        self,
        condition: Tensor,
        noise: Tensor,
        *,
        steps: int,
        guidance_scale: float,
        negative: Tensor | None,
        on_step: Callable[[int], None],
        start: Tensor | None = None,
        strength: float = 1.0,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Generate a batch of images.

        Args:
            condition: (B, T, E) tokens, on the network's device.
            noise: (B, …noise_shape), on the network's device.
            steps: Number of sampling steps.
            guidance_scale: 1 is the conditional model itself.
            negative: (B, T, E) tokens to push away from, or None for the null condition.
            on_step: Called with the number of each finished step, from 1.
            start: (B, 3, S, S) in [−1, 1], images to add the noise to. Default: None, pure noise.
            strength: Share of noise that is added to ``start``, in (0, 1].
            reference: (B, 3, S, S) in [−1, 1], images that a network trained to restore sees at high noise levels.
                Other networks accept None only.

        Returns:
            (B, 3, S, S) float32 in [−1, 1].
        """
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) in [−1, 1] as the network's pixels, latents or codes."""
        ...

    def decode(self, encoded: Tensor) -> Tensor:
        """Decode pixels, latents or codes to images (B, 3, S, S) float32 in [−1, 1]."""
        ...


def is_discrete(network: AnyNetwork) -> bool:
    """Return True for a network over codes."""
    return isinstance(network, VQTransformer)


def new_backbone(
    network: AnyNetwork,
    *,
    vae: Autoencoder | None,
    scheduler: Scheduler | None = None,
    prediction: Prediction = "velocity",
    guidance_interval: tuple[float, float] = FULL_INTERVAL,
    truncation: float = 0.86,
    guide: AnyNetwork | None = None,
    noise_levels: Sequence[float] | None = None,
) -> Backbone:
    """Return the backbone for a network; the single place that distinguishes continuous from discrete networks.

    Args:
        network: A transformer or U-Net over pixels or latents, or a transformer over codes.
        vae: The autoencoder of the network's latents or codes; None for a network over pixels.
        scheduler: Scheduler of a continuous network. Default: :func:`model.diffusion.solver.new_scheduler`.
        prediction: Output of a continuous network. Default: "velocity".
        guidance_interval: Noise levels at which a continuous network is guided. Default: all.
        truncation: Probability mass kept per code of a discrete network. Default: 0.86.
        guide: Weaker version of a continuous network, to guide by. Default: None, the network itself.
        noise_levels: The levels of a continuous network that was distilled to few steps. Default: None.

    Raises:
        ModelError: A discrete network has no autoencoder, or has what only continuous networks have; or the guide does
            not fit the network.
    """
    if not is_discrete(network):
        if guide is not None and is_discrete(guide):
            raise ModelError("the guide is a network over codes, which has no velocities; use a continuous one")
        return ContinuousBackbone(
            network=network,
            scheduler=scheduler or new_scheduler(),
            vae=vae,
            prediction=prediction,
            guidance_interval=guidance_interval,
            guide=guide,
            noise_levels=None if noise_levels is None else tuple(noise_levels),
        )
    if guide is not None or noise_levels is not None:
        raise ModelError("a network over codes has a guide or noise_levels, which need velocities; remove them")
    if vae is None:
        raise ModelError("the vae is missing: a network over codes needs the VQModel that defines them; pass vae=")
    return DiscreteBackbone(network=network, vae=vae, truncation=truncation)
