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
from model.step_random import Draw

MARKER_CHANNELS = 1
"""Channels beside the embedding: 1 for the query, 0 for a neighbour."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """How training hides parts of the condition. The drops are probabilities per sample and exclude each other.

    A text's neighbours lie farther apart than a picture's own. So ``pool`` may be larger than ``neighbours``: half of
    the samples then see a random choice of the pool instead of its nearest. ``fewer_neighbours`` is the share of
    samples that see a random number of neighbours from 1 on, which frees k at inference from k in training.
    """

    neighbours: int = 10
    pool: int = 10  # neighbours searched for each picture, of which training shows ``neighbours``
    fewer_neighbours: float = 0.1
    drop_all: float = 0.10
    drop_query: float = 0.15
    drop_neighbours: float = 0.10
    gap_probability: float = 0.7
    gap_weight: float = 0.9  # the largest weight of the random direction

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if self.neighbours < 1:
            raise ValueError("neighbours must be at least 1: the method retrieves")
        if self.pool < self.neighbours:
            raise ValueError(f"pool {self.pool} is less than neighbours {self.neighbours}; search at least as many")
        drops = (self.drop_all, self.drop_query, self.drop_neighbours)
        if min(drops) < 0 or sum(drops) > 1:
            raise ValueError("drop_all + drop_query + drop_neighbours must lie in [0, 1]: they exclude each other")
        if not 0 <= self.fewer_neighbours <= 1:
            raise ValueError("fewer_neighbours must lie in [0, 1]")
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


def tokens_between(tokens: Tensor, count: int) -> Tensor:
    """From one condition to another, tokens (2, 1 + K, D + 1) to (count, 1 + K, D + 1): each token by :func:`slerp`."""
    embeddings, marker = tokens[..., :-MARKER_CHANNELS], tokens[0, ..., -MARKER_CHANNELS:]
    length = embeddings.shape[-1] ** 0.5  # of every embedding that is not hidden
    first, second = embeddings / length
    return torch.cat([length * slerp(first, second, count), marker.expand(count, -1, -1)], dim=-1)


def slerp(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Unit rows (count, …, D) on the great circles from ``first`` (…, D) to ``second`` (…, D), ends included."""
    share = torch.linspace(0, 1, count).view(-1, *[1] * first.ndim)
    angle = (first * second).sum(-1, keepdim=True).clamp(-1, 1).arccos()
    circle = (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / angle.sin()
    straight = F.normalize(torch.lerp(first, second, share), dim=-1)
    # Of one direction, or opposite ones, no great circle is the shortest.
    return torch.where(angle.sin() < 1e-4, straight, circle)


def null_condition(tokens: Tensor) -> Tensor:
    """The same tokens (B, 1 + K, D + 1) with every embedding hidden: the unconditional input of guidance."""
    hidden = torch.zeros_like(tokens)
    hidden[..., -MARKER_CHANNELS:] = tokens[..., -MARKER_CHANNELS:]
    return hidden


def bridge_text_gap(query: Tensor, config: ConditioningConfig, draw: Draw) -> Tensor:
    """Mix unit rows (B, D) with random unit directions, in some of the samples, so that a text is no stranger."""
    batch = len(query)
    mixed = draw.uniform(batch, 1) < config.gap_probability
    weight = draw.uniform(batch, 1) * config.gap_weight * mixed
    direction = F.normalize(draw.normal(*query.shape), dim=1)
    return F.normalize((1 - weight) * query + weight * direction, dim=1)


def choose_neighbours(neighbours: Tensor, config: ConditioningConfig, draw: Draw) -> Tensor:
    """Of each pool (B, P, D), nearest first, the neighbours that are shown, hidden ones as zeros: (B, K, D)."""
    batch, pool, dimension = neighbours.shape
    shown = min(config.neighbours, pool)
    if pool > shown:
        scattered = draw.uniform(batch, 1) < 0.5
        rank = torch.arange(pool, device=neighbours.device).expand(batch, pool) / pool
        chosen = torch.where(scattered, draw.uniform(batch, pool), rank).topk(shown, dim=1, largest=False).indices
        chosen = chosen.sort(dim=1).values[..., None].expand(batch, shown, dimension)
        neighbours = neighbours.gather(1, chosen)
    fewer = draw.uniform(batch, 1) < config.fewer_neighbours
    count = torch.where(fewer, 1 + (draw.uniform(batch, 1) * shown).floor(), shown)
    hidden = torch.arange(shown, device=neighbours.device) >= count
    return neighbours.masked_fill(hidden[..., None], 0)


def training_condition(query: Tensor, neighbours: Tensor, config: ConditioningConfig, draw: Draw) -> Tensor:
    """The tokens of a training batch: gap bridged, parts hidden at random.

    Args:
        query: (B, D) unit rows, the pictures' own embeddings.
        neighbours: (B, P, D) unit rows, nearest first.
        config: what is hidden how often.
        draw: source of all randomness, on the device of the rows.

    Returns:
        (B, 1 + K, D + 1) float32.
    """
    query = bridge_text_gap(query.float(), config, draw)
    neighbours = choose_neighbours(neighbours.float(), config, draw)
    dice = draw.uniform(len(query))
    all_below = config.drop_all
    query_below = all_below + config.drop_query
    neighbours_below = query_below + config.drop_neighbours
    hide_all = dice < all_below
    hide_query = hide_all | ((dice >= all_below) & (dice < query_below))
    hide_neighbours = hide_all | ((dice >= query_below) & (dice < neighbours_below))
    query = query.masked_fill(hide_query[:, None], 0)
    neighbours = neighbours.masked_fill(hide_neighbours[:, None, None], 0)
    return condition_tokens(query, neighbours, dimension=query.shape[1], batch=len(query))
