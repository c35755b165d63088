"""The denoiser: a transformer over patches that looks at the query and its neighbours through cross-attention.

Legend: ``B`` batch, ``C S S`` picture, ``T`` condition tokens, ``E`` their channels.

It is diffusers' ``PixArtTransformer2DModel`` as it stands (patches, adaLN-single on the timestep, cross-attention;
Chen et al. 2310.00426), with the condition tokens in the captions' place. What is ours: its size, its initial weights,
what its output means, and in which order attention and patches are multiplied (``attention.py``).
"""

import dataclasses
from typing import Literal

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from model.diffusion.conditioning import MARKER_CHANNELS
from model.diffusion.flow_matching import Prediction
from model.networks.fused_attention import use_fused_attention


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Size of the network, and what it predicts. Width is heads × head_width."""

    kind: Literal["transformer"] = "transformer"  # tells the networks apart in a form
    image_size: int = 32  # of what is denoised: pixels, or latents
    channels: int = 3  # 3 for pixels; a latent's own
    patch_size: int = 4
    layers: int = 6
    heads: int = 4
    head_width: int = 32
    prediction: Prediction = "velocity"

    def __post_init__(self) -> None:
        """Refuse a picture that patches do not tile."""
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if min(self.layers, self.heads, self.head_width, self.channels) < 1:
            raise ValueError("layers, heads, head_width and channels must be at least 1")


def build_transformer(config: TransformerConfig, *, embedding_dimension: int, seed: int) -> PixArtTransformer2DModel:
    """The network with weights drawn from ``seed``; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PixArtTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_width,
            in_channels=config.channels,
            out_channels=config.channels,
            num_layers=config.layers,
            cross_attention_dim=config.heads * config.head_width,
            caption_channels=embedding_dimension + MARKER_CHANNELS,
            sample_size=config.image_size,
            patch_size=config.patch_size,
            attention_bias=False,  # its gradients cost a pass over the batch each, and change nothing measurable
            use_additional_conditions=False,
        )
        initialise(network)
    use_fused_attention(network)
    return network


def initialise(network: PixArtTransformer2DModel) -> None:
    """Xavier matrices, quiet residual branches, a zero head: the first output is zero (DiT, 2212.09748, §3.2)."""
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
