"""Rewrite: embedding shards without some of their rows. What compaction and a subset share."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, storage
from infra.formats import tables
from tasks.references.rows import stored_rows
from tasks.references.types import METADATA_SCHEMA

PART = "part"
"""Noted of an embedding shard that leaves pictures of its tar out on purpose, as a subset's does."""
Rewriting = tuple[artifacts.Shard, NDArray[np.bool_], str]
"""An embedding shard, which of its rows stay, and the digest of the tar that these are the rows of."""


class KeepRows:
    """Some rows of an embedding shard, on a worker: copied, not computed."""

    def __init__(self, source_uri: str, folder_uri: str, cache: Path, part: bool = False) -> None:
        """Read the shards of ``source_uri``, write below ``folder_uri``; with ``part`` they are marked as such."""
        self._source_uri, self._folder_uri, self._cache = source_uri, folder_uri, cache
        self._mark = {PART: True} if part else {}

    def __call__(self, item: tuple[str, Rewriting]) -> artifacts.Shard:
        """Write the shard anew under its name."""
        name, (shard, stays, tar_digest) = item
        rows = stored_rows(self._source_uri, shard, self._cache)[stays]
        table = artifacts.fetch_shard(self._source_uri, shard, ".parquet", self._cache)
        known = tables.read_table(table).filter(stays).to_pylist()
        metadata = [{**row, "row": number} for number, row in enumerate(known)]
        outcomes = {**shard.info["outcomes"], "success": len(rows)}
        with storage.scratch() as folder:
            (folder / "img_emb").mkdir()
            np.save(folder / "img_emb" / f"img_emb_{name}.npy", rows)
            tables.write_table(metadata, METADATA_SCHEMA, folder / "metadata" / f"metadata_{name}.parquet")
            info = {**shard.info, "outcomes": outcomes, "source": tar_digest, **self._mark}
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=len(rows), info=info)
