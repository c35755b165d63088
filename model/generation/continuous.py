"""Continuous generators: velocities over pixels or latents, integrated to images.

Legend: ``B`` images, ``S`` side, ``C s s`` pixels or latents of an image, ``T`` condition tokens, ``E`` their channels.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from model.configs import Prediction
from model.diffusion.few_steps import check_levels, solve_few_steps
from model.diffusion.flow_matching import Denoiser, add_noise
from model.diffusion.guidance import FULL_INTERVAL, with_guidance
from model.diffusion.solver import Scheduler, sample_noise, solve
from model.errors import ModelError
from model.networks.denoiser import Network, as_denoiser
from model.networks.editor import is_editor, with_reference
from model.networks.image_tokens import hide_images
from model.networks.latents import Autoencoder, decode_latents, encode_latents

REFERENCE_ABOVE = 0.85
"""Noise level σ above which an editor sees the reference of :meth:`ContinuousBackbone.generate`. The shapes are decided
there. A reference that is shown longer is copied."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ContinuousBackbone:
    """A network that predicts velocities; see :class:`model.generation.backbone.Backbone`.

    Attributes:
        network: A transformer or U-Net.
        scheduler: Any flow-matching scheduler of diffusers.
        vae: The autoencoder of its latents, or None for a network over pixels.
        prediction: The network's output.
        guidance_interval: Noise levels σ at which guidance acts.
        guide: Weaker version of the network, to guide by; None for the network itself.
        noise_levels: The levels of a network that was distilled to few steps, or None for other networks.
    """

    network: Network
    scheduler: Scheduler
    vae: Autoencoder | None
    prediction: Prediction = "velocity"
    guidance_interval: tuple[float, float] = FULL_INTERVAL
    guide: Network | None = None
    noise_levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if the guide or the noise levels are not valid for the network."""
        if self.noise_levels is not None:
            check_levels(self.noise_levels)
        if self.guide is not None and (given := _interface(self.guide)) != (expected := _interface(self.network)):
            raise ModelError(
                f"the guide does not fit the network: side and channels {given}, not {expected}; use an earlier or "
                "smaller version of the network"
            )

    @property
    def side(self) -> int:
        """Width and height of the images, in px."""
        scale = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        return int(self.network.config.sample_size) * scale

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        device: torch.device = self.network.device
        return device

    @property
    def condition_channels(self) -> int:
        """E, the channels of the condition tokens."""
        return _condition_channels(self.network)

    @property
    def max_steps(self) -> int | None:
        """Number of noise levels of a network that was distilled to few steps; None for other networks."""
        return None if self.noise_levels is None else len(self.noise_levels)

    @property
    def restorer(self) -> Denoiser | None:
        """The denoiser of six input channels of an editor; None for other networks, and after a distillation.

        A distilled editor has seen no reference.
        """
        if self.noise_levels is not None or not is_editor(self.network):
            return None
        return as_denoiser(self.network, self.prediction)

    @property
    def denoiser(self) -> Denoiser:
        """The network as a function of (x_σ, σ, tokens) to velocities. An editor gets an empty reference."""
        return self._showing(self.network, None)

    @property
    def starts_from_images(self) -> bool:
        """True: an image with noise is a point on the path of the flow."""
        return True

    def noise_shape(self, steps: int) -> tuple[int, ...]:
        """Return (C, s, s). The sampler is deterministic, so the shape does not depend on ``steps``."""
        config = self.network.config
        return (config.out_channels, config.sample_size, config.sample_size)

    def noise(self, count: int, steps: int, generator: torch.Generator | None, *, shared: bool = False) -> Tensor:
        """Sample standard normal noise (count, C, s, s) on the CPU."""
        return sample_noise(count, self.noise_shape(steps), generator, shared=shared)

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
        """Integrate the guided velocity from the noise, or the noised start: (B, 3, S, S) float32 in [−1, 1]."""
        denoiser = with_guidance(
            self._showing(self.network, reference),
            guidance_scale,
            negative=negative,
            interval=self.guidance_interval,
            weaker=None if self.guide is None else self._guiding(self.guide, reference),
        )
        if start is not None:
            # The point of the path at σ = strength (SDEdit, 2108.01073, section 3, for the path of flow matching).
            noise = add_noise(self.encode(start), noise, noise.new_full((len(noise),), strength))
        if self.noise_levels is not None:
            sample = solve_few_steps(denoiser, noise, condition, self.noise_levels, on_step, strength=strength)
        else:
            sample = solve(denoiser, noise, condition, self.scheduler, steps, on_step, strength=strength)
        return self.decode(sample)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images as latents (B, C, s, s), or return the pixels."""
        return images if self.vae is None else encode_latents(self.vae, images)

    def decode(self, encoded: Tensor) -> Tensor:
        """Decode pixels or latents (B, C, s, s) to images (B, 3, S, S) float32 in [−1, 1]."""
        return (encoded if self.vae is None else decode_latents(self.vae, encoded)).clamp(-1, 1).float()

    def _showing(self, network: Network, reference: Tensor | None) -> Denoiser:
        """Return the denoiser, for an editor with the reference (B, 3, S, S) above ``REFERENCE_ABOVE``."""
        denoiser = as_denoiser(network, self.prediction)
        return with_reference(denoiser, reference, above=REFERENCE_ABOVE) if is_editor(network) else denoiser

    def _guiding(self, guide: Network, reference: Tensor | None) -> Denoiser:
        """Return the denoiser of the guide, which sees no images of neighbours, so it need not take them."""
        denoiser = self._showing(guide, reference)
        return lambda noisy, sigma, tokens: denoiser(noisy, sigma, hide_images(self.network, tokens))


def _condition_channels(network: Network) -> int:
    config = network.config
    return int(config.get("caption_channels") or config.cross_attention_dim)  # a transformer projects its captions


def _interface(network: Network) -> tuple[int, ...]:
    """Return the side, the input and output channels, and the channels of the condition of a network."""
    config = network.config
    return config.sample_size, config.in_channels, config.out_channels, _condition_channels(network)
