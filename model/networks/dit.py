"""The transformer denoiser: patches with cross-attention to the embeddings of the query and its neighbours.

Legend: ``B`` batch, ``C S S`` image, ``T`` condition tokens, ``E`` their channels.

The network is diffusers' ``PixArtTransformer2DModel`` (patches, adaLN-single on the timestep, cross-attention; Chen et
al. 2310.00426). Condition tokens take the place of the captions. This project defines the size, the initial weights,
the meaning of the output, cheaper forms of the attention and patch layers (:mod:`model.networks.fused_attention`),
rotary positions (:mod:`model.networks.rotary`), and attention to the images of neighbours
(:mod:`model.networks.image_tokens`).
"""

import functools

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from model.configs import TransformerConfig
from model.diffusion.conditioning import MARKER_CHANNELS
from model.networks.fused_attention import use_fused_attention
from model.networks.image_tokens import add_image_tokens
from model.networks.rotary import RotaryTransformer


def build_transformer(config: TransformerConfig, *, embedding_dimension: int, seed: int) -> PixArtTransformer2DModel:
    """Build the network with random initial weights from ``seed``. The global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = functools.partial(RotaryTransformer, rotary=True) if config.rotary else PixArtTransformer2DModel
        network: PixArtTransformer2DModel = kind(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_width,
            in_channels=config.channels,
            out_channels=config.channels,
            num_layers=config.layers,
            cross_attention_dim=config.heads * config.head_width,
            caption_channels=embedding_dimension + MARKER_CHANNELS,
            sample_size=config.image_size,
            patch_size=config.patch_size,
            attention_bias=False,  # each bias gradient costs a pass over the batch, without a measurable benefit
            use_additional_conditions=False,
        )
        initialise(network)
    use_fused_attention(network)
    if not config.neighbour_images:
        return network
    return add_image_tokens(network, images=config.neighbour_images, patch=config.neighbour_patch, seed=seed)


def initialise(network: PixArtTransformer2DModel) -> None:
    """Initialise in place: Xavier matrices, small residual branches, zero head (DiT, 2212.09748, §3.2).

    The output of the initialised network is zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(network.proj_out.weight)
    nn.init.normal_(network.adaln_single.linear.weight, std=0.02)
    for block in network.transformer_blocks:
        nn.init.zeros_(block.attn1.to_out[0].weight)
        nn.init.normal_(block.attn2.to_out[0].weight, std=0.02)
