"""How a network is compiled on a GPU, alike for training and for drawing."""

import torch
from diffusers import PixArtTransformer2DModel, VQModel
from torch import nn

from model.networks.fused_attention import sum_by_image
from model.networks.vq_transformer import VQTransformer

GRAPHS = 8
"""Of one block: for a batch of 1, of a fixed size, of any; with gradients, and without."""


def compile_in_place(network: nn.Module, *, whole: bool = True) -> None:
    """``torch.compile`` a network where it stands, its saved names unchanged.

    A transformer is compiled as a whole, which fuses its ends too; with ``whole=False`` (weights that hooks gather
    block by block) and for a U-Net, whose whole takes minutes, its blocks are. An autoencoder stays as it is: the
    objective that trains it hooks into its quantizer.
    """
    if isinstance(network, VQModel):
        return
    blocks, transformer = transformer_blocks(network), isinstance(network, PixArtTransformer2DModel | VQTransformer)
    # The blocks of one code share its limit of graphs, though a U-Net's have shapes of their own; past it, they run as
    # if they were not compiled.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS * len(blocks))
    if transformer:
        for block in blocks:
            sum_by_image(block)
    for part in [network] if whole and transformer else blocks:
        part.compile()


def transformer_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of the same code."""
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
