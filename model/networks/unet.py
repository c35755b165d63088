"""The U-Net denoiser, the paper's continuous backbone, of any size (Sheynin et al., §3.2).

The network is diffusers' ``UNet2DConditionModel`` with the condition tokens as encoder hidden states. At equal
parameters the transformer of :mod:`model.networks.dit` trains four times as many images per second. The U-Net is kept
to reproduce the paper.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from model.configs import UNetConfig
from model.diffusion.conditioning import MARKER_CHANNELS


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
