"""Opening database versions: verify the committed files, memory-map them, and search all shards as one database."""

import bisect
import itertools
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra import artifacts
from infra.errors import IntegrityError
from infra.formats import tables
from infra.formats.arrays import read_array
from infra.progress import ProgressBar
from model.retrieval.database import Database, ShardFiles
from model.retrieval.ranked_search import SearchEffort
from tasks.references.lineage import embeddings_of
from tasks.references.types import DatabaseVersion, EmbeddingShards, domain_of, encoder_of

QUANTIZER = "quantizer"
"""Pseudo-shard with the trained, empty index, the template of all other index shards."""
HIDDEN = "rows-hidden"
"""Pseudo-shard of rows that are never returned: ``taken.npy``, ``pairs.npy`` of near-duplicates, ``hidden.npy``."""
TRUTH = "rows-true"
"""Pseudo-shard of held-out queries and their true neighbours: ``image.npz`` and ``text.npz``."""
_COLUMNS = ["key", "url", "sha256", "width", "height"]
_SHOWN_AFTER_S = 1.0  # a local database opens sooner; files of a remote one are downloaded
_MAX_CACHED_TABLES = 32  # at most about 2 MB each; caching all tables would take 1 GB per million rows


def open_database(version: DatabaseVersion, cache: Path, *, name: str | None = None) -> Database:
    """Open a version for searching: verify every file against its digest, then memory-map it.

    Raises:
        IntegrityError: an index or embedding file differs from the committed one.
    """
    return open_part(version, index_shards(version), cache, name=name)[0]


def index_shards(version: DatabaseVersion) -> list[artifacts.Shard]:
    """Return the shards of a version that index rows, in row order."""
    return [shard for shard in version.manifest().shards if "members" in shard.info]


def open_part(
    version: DatabaseVersion, part: Sequence[artifacts.Shard], cache: Path, *, name: str | None = None
) -> tuple[Database, int]:
    """Open consecutive index shards of a version as a separate database.

    Returns:
        The database, and the id in the whole version of its first row.

    Raises:
        IntegrityError: a file differs from the committed one, a shard is missing, or the release is too old.
    """
    manifest, embeddings = version.manifest(), embeddings_of(version)
    if "effort" not in manifest.info or not part:
        raise IntegrityError(f"{version.uri} was indexed by an earlier release; index it again (new-domain)")
    special = {shard.name: shard for shard in manifest.shards if shard.name in (QUANTIZER, HIDDEN)}
    before = itertools.takewhile(lambda shard: shard.name != part[0].name, index_shards(version))
    first = sum(shard.rows for shard in before)
    if absent := {QUANTIZER, HIDDEN} - special.keys():
        raise IntegrityError(f"{version.uri} lacks the shard {min(absent)}; build it again")
    hidden = hidden_ids(version.uri, special[HIDDEN], cache) - first
    database = open_shards(
        version.uri,
        [special[QUANTIZER], *part],
        embeddings,
        cache,
        name=name or domain_of(version),
        effort=SearchEffort(**manifest.info["effort"]),
        hidden=hidden[(hidden >= 0) & (hidden < sum(shard.rows for shard in part))],
    )
    return database, first


def open_shards(
    uri: str,
    indexed: Sequence[artifacts.Shard],
    embeddings: EmbeddingShards,
    cache: Path,
    *,
    name: str,
    effort: SearchEffort,
    hidden: NDArray[np.int64] | None = None,
    rows_at_once: bool = True,
) -> Database:
    """Open index shards over the embedding shards that they index.

    Args:
        uri: Folder of the index shards, which may not be committed as a version yet.
        indexed: Index shards and the pseudo-shard ``QUANTIZER``.
        embeddings: Embedding shards that the index shards refer to.
        cache: Local cache folder.
        name: Name of the database.
        effort: Search settings.
        hidden: Ids of the rows that are never returned.
        rows_at_once: Fetch and verify all embeddings now. Otherwise each file is fetched when one of its rows is first
            needed, so that a job that reads only new rows does not fetch old ones.

    Raises:
        IntegrityError: a file differs from the committed one, or an indexed embedding shard is missing.
    """
    source = embeddings.manifest()
    rows = {shard.name: shard for shard in source.shards}
    files, quantizer = [], None
    for shard in ProgressBar(indexed, desc=f"open {name}", unit="shard", leave=False, delay=_SHOWN_AFTER_S):
        if shard.name == QUANTIZER:
            quantizer = artifacts.fetch_shard(uri, shard, ".faiss", cache)
        elif "members" in shard.info:
            absent = [member for member in shard.info["members"] if member not in rows]
            if absent:
                raise IntegrityError(f"{embeddings.uri} lacks shard {absent[0]}, which {uri} indexes; build it again")
            members = [rows[member] for member in shard.info["members"]]
            fetches = tuple(partial(artifacts.fetch_shard, embeddings.uri, one, ".npy", cache) for one in members)
            files.append(
                ShardFiles(
                    index=artifacts.fetch_shard(uri, shard, ".faiss", cache),
                    embeddings=tuple(fetch() for fetch in fetches) if rows_at_once else fetches,
                    ordinal=shard.info["ordinal"],
                    rows=tuple(one.rows for one in members),
                )
            )
    return Database(
        files,
        encoder=encoder_of(source),
        name=name,
        quantizer=quantizer,
        effort=effort,
        hidden=hidden,
        describe=Metadata(embeddings.uri, source, cache),
    )


def hidden_ids(uri: str, shard: artifacts.Shard, cache: Path) -> NDArray[np.int64]:
    """Return the ids of the rows that the version at ``uri`` never returns, from its pseudo-shard ``HIDDEN``."""
    return read_array(artifacts.fetch_shard(uri, shard, "hidden.npy", cache), np.int64, (None,))


class Metadata:
    """Metadata of global rows. Reads a shard's Parquet file on demand and caches the Arrow tables of a few shards.

    Thread-safe.
    """

    def __init__(
        self,
        uri: str,
        manifest: artifacts.Manifest,
        cache: Path,
        *,
        columns: Sequence[str] = tuple(_COLUMNS),
        kept: int | None = None,
    ) -> None:
        """Look up ``columns`` of rows of the embedding shards at ``uri``.

        The tables of the last ``kept`` shards are cached, by default 32.
        """
        self._shards = manifest.shards
        self._offsets = [0, *itertools.accumulate(shard.rows for shard in manifest.shards)]
        # Not a bound method: the reference cycle would keep the tables after their last use.
        read = partial(_read_metadata, uri, manifest.shards, cache, list(columns))
        self._table = lru_cache(kept or _MAX_CACHED_TABLES)(read)

    def __call__(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the columns of each row: by default key, url, sha256, width and height."""
        places: dict[int, list[int]] = {}
        for place, row in enumerate(ids):
            places.setdefault(self._number(row), []).append(place)
        found: list[dict[str, Any]] = [{}] * len(ids)
        for number, here in places.items():
            rows = self._table(number).take([int(ids[place]) - self._offsets[number] for place in here])
            for place, record in zip(here, rows.to_pylist(), strict=True):
                found[place] = record
        return found

    def shard(self, row: int) -> str:
        """Return the name of the shard that contains ``row``."""
        return self._shards[self._number(row)].name

    def _number(self, row: int) -> int:
        return bisect.bisect_right(self._offsets, row) - 1


def _read_metadata(
    uri: str, shards: Sequence[artifacts.Shard], cache: Path, columns: list[str], number: int
) -> pa.Table:
    shard = shards[number]
    path = artifacts.fetch_shard(uri, shard, ".parquet", cache)
    table = tables.read_table(path, columns)
    if table.num_rows != shard.rows:
        raise IntegrityError(
            f"{path} has {table.num_rows} rows, but shard {shard.name} of {uri} has {shard.rows}; "
            "embed the images again"
        )
    return table
