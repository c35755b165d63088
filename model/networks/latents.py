"""Pictures as an autoencoder's latents, for sizes where pixels are too many.

Legend: ``B`` batch, ``S`` side, ``C s s`` latent.
"""

from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

Autoencoder: TypeAlias = AutoencoderKL | VQModel


@torch.no_grad()
def encode_latents(autoencoder: Autoencoder, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [−1, 1] to latents (B, C, s, s) float32: a Gaussian's mean, unsampled.

    They are scaled by the autoencoder's own ``scaling_factor``, which brings a published one's to about unit variance.
    A ``VQModel`` trained here has 1 for it, so its latents keep the spread that they have.
    """
    encoded = autoencoder.encode(pictures.to(autoencoder.dtype))
    latents = (encoded.latent_dist.mode() if isinstance(autoencoder, AutoencoderKL) else encoded.latents).float()
    scaled: Tensor = (latents - _shift(autoencoder)) * autoencoder.config.scaling_factor
    return scaled


@torch.no_grad()
def decode_latents(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Latents (B, C, s, s) to pictures (B, 3, S, S), not clamped."""
    unscaled = latents / autoencoder.config.scaling_factor + _shift(autoencoder)
    pictures: Tensor = autoencoder.decode(unscaled.to(autoencoder.dtype)).sample
    return pictures.float()


def _shift(autoencoder: Autoencoder) -> float:
    return getattr(autoencoder.config, "shift_factor", None) or 0.0
