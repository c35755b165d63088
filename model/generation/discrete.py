"""Discrete generators: codes sampled by VQ-Diffusion and decoded to images.

Legend: ``B`` images, ``S`` side, ``n`` codes of an image, ``T`` condition tokens, ``E`` their channels.
"""

import dataclasses
from collections.abc import Callable

import torch
from diffusers import VQModel
from torch import Tensor

from model.diffusion.solver import sample_uniforms
from model.diffusion.vq_diffusion import KnownCodes, Transitions, sample_codes
from model.errors import ModelError
from model.networks.vq_autoencoder import decode_codes, encode_codes
from model.networks.vq_transformer import VQTransformer

NO_START = "a discrete generator cannot start from an image; use start='noise', or a continuous generator"
NO_REFERENCE = "this generator takes no reference; use reference='none', or a generator trained for editing"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DiscreteBackbone:
    """A network that predicts codes; see :class:`model.generation.backbone.Backbone`.

    Attributes:
        network: The transformer over codes.
        vae: The autoencoder that defines the codes.
        truncation: Probability mass kept per code; 1 keeps all.
    """

    network: VQTransformer
    vae: VQModel
    truncation: float = 0.86

    @property
    def side(self) -> int:
        """Width and height of the images, in px."""
        return int(self.vae.config.sample_size)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        device: torch.device = self.network.device
        return device

    @property
    def condition_channels(self) -> int:
        """E, the channels of the condition tokens."""
        return int(self.network.config.condition_channels)

    @property
    def transitions(self) -> Transitions:
        """The process that the network was trained for."""
        return Transitions(codes=self.network.config.codes, timesteps=self.network.config.timesteps)

    @property
    def max_steps(self) -> int:
        """Number of timesteps of the process."""
        return int(self.network.config.timesteps)

    @property
    def restorer(self) -> None:
        """None: no objective trains a discrete network to restore."""
        return

    @property
    def starts_from_images(self) -> bool:
        """False: codes that the process has unmasked are never revised, so a start would come back unchanged."""
        return False

    def noise_shape(self, steps: int) -> tuple[int, ...]:
        """Return (steps, n): one uniform number per step and code."""
        return (steps, self.network.config.tokens)

    def noise(self, count: int, steps: int, generator: torch.Generator | None, *, shared: bool = False) -> Tensor:
        """Sample uniform numbers (count, steps, n) in [0, 1) on the CPU."""
        return sample_uniforms(count, self.noise_shape(steps), generator, shared=shared)

    def generate(
        self,
        condition: Tensor,
        noise: Tensor,
        *,
        steps: int,
        guidance_scale: float,
        negative: Tensor | None,
        on_step: Callable[[int], None] | None,
        start: Tensor | None = None,
        strength: float = 1.0,
        reference: Tensor | None = None,
        known: KnownCodes | None = None,
    ) -> Tensor:
        """Sample codes, in one stride per row of the noise, and decode them: (B, 3, S, S) float32 in [−1, 1].

        ``known`` holds codes to start from or to keep; see :class:`model.diffusion.vq_diffusion.KnownCodes`.
        Raises ``ModelError`` for a ``start``, which needs a continuous network, and for a ``reference``.
        """
        if start is not None:
            raise ModelError(NO_START)
        if reference is not None:
            raise ModelError(NO_REFERENCE)
        codes = sample_codes(
            self.network,
            condition,
            noise[:, :steps],
            transitions=self.transitions,
            guidance_scale=guidance_scale,
            truncation=self.truncation,
            negative=negative,
            known=known,
            on_step=on_step,
        )
        return self.decode(codes)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) in [−1, 1] as codes (B, n) int64."""
        return encode_codes(self.vae, images)

    def decode(self, encoded: Tensor) -> Tensor:
        """Decode codes (B, n) to images (B, 3, S, S) float32 in [−1, 1]."""
        return decode_codes(self.vae, encoded).float()
