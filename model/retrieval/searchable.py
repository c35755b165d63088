"""Search interface of databases, and the results of a search.

Legend: ``Q`` queries, ``K`` neighbours, ``D`` embedding width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.encoder.identity import EncoderIdentity


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NearestIds:
    """Neighbours, best first: scores (Q, K) float32 cosines, ids (Q, K) int64."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]

    @classmethod
    def empty(cls, queries: int, width: int) -> "NearestIds":
        """Return a result without neighbours: scores −inf, ids −1."""
        return cls(scores=np.full((queries, width), -np.inf, np.float32), ids=np.full((queries, width), -1, np.int64))

    def put(self, queries: NDArray[np.int64], better: "NearestIds") -> None:
        """Replace the results of ``queries`` by ``better``."""
        self.scores[queries], self.ids[queries] = better.scores, better.ids


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """Neighbours, best first: scores (Q, K) float32 cosines, ids (Q, K) int64, embeddings (Q, K, D) float32."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    embeddings: NDArray[np.float32]


class Searchable(Protocol):
    """Search interface of a database, local or distributed, as pipelines use it."""

    name: str
    encoder: EncoderIdentity

    @property
    def has_images(self) -> bool:
        """True if the stored images can be read."""
        ...

    def __len__(self) -> int:
        """Return the number of rows that a search may return."""
        ...

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """Return the ``k`` nearest rows of each query; see :meth:`model.retrieval.database.Database.search`."""
        ...

    def images(self, ids: Sequence[int]) -> list[Image.Image]:
        """Return the stored images of rows; see :meth:`model.retrieval.database.Database.images`."""
        ...
