"""Neighbours stage: the k nearest database rows of every training image, excluding the image itself."""

from pathlib import Path

import faiss
import numpy as np

from infra import artifacts, compute, storage
from infra.errors import InputError
from tasks.references.database import open_database
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import takedown_of
from tasks.references.rows import finite_rows
from tasks.references.takedown import Entries, inherited_takedown, match_shards, read_entries
from tasks.references.types import DatabaseVersion, EmbeddingShards, Neighbours, StageResult, require_same_encoder
from tasks.stage import run_shards, run_stage, stage_task

_SEARCH_ROWS = 1024


@stage_task(name="neighbours")
def find_neighbours(
    embeddings: EmbeddingShards, database: DatabaseVersion, folder: DomainFolder, k: int
) -> StageResult[Neighbours]:
    """Find the ``k`` nearest database rows of each row of ``embeddings``; store them in ``<folder>/neighbours/<key>``.

    The row itself and exact copies of it are excluded, even if they came into the database by an earlier version, a
    union or a subset. In training, an image must not be given to the network as its own neighbour.

    Args:
        embeddings: Rows to find the neighbours of.
        database: Database to search.
        folder: Folder of the domain.
        k: Number of neighbours.

    Raises:
        EncoderMismatchError: ``embeddings`` and ``database`` were made by different encoders.
        InputError: The database has too few rows for ``k``, or ``embeddings`` contains images that were taken down.
    """
    is_own = database.manifest().inputs["embeddings"]["digest"] == embeddings.digest
    if is_own and (count := _count_taken_down(database, embeddings, folder.cache)):
        raise InputError(
            f"the training set contains images that were taken down: {count} of {database.uri}; compact the domain's "
            "champion first (rebuild-index --compact) and train on the result"
        )
    inputs = {"embeddings": embeddings.as_input(), "database": database.as_input()}
    stage = artifacts.ArtifactBuilder(
        folder.uri, Neighbours.kind, inputs=inputs, config={"k": k, "excluded": "itself and exact copies"}
    )

    def make() -> artifacts.Manifest:
        source, target = embeddings.manifest(), database.manifest()
        require_same_encoder(embeddings=source, database=target)
        visible = target.rows - target.info["hidden"]
        if k > visible - is_own:
            raise InputError(
                f"k = {k} is too large for {database.uri} with {visible} visible rows"
                f"{', which include the image itself' if is_own else ''}; lower k or add images"
            )
        offset, items = 0, []
        for shard in source.shards:
            items.append((shard.name, (shard, offset if is_own else None)))
            offset += shard.rows
        settings = (embeddings.uri, database, stage.uri, k, folder.cache)
        done, _ = run_shards(stage, items, _Search, settings, actors=compute.cpus())
        return stage.commit(done, identity=source.identity, info={})

    return run_stage(stage, Neighbours, make, note=lambda manifest: f"k = {k}", repairs=True)


def _count_taken_down(database: DatabaseVersion, embeddings: EmbeddingShards, cache: Path) -> int:
    """Count the rows whose images the domain has taken down, including takedowns after the version was made."""
    applied, current = takedown_of(database), inherited_takedown(database, cache)
    if current == (Entries() if applied is None else read_entries(applied, cache)):
        return int(database.manifest().info["taken_down"])
    return sum(int(mask.sum()) for mask in match_shards(current, embeddings, embeddings.manifest().shards, cache))


class _Search:
    """Worker that searches an open database."""

    def __init__(self, embeddings_uri: str, database: DatabaseVersion, folder_uri: str, k: int, cache: Path) -> None:
        self._embeddings_uri, self._folder_uri, self._k, self._cache = embeddings_uri, folder_uri, k, cache
        self._database = open_database(database, cache)
        faiss.omp_set_num_threads(1)  # one worker per core: one worker's re-ranking overlaps another's search

    def __call__(self, item: tuple[str, tuple[artifacts.Shard, int | None]]) -> artifacts.Shard:
        name, (shard, offset) = item
        rows = finite_rows(self._embeddings_uri, shard, self._cache)
        found = np.empty((len(rows), self._k), dtype=np.int64)
        for start in range(0, len(rows), _SEARCH_ROWS):
            stop = min(start + _SEARCH_ROWS, len(rows))
            own_ids = None if offset is None else np.arange(start, stop, dtype=np.int64) + offset
            ids = self._database.nearest(rows[start:stop], self._k, exclude=own_ids, excluded=rows[start:stop]).ids
            if ids.shape[1] < self._k or (ids < 0).any():
                raise InputError(
                    f"k is too large for shard {name}: {self._k}; lower it, because the database has too few rows that "
                    "are not exact copies of an image"
                )
            found[start:stop] = ids
        with storage.scratch() as folder:
            np.save(folder / f"{name}.npy", found)
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=len(rows), info={})
