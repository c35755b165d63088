"""The condition of a generator: prompts, their retrieved neighbours, and the tokens made from both.

Legend: ``P`` prompts, ``K`` neighbours, ``D`` embedding width.
"""

import logging
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.diffusion.conditioning import condition_tokens
from model.errors import ModelError
from model.retrieval.searchable import Hits, Searchable

logger = logging.getLogger(__name__)

QuerySlot = Literal["text", "mean", "both", "none"]
"""Embedding in the query's slot: the prompt's, the mean of its neighbours', the mean of both, or none."""


class Condition(NamedTuple):
    """The condition of P prompts.

    Attributes:
        tokens: (P, 1 + K, D + 1). If training used more than K neighbours, hidden ones are appended. Image tokens may
            follow, see :func:`model.diffusion.conditioning.append_image_tokens`.
        query: (P, D) unit rows in the query's slot, or None if it is hidden.
        hits: The neighbours, or None without retrieval.
    """

    tokens: Tensor
    query: Tensor | None
    hits: Hits | None


def build_condition(
    embeddings: Tensor, k: int, query: str, *, database: Searchable | None, dimension: int, trained_neighbours: int
) -> Condition:
    """Retrieve the neighbours of prompts and build the tokens.

    Args:
        embeddings: (P, D) unit rows on the CPU.
        k: Number of neighbours, K.
        query: The embedding in the query's slot, a ``QuerySlot``. "mean" and "both" need a database.
        database: Database to search, or None to hide all neighbours.
        dimension: D.
        trained_neighbours: Number of neighbours shown in training. If K is smaller, hidden neighbours are appended.

    Raises:
        ModelError: ``query`` is unknown or needs a database, the database is empty, or the embeddings have another
            width.
    """
    hits = None
    if database is not None:
        if not len(database):
            raise ModelError(f"database {database.name} is empty; add images to it, or generate without a database")
        hits = database.search(embeddings.numpy(), k)
        if k > len(database):
            logger.warning("the database holds %d images, but %d neighbours were requested", len(database), k)
    # Without retrieval the neighbours are zeros. The network has seen such hidden neighbours in training.
    found = torch.zeros(len(embeddings), k, dimension) if hits is None else torch.from_numpy(hits.embeddings)
    mean = F.normalize(found.mean(dim=1), dim=-1)
    slot: Tensor | None
    match query:
        case "text":
            slot = embeddings
        case "mean" if hits is not None:
            slot = mean
        case "both" if hits is not None:
            slot = F.normalize(embeddings + mean, dim=-1)
        case "none":
            slot = None
        case other:
            raise ModelError(f"query is not valid: {other!r}; use 'text', 'none', or with retrieval 'mean' or 'both'")
    found = F.pad(found, (0, 0, 0, max(0, trained_neighbours - found.shape[1])))
    return Condition(condition_tokens(slot, found, dimension=dimension, batch=len(embeddings)), slot, hits)
