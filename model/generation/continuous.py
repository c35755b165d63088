"""Continuous generators: velocities over pixels or latents, integrated to images.

Legend: ``B`` images, ``S`` side, ``C s s`` pixels or latents of an image, ``T`` condition tokens, ``E`` their channels.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from model.configs import Prediction
from model.diffusion.flow_matching import Denoiser, add_noise
from model.diffusion.guidance import FULL_INTERVAL, with_guidance
from model.diffusion.solver import Scheduler, sample_noise, solve
from model.networks.denoiser import Network, as_denoiser
from model.networks.editor import is_editor, with_reference
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
    """

    network: Network
    scheduler: Scheduler
    vae: Autoencoder | None
    prediction: Prediction = "velocity"
    guidance_interval: tuple[float, float] = FULL_INTERVAL

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
        config = self.network.config
        return int(config.get("caption_channels") or config.cross_attention_dim)  # a transformer projects its captions

    @property
    def max_steps(self) -> None:
        """None: the number of steps has no maximum."""
        return

    @property
    def restorer(self) -> Denoiser | None:
        """The denoiser of six input channels of an editor, or None for other networks."""
        return as_denoiser(self.network, self.prediction) if is_editor(self.network) else None

    @property
    def denoiser(self) -> Denoiser:
        """The network as a function of (x_σ, σ, tokens) to velocities. An editor gets an empty reference."""
        return self._showing(None)

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
        shown = self._showing(reference)
        denoiser = with_guidance(shown, guidance_scale, negative=negative, interval=self.guidance_interval)
        if start is None:
            return self.decode(solve(denoiser, noise, condition, self.scheduler, steps, on_step))
        # The point of the path at σ = strength (SDEdit, 2108.01073, section 3, for the path of flow matching).
        noised = add_noise(self.encode(start), noise, noise.new_full((len(noise),), strength))
        return self.decode(solve(denoiser, noised, condition, self.scheduler, steps, on_step, strength=strength))

    def encode(self, images: Tensor) -> Tensor:
        """Encode images as latents (B, C, s, s), or return the pixels."""
        return images if self.vae is None else encode_latents(self.vae, images)

    def decode(self, encoded: Tensor) -> Tensor:
        """Decode pixels or latents (B, C, s, s) to images (B, 3, S, S) float32 in [−1, 1]."""
        return (encoded if self.vae is None else decode_latents(self.vae, encoded)).clamp(-1, 1).float()

    def _showing(self, reference: Tensor | None) -> Denoiser:
        """Return the denoiser, for an editor with the reference (B, 3, S, S) above ``REFERENCE_ABOVE``."""
        denoiser = as_denoiser(self.network, self.prediction)
        return with_reference(denoiser, reference, above=REFERENCE_ABOVE) if is_editor(self.network) else denoiser
