"""The U-Net denoiser, the paper's continuous backbone, of any size (Sheynin et al., §3.2).

The network is diffusers' ``UNet2DConditionModel`` with the condition tokens as encoder hidden states. At equal
parameters the transformer of :mod:`model.networks.dit` trains four times as many images per second. The U-Net is kept
to reproduce the paper.
"""

import dataclasses
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from diffusers import UNet2DConditionModel
from torch import nn

from model.diffusion.conditioning import MARKER_CHANNELS
from model.diffusion.flow_matching import Prediction
from model.errors import ModelError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Size of the U-Net: one level per entry of ``widths``, each at half the resolution of the one before.

    All levels but the first have attention.

    Attributes:
        kind: Kind of the network.
        image_size: Side of the denoised pixels or latents.
        channels: 3 for pixels, else the channels of the latents.
        widths: Channels of each level, multiples of 32 and of ``head_width``.
        layers: Residual layers per level.
        head_width: Channels of an attention head.
        prediction: What the network predicts.
    """

    kind: Literal["unet"] = "unet"
    image_size: int = 64
    channels: int = 3
    widths: tuple[int, ...] = (64, 128, 192, 256)
    layers: int = 2
    head_width: Annotated[int, Ge(1)] = 32
    prediction: Prediction = "velocity"

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if the image cannot be halved, or heads or group norms do not divide the widths."""
        halvings = len(self.widths) - 1
        if halvings < 1 or self.image_size % 2**halvings:
            raise ModelError(
                f"image_size cannot be halved at each level: {self.image_size}, {len(self.widths)} widths; give at "
                "least 2 widths, and an image_size that is a multiple of 2 ** (widths - 1)"
            )
        if any(width % 32 or width % self.head_width for width in self.widths):
            raise ModelError(
                f"widths do not fit the group norms or heads: {self.widths}; give multiples of 32 and of head_width "
                f"{self.head_width}"
            )


def build_unet(config: UNetConfig, *, embedding_dimension: int, seed: int) -> UNet2DConditionModel:
    """Build the network with random initial weights from ``seed`` and a zero head.

    The global random state is unchanged.
    """
    deeper = len(config.widths) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2DConditionModel(
            sample_size=config.image_size,
            in_channels=config.channels,
            out_channels=config.channels,
            layers_per_block=config.layers,
            block_out_channels=config.widths,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * deeper,
            up_block_types=("CrossAttnUpBlock2D",) * deeper + ("UpBlock2D",),
            cross_attention_dim=embedding_dimension + MARKER_CHANNELS,
            attention_head_dim=tuple(width // config.head_width for width in config.widths),
        )
        nn.init.zeros_(network.conv_out.weight)
        nn.init.zeros_(network.conv_out.bias)
    return network
