"""The VQ autoencoder: images to a square grid of codes from a learned codebook, and back (VQ-VAE, 1711.00937).

Legend: ``B`` batch, ``S`` side of an image, ``n`` tokens = (S / downscale)², ``K`` codes, ``w`` their width.

The network is diffusers' ``VQModel``, unchanged. Its training objective is in
:mod:`model.training.objectives.autoencoder`.
"""

import dataclasses
import math

import torch
from diffusers import VQModel
from torch import Tensor

from model.errors import ModelError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Size of the autoencoder.

    ``channels`` has one entry per resolution, starting at that of the image. Each further resolution is half of the one
    before.
    """

    image_size: int = 64
    downscale: int = 4
    codes: int = 1024
    code_width: int = 8
    channels: tuple[int, ...] = (64, 128, 128)
    layers: int = 1

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if the sizes are inconsistent or too small."""
        if self.downscale != 2 ** (len(self.channels) - 1):
            raise ModelError(
                f"channels and downscale do not match: {len(self.channels)} resolutions, downscale {self.downscale}; "
                "give log2(downscale) + 1 channels"
            )
        if self.image_size % self.downscale:
            raise ModelError(
                f"image_size is not a multiple of downscale: {self.image_size}, {self.downscale}; change one of them"
            )
        if self.codes < 2 or min(self.code_width, self.layers, *self.channels) < 1:
            raise ModelError(
                f"codes, code_width, layers or channels is too small: {self.codes}, {self.code_width}, {self.layers}, "
                f"{self.channels}; give at least 2 codes, and at least 1 of the others"
            )

    @property
    def tokens(self) -> int:
        """Number of codes per image, n."""
        return (self.image_size // self.downscale) ** 2


def build_autoencoder(config: AutoencoderConfig, *, seed: int) -> VQModel:
    """Build the network with random initial weights from ``seed``. The global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VQModel(
            down_block_types=("DownEncoderBlock2D",) * len(config.channels),
            up_block_types=("UpDecoderBlock2D",) * len(config.channels),
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            latent_channels=config.channels[-1],
            sample_size=config.image_size,
            num_vq_embeddings=config.codes,
            norm_num_groups=math.gcd(32, *config.channels),
            vq_embed_dim=config.code_width,
            scaling_factor=1.0,
        )


@torch.no_grad()
def encode_codes(autoencoder: VQModel, images: Tensor) -> Tensor:
    """Encode images (B, 3, S, S) in [−1, 1] to the nearest codes (B, n) int64 in row-major order."""
    latents = autoencoder.encode(images.to(autoencoder.dtype)).latents
    rows = latents.permute(0, 2, 3, 1).flatten(1, 2)
    # cdist is not implemented for half-precision dtypes, which would be too coarse for distances anyway.
    return torch.cdist(rows.float(), autoencoder.quantize.embedding.weight.float()).argmin(2)


@torch.no_grad()
def decode_codes(autoencoder: VQModel, codes: Tensor) -> Tensor:
    """Decode codes (B, n) int64 below K to images (B, 3, S, S) in [−1, 1]."""
    side = math.isqrt(codes.shape[1])
    shape = (len(codes), side, side, autoencoder.config.vq_embed_dim)
    latents = autoencoder.quantize.get_codebook_entry(codes.flatten(), shape)
    images: Tensor = autoencoder.decode(latents, force_not_quantize=True).sample.clamp(-1, 1)
    return images
