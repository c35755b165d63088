"""Neighbours: for every picture of a training set, its k nearest rows of a database, itself left out."""

from pathlib import Path

import faiss
import numpy as np

from infra import artifacts, compute, storage
from infra.errors import InputError
from tasks.references.database import open_database
from tasks.references.lineage import takedown_of
from tasks.references.rows import finite_rows
from tasks.references.types import DatabaseVersion, EmbeddingShards, Neighbours, StageResult, require_same_encoder
from tasks.stage import run_shards, run_stage, stage_task
from tasks.upkeep.takedown import Entries, inherited_takedown, match_shards, read_entries

_SEARCH_ROWS = 1024


@stage_task(name="neighbours")
def find_neighbours(
    embeddings: EmbeddingShards, database: DatabaseVersion, base: str, k: int, *, cache: Path
) -> StageResult[Neighbours]:
    """The ``k`` nearest database rows of each row of ``embeddings`` into ``base/neighbours/<key>``.

    A row's own entry and exact copies of it are excluded, wherever the database has them from (these embeddings, an
    earlier version, a union, a part): in training, a picture must not be handed to the network as its own neighbour.

    Raises:
        EncoderMismatchError: the two were made by different encoders.
        InputError: the database has too few rows for ``k``, or pictures of its own that were taken down.
    """
    own = database.manifest().inputs["embeddings"]["digest"] == embeddings.digest
    if own and (gone := _taken_down(database, embeddings, cache)):
        raise InputError(
            f"{gone} pictures of {database.uri} were taken down and are still among those to train on; compact the "
            "domain's champion first (rebuild-index --compact), and train on that"
        )
    inputs = {"embeddings": embeddings.as_input(), "database": database.as_input()}
    stage = artifacts.ArtifactBuilder(
        base, Neighbours.kind, inputs=inputs, config={"k": k, "excluded": "itself and exact copies"}
    )

    def make() -> artifacts.Manifest:
        source, target = embeddings.manifest(), database.manifest()
        require_same_encoder(embeddings=source, database=target)
        visible = target.rows - target.info["hidden"]
        if k > visible - own:
            raise InputError(
                f"{k} neighbours are asked of {database.uri}, which has {visible} rows"
                f"{', the picture itself among them' if own else ''}; lower k or add images"
            )
        offset, items = 0, []
        for shard in source.shards:
            items.append((shard.name, (shard, offset if own else None)))
            offset += shard.rows
        settings = (embeddings.uri, database, stage.uri, k, cache)
        done, _ = run_shards(stage, items, _Search, settings, actors=compute.cpus())
        return stage.commit(done, identity=source.identity, info={})

    return run_stage(stage, Neighbours, make, note=lambda manifest: f"k = {k}", repairs=True)


def _taken_down(database: DatabaseVersion, embeddings: EmbeddingShards, cache: Path) -> int:
    """How many rows are of pictures that its domain has taken down, since that version was made perhaps."""
    known, listed = takedown_of(database), inherited_takedown(database, cache)
    if listed == (Entries() if known is None else read_entries(known, cache)):
        return int(database.manifest().info["taken_down"])
    return sum(int(mask.sum()) for mask in match_shards(listed, embeddings, embeddings.manifest().shards, cache))


class _Search:
    """The open database on a worker."""

    def __init__(self, embeddings_uri: str, database: DatabaseVersion, folder_uri: str, k: int, cache: Path) -> None:
        self._embeddings_uri, self._folder_uri, self._k, self._cache = embeddings_uri, folder_uri, k, cache
        self._database = open_database(database, cache)
        faiss.omp_set_num_threads(1)  # a worker a core: re-ranking then runs beside another's search

    def __call__(self, item: tuple[str, tuple[artifacts.Shard, int | None]]) -> artifacts.Shard:
        name, (shard, offset) = item
        rows = finite_rows(self._embeddings_uri, shard, self._cache)
        found = np.empty((len(rows), self._k), dtype=np.int64)
        for start in range(0, len(rows), _SEARCH_ROWS):
            stop = min(start + _SEARCH_ROWS, len(rows))
            itself = None if offset is None else np.arange(start, stop, dtype=np.int64) + offset
            ids = self._database.nearest(rows[start:stop], self._k, exclude=itself, excluded=rows[start:stop]).ids
            if ids.shape[1] < self._k or (ids < 0).any():
                raise InputError(f"shard {name}: too many exact copies in the database for k = {self._k}; lower k")
            found[start:stop] = ids
        with storage.scratch() as folder:
            np.save(folder / f"{name}.npy", found)
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=len(rows), info={})
