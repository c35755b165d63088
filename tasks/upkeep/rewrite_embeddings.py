"""Rewriting of embedding shards with a part of their rows, shared by compaction and subsets."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, storage
from infra.formats import tables
from tasks.references.rows import PART, stored_rows
from tasks.references.types import METADATA_SCHEMA

Rewriting = tuple[artifacts.Shard, NDArray[np.bool_], str]
"""An embedding shard, a mask of the rows to keep, and the digest of the tar that contains their images."""


class KeepRows:
    """Worker that copies selected rows of an embedding shard."""

    def __init__(self, source_uri: str, folder_uri: str, cache: Path, part: bool = False) -> None:
        """Read shards from ``source_uri`` and write to ``folder_uri``; with ``part``, mark them as :data:`PART`."""
        self._source_uri, self._folder_uri, self._cache = source_uri, folder_uri, cache
        self._mark = {PART: True} if part else {}

    def __call__(self, item: tuple[str, Rewriting]) -> artifacts.Shard:
        """Write the selected rows as a shard of the same name."""
        name, (shard, kept, tar_digest) = item
        rows = stored_rows(self._source_uri, shard, self._cache)[kept]
        table = artifacts.fetch_shard(self._source_uri, shard, ".parquet", self._cache)
        rows_metadata = tables.read_table(table).filter(kept).to_pylist()
        metadata = [{**row, "row": number} for number, row in enumerate(rows_metadata)]
        outcomes = {**shard.info["outcomes"], "success": len(rows)}
        with storage.scratch() as folder:
            (folder / "img_emb").mkdir()
            np.save(folder / "img_emb" / f"img_emb_{name}.npy", rows)
            tables.write_table(metadata, METADATA_SCHEMA, folder / "metadata" / f"metadata_{name}.parquet")
            info = {**shard.info, "outcomes": outcomes, "source": tar_digest, **self._mark}
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=len(rows), info=info)
