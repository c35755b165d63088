"""An open database: sharded FAISS proposes, the stored float16 rows decide.

Legend: ``Q`` queries, ``K`` neighbours, ``D`` embedding width, ``N`` rows over all shards.

Row ids are global: shard after shard in order, position within the shard. What a search returns is always scored with
the stored rows, never with an index's reconstruction, so an approximate index costs recall but never precision.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from model.clip import EncoderIdentity
from model.errors import ModelError

RERANK_FACTOR = 10
"""Candidates an approximate index proposes for each neighbour wanted."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardFiles:
    """Local files of one shard: the FAISS index, and the (n, D) float16 rows it was built from."""

    index: Path
    embeddings: Path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """Neighbours, best first: scores (Q, K) float32 cosines, ids (Q, K) int64, embeddings (Q, K, D) float32."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    embeddings: NDArray[np.float32]


class Database:
    """A searchable, read-only database. Opening maps files into memory; it reads no rows."""

    def __init__(
        self,
        shards: Sequence[ShardFiles],
        *,
        encoder: EncoderIdentity,
        name: str = "database",
        nprobe: int = 1,
        describe: Callable[[Sequence[int]], list[dict[str, Any]]] | None = None,
    ) -> None:
        """Open the shards, in row order.

        Args:
            shards: local files.
            encoder: whose space the rows live in.
            name: for messages and pictures.
            nprobe: cells an IVF index visits, as tuned when it was built.
            describe: metadata (key, url, …) of global row ids.

        Raises:
            ModelError: nothing to search, or index and rows of a shard do not agree.
        """
        self.name, self.encoder = name, encoder
        self._describe = describe
        self._rows = [np.load(shard.embeddings, mmap_mode="r") for shard in shards]
        self._indexes = [_open_index(shard.index, nprobe) for shard in shards]
        for shard, index, rows in zip(shards, self._indexes, self._rows, strict=True):
            if not rows.shape == (index.ntotal, index.d) == (index.ntotal, encoder.dimension):
                raise ModelError(
                    f"{shard.index} indexes {index.ntotal} rows of {index.d}, but {shard.embeddings} holds "
                    f"{rows.shape}; rebuild the database"
                )
        self._offsets = np.array([0, *itertools.accumulate(len(rows) for rows in self._rows)], dtype=np.int64)
        if len(self) == 0:
            raise ModelError(
                f"database {name} is empty: there is nothing to retrieve; build it from at least one image"
            )

    def __len__(self) -> int:
        """Rows over all shards."""
        return int(self._offsets[-1])

    @property
    def exact(self) -> bool:
        """Whether every shard compares all of its rows."""
        return all(isinstance(index, faiss.IndexFlat) for index in self._indexes)

    @property
    def nprobe_matters(self) -> bool:
        """Whether any shard has cells to visit more or fewer of."""
        return any(faiss.try_extract_index_ivf(index) is not None for index in self._indexes)

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """The ``k`` nearest rows of each query by cosine, re-ranked exactly.

        Every query gets min(k, rows that may be returned) places; where copies of the query leave nothing to fill
        one with, the id is −1, the score −inf and the embedding zero, which is how a hidden neighbour looks.

        Args:
            queries: (Q, D) unit rows.
            k: neighbours wanted, at least 1.
            exclude: (Q,) a row id for each query that must not be returned, nor any exact copy of it: the query itself.

        Raises:
            ModelError: the queries' width is not the database's, or a value is not finite.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.encoder.dimension:
            raise ModelError(f"queries {queries.shape} do not fit database {self.name} of {self.encoder}")
        if not len(queries) or not np.isfinite(queries).all():
            raise ModelError("there is no query, or one that is not finite; look at what was embedded")
        if k < 1:
            raise ModelError(f"k is {k}; ask for at least one neighbour")
        width = max(1, min(k, len(self) - (exclude is not None)))
        hits = self._search(queries, width, exclude, depth=width + (exclude is not None))
        ids, scores, embeddings = hits.ids, hits.scores, hits.embeddings
        # Cells without rows can leave a query short: then all rows are looked at for it.
        for query in np.flatnonzero((ids < 0).any(axis=1)):
            one = None if exclude is None else exclude[query : query + 1]
            whole, _ = self._rerank(queries[query : query + 1], np.arange(len(self), dtype=np.int64)[None], one)
            ids[query], scores[query] = whole.ids[0, :width], whole.scores[0, :width]
            embeddings[query] = whole.embeddings[0, :width]
        return Hits(scores=scores, ids=ids, embeddings=np.where((ids < 0)[..., None], np.float32(0), embeddings))

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Stored rows (*ids.shape, D) float16 of global ids."""
        flat = ids.reshape(-1)
        output = np.empty((len(flat), self.encoder.dimension), dtype=np.float16)
        shard_of = np.searchsorted(self._offsets, flat, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            output[here] = self._rows[shard][flat[here] - self._offsets[shard]]
        return output.reshape(*ids.shape, -1)

    def describe(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """What is known of rows (key, url, …); only the id where the database was opened without metadata."""
        if self._describe is None:
            return [{"id": int(row)} for row in ids]
        return [{"id": int(row), **known} for row, known in zip(ids, self._describe(ids), strict=True)]

    def _search(self, queries: NDArray[np.float32], width: int, exclude: NDArray[np.int64] | None, depth: int) -> Hits:
        """Propose ``depth`` of each shard and re-rank; where excluded copies took places, deeper until they do not."""
        proposals = depth if self.exact else depth * RERANK_FACTOR
        hits, copies = self._rerank(queries, self._propose(queries, proposals), exclude)
        hits = Hits(scores=hits.scores[:, :width], ids=hits.ids[:, :width], embeddings=hits.embeddings[:, :width])
        crowded = np.flatnonzero(copies > proposals - width)
        if len(crowded) and proposals < max(index.ntotal for index in self._indexes):
            deeper = self._search(
                queries[crowded], width, None if exclude is None else exclude[crowded], width + int(copies.max())
            )
            hits.ids[crowded], hits.scores[crowded] = deeper.ids, deeper.scores
            hits.embeddings[crowded] = deeper.embeddings
        return hits

    def _propose(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """Candidate ids (Q, shards × k), −1 where a shard had fewer."""
        found = []
        for index, offset in zip(self._indexes, self._offsets, strict=False):
            _, ids = index.search(queries, min(k, index.ntotal) or 1)
            found.append(np.where(ids < 0, -1, ids + offset))
        ids = np.concatenate(found, axis=1)
        return np.pad(ids, ((0, 0), (0, max(0, k - ids.shape[1]))), constant_values=-1)

    def _rerank(
        self, queries: NDArray[np.float32], candidates: NDArray[np.int64], exclude: NDArray[np.int64] | None
    ) -> tuple[Hits, NDArray[np.int64]]:
        """All candidates (Q, C) in exact order, and how many of each query's were excluded."""
        rows = self.rows(np.maximum(candidates, 0))
        scores = np.einsum("qd,qkd->qk", queries, rows, dtype=np.float32)
        hidden = absent = candidates < 0
        if exclude is not None:
            hidden = absent | (rows == self.rows(exclude)[:, None]).all(axis=2) | (candidates == exclude[:, None])
        scores[hidden] = -np.inf
        order = np.lexsort((candidates, -scores), axis=1)  # ties go to the lower id, so results are reproducible
        pick = np.arange(len(queries))[:, None], order
        ids = np.where(hidden[pick], -1, candidates[pick])
        hits = Hits(scores=scores[pick], ids=ids, embeddings=rows[pick].astype(np.float32))
        return hits, (hidden & ~absent).sum(axis=1)


def _open_index(path: Path, nprobe: int) -> Any:
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ModelError(f"{path} is no readable FAISS index; rebuild the database") from error
    cells = faiss.try_extract_index_ivf(index)
    if cells is not None:
        cells.nprobe = nprobe
    return index
