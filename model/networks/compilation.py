"""Compilation of networks for a GPU, shared by training and generation."""

import torch
from diffusers import PixArtTransformer2DModel, VQModel
from torch import nn

from model.networks.fused_attention import sum_by_image
from model.networks.vq_transformer import VQTransformer

GRAPHS = 8
"""Compiled graphs allowed per block: batch of 1, of a fixed size, of any size; with gradients and without."""


def compile_in_place(network: nn.Module, *, whole: bool = True) -> None:
    """Apply ``torch.compile`` to a network in place. Its parameter names do not change.

    A transformer is compiled as a whole, which also fuses its first and last layers. A U-Net is compiled block by
    block, because compiling all of it takes minutes. An autoencoder is not compiled: its training objective hooks into
    its quantizer.

    Args:
        network: The network to compile.
        whole: False compiles a transformer block by block, as needed when hooks gather the weights of each block.
            Default: True.
    """
    if isinstance(network, VQModel):
        return
    blocks, transformer = transformer_blocks(network), isinstance(network, PixArtTransformer2DModel | VQTransformer)
    # All blocks share one class, so they share its recompile limit, although a U-Net's blocks differ in shape. Blocks
    # beyond the limit run uncompiled.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS * len(blocks))
    if transformer:
        for block in blocks:
            sum_by_image(block)
    for part in [network] if whole and transformer else blocks:
        part.compile()


def transformer_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of the network: the members of its module lists."""
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
