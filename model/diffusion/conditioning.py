"""What the denoiser is told: the query's embedding and its k neighbours', as tokens (Sheynin et al., §3).

Legend: ``B`` batch, ``K`` neighbours, ``D`` embedding width.

In training the query is the picture's own embedding; at inference it is a text's. The two lie apart in CLIP space
(the text gap), so in training the query is often mixed with a random direction, which makes a text embedding one more
noisy query (LAFITE's pseudo-text, (1 − a)·f + a·n, renormalised; the weights here were measured, not the paper's).

A dropped token keeps its place and its marker and has zeros for its embedding, so "no query", "no neighbours" and "no
condition at all" are inputs that training has shown to the network.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import ModelError

MARKER_CHANNELS = 1
"""Channels beside the embedding: 1 for the query, 0 for a neighbour."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """How training hides parts of the condition. Probabilities are per sample and exclude each other."""

    neighbours: int = 10
    drop_all: float = 0.10
    drop_query: float = 0.15
    drop_neighbours: float = 0.10
    gap_probability: float = 0.7
    gap_weight: float = 0.9  # the largest weight of the random direction

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if self.neighbours < 1:
            raise ValueError("neighbours must be at least 1: the method retrieves")
        drops = (self.drop_all, self.drop_query, self.drop_neighbours)
        if min(drops) < 0 or sum(drops) > 1:
            raise ValueError("drop_all + drop_query + drop_neighbours must lie in [0, 1]: they exclude each other")
        if not (0 <= self.gap_probability <= 1 and 0 <= self.gap_weight < 1):
            raise ValueError("gap_probability must lie in [0, 1] and gap_weight in [0, 1)")


def condition_tokens(query: Tensor | None, neighbours: Tensor | None, *, dimension: int, batch: int) -> Tensor:
    """Query and neighbours as a sequence, scaled to unit variance, with the query marked.

    Args:
        query: (B, D) unit rows, or None for a hidden query.
        neighbours: (B, K, D) unit rows, or None for hidden neighbours (one hidden token stands for them).
        dimension: D.
        batch: B.

    Returns:
        (B, 1 + K, D + 1) float32.
    """
    if query is None:
        query = torch.zeros(batch, dimension)
    if neighbours is None:
        neighbours = torch.zeros(batch, 1, dimension, device=query.device)
    if query.shape != (batch, dimension) or neighbours.shape[::2] != (batch, dimension):
        raise ModelError(
            f"query {tuple(query.shape)} and neighbours {tuple(neighbours.shape)} do not fit batch {batch}, "
            f"embedding width {dimension}; embed with the encoder that the generator was trained with"
        )
    embeddings = torch.cat([query[:, None], neighbours.to(query.device)], dim=1).float() * dimension**0.5
    marker = torch.zeros(*embeddings.shape[:2], MARKER_CHANNELS, device=embeddings.device)
    marker[:, 0] = 1
    return torch.cat([embeddings, marker], dim=2)


def null_condition(tokens: Tensor) -> Tensor:
    """The same tokens (B, 1 + K, D + 1) with every embedding hidden: the unconditional input of guidance."""
    hidden = torch.zeros_like(tokens)
    hidden[..., -MARKER_CHANNELS:] = tokens[..., -MARKER_CHANNELS:]
    return hidden


def bridge_text_gap(query: Tensor, config: ConditioningConfig, generator: torch.Generator) -> Tensor:
    """Mix unit rows (B, D) with random unit directions, in some of the samples, so that a text is no stranger."""
    batch = len(query)
    mixed = torch.rand(batch, 1, generator=generator) < config.gap_probability
    weight = torch.rand(batch, 1, generator=generator) * config.gap_weight * mixed
    direction = F.normalize(torch.randn(query.shape, generator=generator), dim=1)
    return F.normalize((1 - weight) * query + weight * direction, dim=1)


def training_condition(
    query: Tensor, neighbours: Tensor, config: ConditioningConfig, generator: torch.Generator
) -> Tensor:
    """The tokens of a training batch: gap bridged, parts hidden at random.

    Args:
        query: (B, D) unit rows, the pictures' own embeddings.
        neighbours: (B, K, D) unit rows.
        config: what is hidden how often.
        generator: source of all randomness, on the CPU.

    Returns:
        (B, 1 + K, D + 1) float32.
    """
    query = bridge_text_gap(query.float(), config, generator)
    draw = torch.rand(len(query), generator=generator)
    all_below = config.drop_all
    query_below = all_below + config.drop_query
    neighbours_below = query_below + config.drop_neighbours
    hide_all = draw < all_below
    hide_query = hide_all | ((draw >= all_below) & (draw < query_below))
    hide_neighbours = hide_all | ((draw >= query_below) & (draw < neighbours_below))
    query = query.masked_fill(hide_query[:, None], 0)
    neighbours = neighbours.float().masked_fill(hide_neighbours[:, None, None], 0)
    return condition_tokens(query, neighbours, dimension=query.shape[1], batch=len(query))
