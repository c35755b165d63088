"""Hide: the rows of a database that no search returns, because they were taken down or nearly repeat an earlier row."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, compute, storage
from infra.compute.actor_pool import FailedShard
from infra.errors import StageError
from infra.formats.arrays import read_array
from model.retrieval.database import SearchEffort
from model.retrieval.near_duplicates import duplicates_to_hide, find_pairs
from tasks.references.database import HIDDEN, open_shards
from tasks.references.rows import stored_rows
from tasks.references.types import DatabaseVersion, EmbeddingShards, Takedown
from tasks.upkeep.takedown import match_rows, match_shards, read_entries

_FEW_SHARDS = 16  # embedding shards; starting actors for so few takes longer than the search
_GROUP_ROWS = 262_144
_EFFORT = SearchEffort(nprobe=4, candidates=50)  # near-duplicates share a cell, or lie in the next


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaseVersion:
    """A version to which rows were only added: what was found out about its rows still holds."""

    version: DatabaseVersion
    shards: int  # embedding shards
    rows: int

    def array(self, name: str, cache: Path) -> NDArray[np.int64]:
        """One of its files of hidden rows."""
        (shard,) = (shard for shard in self.version.manifest().shards if shard.name == HIDDEN)
        shape = (None, 2) if name == "pairs.npy" else (None,)
        return read_array(artifacts.fetch_shard(self.version.uri, shard, name, cache), np.int64, shape)


def find_hidden_rows(
    folder_uri: str,
    indexed: Sequence[artifacts.Shard],
    embeddings: EmbeddingShards,
    cache: Path,
    *,
    takedown: Takedown | None,
    bound: float,
    dedup: bool,
    grown: BaseVersion | None,
) -> artifacts.Shard:
    """Find rows to hide among those of index shards that are not committed as a version yet, and commit them.

    Near-duplicates (cosine at least ``bound``) among rows that are not taken down are counted, and hidden when
    ``dedup`` asks for it. What ``grown`` knows is taken over (of pairs only those of the same ``bound``), so that only
    new rows are searched.
    """
    taken = _taken_down(embeddings, cache, takedown, grown)
    pairs: list[NDArray[np.int64]] = []
    first, items, known = 0, [], 0
    if grown is not None and grown.version.manifest().config["near_duplicate_cosine"] == bound:
        pairs, known = [grown.array("pairs.npy", cache)], grown.shards
    for number, shard in enumerate(embeddings.manifest().shards):
        if number >= known:
            items.append((shard, first))
        first += shard.rows
    if bound < 1:
        pairs += _search_pairs((folder_uri, list(indexed), embeddings, cache, bound), items)
    joined = np.unique(np.concatenate([np.zeros((0, 2), np.int64), *pairs]), axis=0)
    # What repeats only what is taken down is shown in its place.
    repeated = duplicates_to_hide(joined[~np.isin(joined, taken).any(axis=1)])
    hidden = np.union1d(taken, repeated) if dedup else taken
    info = {"taken_down": len(taken), "near_duplicates": len(repeated), "hidden": len(hidden)}
    with storage.scratch() as folder:
        for name, values in {"taken": taken, "pairs": joined, "hidden": hidden}.items():
            np.save(folder / f"{name}.npy", values)
        return artifacts.commit_shard(folder_uri, HIDDEN, folder, rows=0, info=info)


def _taken_down(
    embeddings: EmbeddingShards, cache: Path, takedown: Takedown | None, grown: BaseVersion | None
) -> NDArray[np.int64]:
    if takedown is None:
        return np.zeros(0, np.int64)
    before = None if grown is None else grown.version.manifest().inputs.get("takedown")
    if grown is None or before is None or before["digest"] != takedown.digest:
        return match_rows(takedown, embeddings, cache)
    masks = match_shards(read_entries(takedown, cache), embeddings, embeddings.manifest().shards[grown.shards :], cache)
    new = np.flatnonzero(np.concatenate(masks)) + grown.rows if masks else np.zeros(0, np.int64)
    return np.concatenate([grown.array("taken.npy", cache), new])


def _search_pairs(settings: tuple[Any, ...], items: list[tuple[artifacts.Shard, int]]) -> list[NDArray[np.int64]]:
    """The pairs of every item: few in one task, many over actors."""
    if not items:
        return []
    if len(items) <= _FEW_SHARDS:
        return list(compute.run(_search_few, settings, _grouped(items, _GROUP_ROWS), cpus=compute.cpus()))
    actors = compute.cpus()
    share = sum(shard.rows for shard, _ in items) // actors + 1
    groups = _grouped(items, min(_GROUP_ROWS, share))
    found = list(compute.map_shards(_Pairs, settings, groups, actors=actors, description="near-duplicates"))
    for lost in found:
        if isinstance(lost, FailedShard):
            raise StageError(f"near-duplicates could not be looked for ({lost.error}); run again") from lost.error
    return found


def _grouped(items: list[tuple[artifacts.Shard, int]], most: int) -> list[list[tuple[artifacts.Shard, int]]]:
    """Neighbouring shards of ``most`` rows together, if one has no more: many rows are looked for sooner at once."""
    groups: list[list[tuple[artifacts.Shard, int]]] = []
    rows = 0
    for shard, first in items:
        if not groups or rows + shard.rows > most:
            groups.append([])
            rows = 0
        groups[-1].append((shard, first))
        rows += shard.rows
    return groups


def _search_few(settings: tuple[Any, ...], groups: list[list[tuple[artifacts.Shard, int]]]) -> list[NDArray[np.int64]]:
    worker = _Pairs(*settings)
    return [worker(group) for group in groups]


class _Pairs:
    """The near-duplicates of neighbouring shards' rows, on a worker."""

    def __init__(
        self, uri: str, indexed: Sequence[Any], embeddings: EmbeddingShards, cache: Path, bound: float
    ) -> None:
        self._database = open_shards(
            uri, indexed, embeddings, cache, name="duplicates", effort=_EFFORT, rows_at_once=False
        )
        self._embeddings, self._cache, self._bound = embeddings, cache, bound

    def __call__(self, item: list[tuple[artifacts.Shard, int]]) -> NDArray[np.int64]:
        rows = np.concatenate([stored_rows(self._embeddings.uri, shard, self._cache) for shard, _ in item])
        return find_pairs(self._database, rows, item[0][1], self._bound)
