"""Distribute: a database larger than one machine, on Ray actors, behind the interface of one that is not.

Every actor opens neighbouring index shards as a database of its own; all are asked at once, and the best of their
answers are the answer. A machine holds what its actors were given, and fetches nothing else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, compute
from infra.errors import InputError
from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.retrieval.arguments import checked_count, checked_exclusion, checked_ids, checked_queries, checked_rows
from model.retrieval.database import Hits, NearestIds, Searchable
from tasks.references.database import Metadata, index_shards, open_part
from tasks.references.lineage import embeddings_of
from tasks.references.types import DatabaseVersion, domain_of, encoder_of


@contextmanager
def distributed_database(
    version: DatabaseVersion, cache: Path, *, actors: int, cpus_each: float = 1
) -> Iterator["DistributedDatabase"]:
    """Open a version on ``actors`` workers, at most one for each index shard, inside of :func:`compute.cluster`.

    Raises:
        InputError: fewer than one actor.
        StageError: the cluster has no room for so many.
    """
    if actors < 1:
        raise InputError(f"{actors} actors cannot hold a database; give at least 1")
    parts = _balanced(index_shards(version), actors)
    with compute.actor_group(_Part, [(version, part, cache) for part in parts], cpus_each=cpus_each) as placed:
        yield DistributedDatabase(version, parts, placed, cache)


class DistributedDatabase(Searchable):
    """A database on actors: what a pipeline, and anyone who searches, needs of one."""

    def __init__(
        self,
        version: DatabaseVersion,
        parts: Sequence[Sequence[artifacts.Shard]],
        placed: compute.ActorGroup,
        cache: Path,
    ) -> None:
        """Ask ``placed`` workers, which hold ``parts`` in row order."""
        manifest, embeddings = version.manifest(), embeddings_of(version)
        self.name = domain_of(version)
        self.encoder: EncoderIdentity = encoder_of(manifest)
        self._placed, self._rows = placed, manifest.rows - int(manifest.info["hidden"])
        if self._rows < 1:
            raise ModelError(f"database {self.name} is empty: every row of {version.uri} is hidden")
        self._starts = np.cumsum([0, *(sum(shard.rows for shard in part) for part in parts)])
        self._describe = Metadata(embeddings.uri, embeddings.manifest(), cache)

    def __len__(self) -> int:
        """Rows that a search may return."""
        return self._rows

    @property
    def stored(self) -> int:
        """Rows over all actors, hidden ones included; ids are below it."""
        return int(self._starts[-1])

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """The ``k`` nearest rows of each query; see :meth:`model.retrieval.database.Database.search`."""
        k, queries, own = checked_count(k), checked_queries(queries, self.name, self.encoder), None
        width = max(1, min(k, len(self) - (exclude is not None)))
        if exclude is not None:
            own = self.rows(checked_exclusion(exclude, len(queries), self.stored, self.name))
        answers: list[Hits] = self._placed.ask(("search", (queries, width, own)))
        shifted = [
            np.where(hits.ids < 0, -1, hits.ids + first) for hits, first in zip(answers, self._starts[:-1], strict=True)
        ]
        scores, ids = np.concatenate([hits.scores for hits in answers], axis=1), np.concatenate(shifted, axis=1)
        order = np.lexsort((ids, -scores), axis=1)[:, :width]
        pick = np.arange(len(ids))[:, None], order
        embeddings = np.concatenate([hits.embeddings for hits in answers], axis=1)
        return Hits(scores=scores[pick], ids=ids[pick], embeddings=embeddings[pick])

    def nearest(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> NearestIds:
        """What :meth:`search` finds, without the rows."""
        found = self.search(queries, k, exclude=exclude)
        return NearestIds(scores=found.scores, ids=found.ids)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Stored rows (*ids.shape, D) float16 of global ids, each asked of the actor that holds it."""
        flat = checked_ids(ids, self.stored, self.name).reshape(-1)
        holder = np.searchsorted(self._starts, flat, side="right") - 1
        found = np.empty((len(flat), self.encoder.dimension), dtype=np.float16)
        for number in np.unique(holder):
            here = holder == number
            (found[here],) = self._placed.ask(("rows", (flat[here] - self._starts[number],)), of=int(number))
        return found.reshape(*np.shape(ids), -1)

    def describe(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """What is known of rows (key, url, …); see :meth:`model.retrieval.database.Database.describe`."""
        rows = checked_rows(ids, self.stored, self.name)
        return [{"id": row, **known} for row, known in zip(rows, self._describe(rows), strict=True)]


class _Part:
    """Neighbouring index shards, open on a worker."""

    def __init__(self, version: DatabaseVersion, part: Sequence[artifacts.Shard], cache: Path) -> None:
        self._database, _ = open_part(version, part, cache)

    def __call__(self, item: tuple[str, tuple[Any, ...]]) -> Any:
        what, arguments = item
        return self._database.search_without(*arguments) if what == "search" else self._database.rows(*arguments)


def _balanced(shards: Sequence[artifacts.Shard], actors: int) -> list[list[artifacts.Shard]]:
    """Neighbouring shards in at most ``actors`` parts of about equally many rows."""
    total, held = sum(shard.rows for shard in shards), 0
    parts: list[list[artifacts.Shard]] = []
    for shard in shards:
        if not parts or held >= total * len(parts) / min(actors, len(shards)):
            parts.append([shard])
        else:
            parts[-1].append(shard)
        held += shard.rows
    return parts
