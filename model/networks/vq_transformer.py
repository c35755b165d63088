"""The denoiser of codes: a transformer over image tokens with cross-attention to the query and its neighbours.

Legend: ``B`` batch, ``n`` tokens (a square of them), ``K`` codes ([MASK] is code K), ``T`` condition tokens, ``E``
their channels, ``W`` width = heads × head_width.

The blocks are those of VQ-Diffusion (Gu et al. 2111.14822): self-attention, cross-attention to the condition, and MLP,
with the timestep in the normalisation. There are two differences. The condition is not text. The shift, scale and gate
of all blocks come from one layer (adaLN-single, Chen et al. 2310.00426, §2.3), which saves a quarter of the parameters.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from model.configs import VQTransformerConfig
from model.diffusion.conditioning import MARKER_CHANNELS
from model.networks.fused_attention import (
    block_diagonal_keys,
    fold_output,
    folded_attention,
    folding_is_cheaper,
    is_unmodified,
)

TIME_CHANNELS = 256
"""Channels of the sinusoidal embedding of t, which is scaled to 0 … 1000, the range the embedding expects."""


class Attention(nn.Module):
    """Attention of tokens to a context. Normalised queries and keys keep training stable at high learning rates."""

    def __init__(self, width: int, head_width: int) -> None:
        """Create width / head_width heads."""
        super().__init__()
        self.head_width = head_width
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.query_gain = nn.Parameter(torch.ones(head_width))
        self.key_gain = nn.Parameter(torch.ones(head_width))
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Attend: tokens (B, n, W), context (B, T, W) -> (B, n, W)."""
        query, key, value = (
            project(source).unflatten(2, (-1, self.head_width))
            for project, source in ((self.query, tokens), (self.key, context), (self.value, context))
        )
        query, key = _rms_norm(query, self.query_gain), _rms_norm(key, self.key_gain)
        fold = folding_is_cheaper(context.shape[1], tokens.shape[1], key.shape[2], tokens.shape[2], projections=1)
        if fold and is_unmodified(self.out):
            scaled = query.flatten(2) * self.head_width**-0.5
            output = folded_attention(scaled, block_diagonal_keys(key), fold_output(value, self.out.weight))
            return output + self.out.bias.to(output.dtype)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        projected: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """Self-attention, cross-attention and MLP on the residual stream. The timestep modulates self-attention and MLP."""

    def __init__(self, width: int, head_width: int) -> None:
        """Create a block of ``width`` channels with width / head_width heads."""
        super().__init__()
        self.own = Attention(width, head_width)
        self.cross = Attention(width, head_width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.modulation = nn.Parameter(torch.zeros(1, 6, width))  # three dimensions: not a matrix for Muon

    def forward(self, tokens: Tensor, context: Tensor, time: Tensor) -> Tensor:
        """Apply the block: tokens (B, n, W), context (B, T, W), time (B, 6, W) -> (B, n, W)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (time + self.modulation)[:, :, None].unbind(1)
        normal = _modulate(tokens, shift, scale)
        tokens = tokens + (1 + gate) * self.own(normal, normal)
        tokens = tokens + self.cross(self.cross_norm(tokens), context)
        update: Tensor = (1 + mlp_gate) * self.mlp(_modulate(tokens, mlp_shift, mlp_scale))
        return tokens + update


class VQTransformer(ModelMixin, ConfigMixin):
    """Transformer from noisy codes, their times and the condition tokens to logits of the clean codes."""

    @register_to_config
    def __init__(
        self,
        codes: int = 1024,
        tokens: int = 256,
        timesteps: int = 100,
        layers: int = 8,
        heads: int = 6,
        head_width: int = 64,
        condition_channels: int = 257,
    ) -> None:
        """Create the network. Sizes are as in ``VQTransformerConfig``; ``condition_channels`` is E."""
        super().__init__()
        width, side = heads * head_width, math.isqrt(tokens)
        self.stretch = 1000 / timesteps
        self.code_embedding = nn.Embedding(codes + 1, width)
        self.row_embedding = nn.Parameter(torch.zeros(side, 1, width))
        self.column_embedding = nn.Parameter(torch.zeros(1, side, width))
        self.time_in = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.time_out = nn.Linear(width, 8 * width)
        self.condition_in = nn.Sequential(
            nn.Linear(condition_channels, width), nn.GELU("tanh"), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.blocks = nn.ModuleList(Block(width, head_width) for _ in range(layers))
        self.head = nn.Linear(width, codes)

    def forward(self, codes: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Return logits of p_θ(x_0|x_t), in the dtype of the weights or of the enclosing autocast.

        Args:
            codes: x_t, (B, n) int64 in 0 … K.
            timestep: (B,) int64 in 1 … T.
            condition: (B, T, E) tokens, any float dtype.

        Returns:
            (B, n, K): there is no logit for [MASK], which is never a clean code.
        """
        dtype = self.code_embedding.weight.dtype
        waves = get_timestep_embedding(timestep * self.stretch, TIME_CHANNELS, flip_sin_to_cos=True)
        time = self.time_out(self.time_in(waves.to(dtype))).unflatten(1, (8, -1))
        context = self.condition_in(condition.to(dtype))
        tokens = self.code_embedding(codes) + (self.row_embedding + self.column_embedding).flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens, context, time[:, :6])
        shift, scale = time[:, 6:, None].unbind(1)
        logits: Tensor = self.head(_modulate(tokens, shift, scale))
        return logits


def build_vq_transformer(config: VQTransformerConfig, *, embedding_dimension: int, seed: int) -> VQTransformer:
    """Build the network with random initial weights from ``seed``. The global random state is unchanged.

    ``embedding_dimension`` is D, the width of the encoder's embeddings. The condition tokens have D + 1 channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = {name: value for name, value in dataclasses.asdict(config).items() if name != "kind"}
        network: VQTransformer = VQTransformer(**size, condition_channels=embedding_dimension + MARKER_CHANNELS)
        initialise(network)
    return network


def initialise(network: VQTransformer) -> None:
    """Initialise in place: Xavier matrices, zero or small residual branches, zero head.

    The initialised network gives equal logits to all codes.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for embedding in (network.code_embedding.weight, network.row_embedding, network.column_embedding):
        nn.init.normal_(embedding, std=0.5)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.time_out.weight)
    block: Any
    for block in network.blocks:
        nn.init.zeros_(block.own.out.weight)
        nn.init.zeros_(block.mlp[2].weight)
        nn.init.normal_(block.cross.out.weight, std=0.02)


def _rms_norm(heads: Tensor, gain: Tensor) -> Tensor:
    """Scale each head's vector (B, n, heads, head_width) to mean square 1, times gain. The dtype is unchanged."""
    return F.rms_norm(heads, gain.shape, gain.to(heads.dtype), eps=1e-6).to(heads.dtype)


def _modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm without parameters, then (1 + scale)·x + shift (DiT, 2212.09748, §3.2)."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
