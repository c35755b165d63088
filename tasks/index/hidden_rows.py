"""Hidden rows: rows that no search returns, because they were taken down or are near-duplicates of an earlier row."""

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
from model.retrieval.near_duplicates import duplicates_to_hide, find_pairs
from model.retrieval.ranked_search import SearchEffort
from tasks.references.database import HIDDEN, open_shards
from tasks.references.rows import stored_rows
from tasks.references.takedown import match_rows, match_shards, read_entries
from tasks.references.types import DatabaseVersion, EmbeddingShards, Takedown

_FEW_SHARDS = 16  # embedding shards; up to this many, starting actors takes longer than the search
_GROUP_ROWS = 262_144
_EFFORT = SearchEffort(nprobe=4, candidates=50)  # near-duplicates are in the same cell or in adjacent ones


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaseVersion:
    """Earlier version to which rows were only added, so that its results for the old rows remain valid."""

    version: DatabaseVersion
    shards: int  # embedding shards
    rows: int

    def array(self, name: str, cache: Path) -> NDArray[np.int64]:
        """Read ``name`` (``taken.npy``, ``pairs.npy`` or ``hidden.npy``) from the version's shard of hidden rows."""
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
    """Find the rows to hide in a version that is not committed yet, and commit them as a shard.

    Args:
        folder_uri: Folder of the version.
        indexed: Its shards of quantizer and index.
        embeddings: Its rows.
        cache: Folder for copies of remote files.
        takedown: Images to hide, or None.
        bound: Minimum cosine of near-duplicates, which are counted among the rows that are not taken down.
        dedup: Hide near-duplicates, too.
        grown: Earlier version whose results are reused, or None. Only new rows are then searched. Near-duplicates are
            reused only if ``bound`` has not changed.
    """
    taken = _find_taken_down(embeddings, cache, takedown, grown)
    pairs: list[NDArray[np.int64]] = []
    first, items, reused_shards = 0, [], 0
    if grown is not None and grown.version.manifest().config["near_duplicate_cosine"] == bound:
        pairs, reused_shards = [grown.array("pairs.npy", cache)], grown.shards
    for number, shard in enumerate(embeddings.manifest().shards):
        if number >= reused_shards:
            items.append((shard, first))
        first += shard.rows
    if bound < 1:
        pairs += _search_pairs((folder_uri, list(indexed), embeddings, cache, bound), items)
    all_pairs = np.unique(np.concatenate([np.zeros((0, 2), np.int64), *pairs]), axis=0)
    # A row whose only near-duplicates are taken down is not hidden.
    duplicates = duplicates_to_hide(all_pairs[~np.isin(all_pairs, taken).any(axis=1)])
    hidden = np.union1d(taken, duplicates) if dedup else taken
    info = {"taken_down": len(taken), "near_duplicates": len(duplicates), "hidden": len(hidden)}
    with storage.scratch() as folder:
        for name, values in {"taken": taken, "pairs": all_pairs, "hidden": hidden}.items():
            np.save(folder / f"{name}.npy", values)
        return artifacts.commit_shard(folder_uri, HIDDEN, folder, rows=0, info=info)


def _find_taken_down(
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
    """Find the near-duplicate pairs of every item: in one task for few items, with an actor pool for many."""
    if not items:
        return []
    if len(items) <= _FEW_SHARDS:
        return list(compute.run(_search_few, settings, _group_by_rows(items, _GROUP_ROWS), cpus=compute.cpus()))
    actors = compute.cpus()
    share = sum(shard.rows for shard, _ in items) // actors + 1
    groups = _group_by_rows(items, min(_GROUP_ROWS, share))
    found = list(compute.map_shards(_PairFinder, settings, groups, actors=actors, description="near-duplicates"))
    for failed in found:
        if isinstance(failed, FailedShard):
            raise StageError(f"the search for near-duplicates failed: {failed.error}; run again") from failed.error
    return found


def _group_by_rows(items: list[tuple[artifacts.Shard, int]], max_rows: int) -> list[list[tuple[artifacts.Shard, int]]]:
    """Group adjacent shards up to ``max_rows`` rows, since large batches are searched faster.

    A shard with more rows is a group of its own.
    """
    groups: list[list[tuple[artifacts.Shard, int]]] = []
    rows = 0
    for shard, first in items:
        if not groups or rows + shard.rows > max_rows:
            groups.append([])
            rows = 0
        groups[-1].append((shard, first))
        rows += shard.rows
    return groups


def _search_few(settings: tuple[Any, ...], groups: list[list[tuple[artifacts.Shard, int]]]) -> list[NDArray[np.int64]]:
    worker = _PairFinder(*settings)
    return [worker(group) for group in groups]


class _PairFinder:
    """Worker that finds the near-duplicates of the rows of adjacent shards."""

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
