"""The autoencoder: a picture as a square of codes from a learned codebook, and back (VQ-VAE, 1711.00937).

Legend: ``B`` batch, ``S`` side of a picture, ``n`` tokens = (S / downscale)², ``K`` codes, ``w`` their width.

It is diffusers' ``VQModel``, unchanged. :mod:`model.training.objectives.autoencoder` is its training objective.
"""

import dataclasses
import math

import torch
from diffusers import VQModel
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Size of the network: ``channels`` of each resolution from the picture's down, each half of the one before."""

    image_size: int = 64
    downscale: int = 4
    codes: int = 1024
    code_width: int = 8
    channels: tuple[int, ...] = (64, 128, 128)
    layers: int = 1

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if self.downscale != 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"channels name {len(self.channels)} resolutions, each half of the one before, but downscale is "
                f"{self.downscale}; name one more than its power of two"
            )
        if self.image_size % self.downscale:
            raise ValueError(f"image_size {self.image_size} is no multiple of downscale {self.downscale}")
        if self.codes < 2 or min(self.code_width, self.layers, *self.channels) < 1:
            raise ValueError("codes must be at least 2; code_width, layers and channels at least 1")

    @property
    def tokens(self) -> int:
        """How many codes a picture becomes, n."""
        return (self.image_size // self.downscale) ** 2


def build_autoencoder(config: AutoencoderConfig, *, seed: int) -> VQModel:
    """The network with weights drawn from ``seed``; the global random state is left as it was."""
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
def encode_codes(autoencoder: VQModel, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [−1, 1] to the nearest codes (B, n) int64, row by row."""
    latents = autoencoder.encode(pictures.to(autoencoder.dtype)).latents
    rows = latents.permute(0, 2, 3, 1).flatten(1, 2)
    # In float32, whatever the rest computes in: distances are not there in others, nor would they be fine enough.
    return torch.cdist(rows.float(), autoencoder.quantize.embedding.weight.float()).argmin(2)


@torch.no_grad()
def decode_codes(autoencoder: VQModel, codes: Tensor) -> Tensor:
    """Codes (B, n) int64 below K to pictures (B, 3, S, S) in [−1, 1]."""
    side = math.isqrt(codes.shape[1])
    shape = (len(codes), side, side, autoencoder.config.vq_embed_dim)
    latents = autoencoder.quantize.get_codebook_entry(codes.flatten(), shape)
    pictures: Tensor = autoencoder.decode(latents, force_not_quantize=True).sample.clamp(-1, 1)
    return pictures
