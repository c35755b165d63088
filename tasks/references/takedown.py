"""Entries of a takedown: what a domain may never show again, and the rows that they match.

An entry names an image by url, sha256 (of the bytes as downloaded) or key. An entry for a URL matches every spelling
of it. Takedowns are cumulative: an artifact contains its own entries and all earlier ones.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra import artifacts, storage
from infra.errors import InputError, KNNDiffusionError
from infra.formats import tables
from infra.formats.lists import read_list
from infra.formats.urls import normal_urls
from infra.uris import normal_url
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import takedown_of
from tasks.references.types import DatabaseVersion, EmbeddingShards, ImageShards, Takedown

COLUMNS = ("url", "sha256", "key")
_SHA256_DIGITS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Entries:
    """Takedown entries by column. URLs are kept in their normal form (:func:`infra.uris.normal_url`)."""

    url: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()
    key: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Normalise the URLs: lists and artifacts of earlier releases may spell them in other ways."""
        object.__setattr__(self, "url", frozenset(map(normal_url, self.url)))

    def __or__(self, other: "Entries") -> "Entries":
        return Entries(*(getattr(self, name) | getattr(other, name) for name in COLUMNS))

    def __sub__(self, other: "Entries") -> "Entries":
        return Entries(*(getattr(self, name) - getattr(other, name) for name in COLUMNS))

    def __len__(self) -> int:
        return sum(len(getattr(self, name)) for name in COLUMNS)

    def listed(self) -> list[dict[str, str]]:
        """Return every entry as {column, value}, sorted."""
        return [{"column": name, "value": value} for name in COLUMNS for value in sorted(getattr(self, name))]


class Matcher:
    """Entries prepared for matching against many tables."""

    def __init__(self, entries: Entries) -> None:
        """Convert the entries to Arrow value sets."""
        self._sets = {
            name: pc.SetLookupOptions(pa.array(sorted(values), pa.string()))
            for name in COLUMNS
            if (values := getattr(entries, name))
        }

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """Return a mask (n,) of the rows of ``table`` that any entry matches, by the columns that the table has."""
        mask = np.zeros(table.num_rows, dtype=np.bool_)
        for name in self._sets.keys() & set(table.column_names):
            column = normal_urls(table[name]) if name == "url" else table[name]
            mask |= pc.is_in(column, options=self._sets[name]).to_numpy(zero_copy_only=False)
        return mask


def read_entries(takedown: Takedown, cache: Path) -> Entries:
    """Read the entries of a takedown artifact."""
    (shard,) = takedown.manifest().shards
    rows = tables.read_table(artifacts.fetch_shard(takedown.uri, shard, ".parquet", cache)).to_pylist()
    return Entries(*(frozenset(row["value"] for row in rows if row["column"] == name) for name in COLUMNS))


def all_takedown_entries(folder: DomainFolder, confined_to: str | None = None) -> Entries:
    """Read everything ever taken down in the domain with this folder, independent of registry and versions.

    Raises:
        IntegrityError: a takedown is damaged, so its entries are unknown.
    """
    merged, uris = Entries(), list_takedowns(folder)
    try:
        for entries in storage.read_all(
            lambda uri: read_entries(Takedown.open(uri, confined_to=confined_to), folder.cache), uris
        ):
            merged |= entries
    except KNNDiffusionError:
        if list_takedowns(folder) == uris:
            raise
        return all_takedown_entries(folder, confined_to)  # garbage collection has just removed a redundant one
    return merged


def list_takedowns(folder: DomainFolder) -> list[str]:
    """Return the folder of every committed takedown of a domain."""
    found = [
        storage.join(folder.uri, Takedown.kind, name)
        for name in storage.list_names(storage.join(folder.uri, Takedown.kind))
    ]
    return [uri for uri in found if storage.exists(storage.join(uri, artifacts.MANIFEST))]


def inherited_takedown(version: DatabaseVersion, cache: Path) -> Entries:
    """Return the entries that a database derived from ``version`` inherits: all takedowns of its domain."""
    uri, kind, _ = storage.join(version.uri).rsplit("/", 2)
    own = takedown_of(version)
    entries = Entries() if own is None else read_entries(own, cache)
    if kind != DatabaseVersion.kind:
        return entries
    return entries | all_takedown_entries(DomainFolder(uri=uri, cache=cache), version.confined_to)


def match_rows(takedown: Takedown, embeddings: EmbeddingShards, cache: Path) -> NDArray[np.int64]:
    """Return the row ids (n,) of ``embeddings`` that ``takedown`` matches, ascending."""
    masks = match_shards(read_entries(takedown, cache), embeddings, embeddings.manifest().shards, cache)
    return np.flatnonzero(np.concatenate(masks)) if masks else np.empty(0, dtype=np.int64)


def match_shards(
    entries: Entries, source: EmbeddingShards | ImageShards, of: Iterable[artifacts.Shard], cache: Path
) -> list[NDArray[np.bool_]]:
    """Return, for each shard in ``of``, a mask of the rows of its parquet that ``entries`` match."""
    matcher = Matcher(entries)

    def mask(shard: artifacts.Shard) -> NDArray[np.bool_]:
        path = artifacts.fetch_shard(source.uri, shard, ".parquet", cache)
        return matcher.mask(tables.read_table(path, list(COLUMNS)))

    return storage.read_all(mask, of)


def read_takedown_list(uri: str) -> Entries:
    """Read a takedown list, in any format of URL lists, with one or more of the columns url, sha256 and key.

    Raises:
        NotFoundError: the list does not exist.
        InputError: the list cannot be read or has no entries.
    """
    table = read_list(uri, "takedown")
    if not set(COLUMNS) & set(table.column_names):
        raise InputError(
            f"{uri} has none of the columns url, sha256 and key: {', '.join(table.column_names) or 'no columns'}; "
            "rename the column that identifies images"
        )
    values = {
        name: frozenset(text.strip() for text in table[name].to_pylist() if text and text.strip())
        for name in set(COLUMNS) & set(table.column_names)
    }
    digests = frozenset(digest.lower() for digest in values.get("sha256", ()))
    if wrong := [d for d in sorted(digests) if len(d) != _SHA256_DIGITS or set(d) - set("0123456789abcdef")]:
        raise InputError(f"{uri} has an invalid sha256: {wrong[0]!r}; use {_SHA256_DIGITS} hex digits")
    entries = Entries(**{**values, "sha256": digests})
    if not len(entries):
        raise InputError(f"takedown list {uri} has no entries; add at least one")
    return entries
