"""Conversion between images and an autoencoder's latents, for images too large to denoise as pixels.

Legend: ``B`` batch, ``S`` side, ``C s s`` latent.
"""

from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

Autoencoder: TypeAlias = AutoencoderKL | VQModel


@torch.no_grad()
def encode_latents(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Encode images (B, 3, S, S) in [−1, 1] to latents (B, C, s, s) float32.

    The latents of an ``AutoencoderKL`` are the mean of its Gaussian, not a sample. They are scaled by the autoencoder's
    ``scaling_factor``, which gives published autoencoders about unit variance. A ``VQModel`` trained by this project
    has a factor of 1, so its latents keep their variance.
    """
    encoded = autoencoder.encode(images.to(autoencoder.dtype))
    latents = (encoded.latent_dist.mode() if isinstance(autoencoder, AutoencoderKL) else encoded.latents).float()
    scaled: Tensor = (latents - _shift(autoencoder)) * autoencoder.config.scaling_factor
    return scaled


@torch.no_grad()
def decode_latents(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Decode latents (B, C, s, s) to images (B, 3, S, S) float32, about in [−1, 1] and not clamped."""
    unscaled = latents / autoencoder.config.scaling_factor + _shift(autoencoder)
    images: Tensor = autoencoder.decode(unscaled.to(autoencoder.dtype)).sample
    return images.float()


def _shift(autoencoder: Autoencoder) -> float:
    return getattr(autoencoder.config, "shift_factor", None) or 0.0
