"""Takedown: what a domain may never show again, and which rows of its database that is.

A list names pictures by url, sha256 (of the bytes as downloaded) or key, a picture by any of them. Lists add up: an
artifact holds its own entries and all that were there before. From the next index on the rows it names are hidden;
compaction (``tasks/upkeep/compact.py``) takes their bytes out of the shards.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra import artifacts, logs, storage, uris
from infra.errors import InputError, KNNDiffusionError
from infra.formats import tables
from tasks.references.lineage import takedown_of
from tasks.references.types import DatabaseVersion, EmbeddingShards, ImageShards, StageResult, Takedown
from tasks.references.url_history import FINAL_OUTCOMES
from tasks.stage import run_stage, stage_task

COLUMNS = ("url", "sha256", "key")
_SCHEMA = pa.schema([("column", pa.string()), ("value", pa.string())])
_NAMED_FIRST = 3  # entries that a message quotes
_SHA256_DIGITS = 64
_READERS = 8
_ASKED_COLUMNS = [*COLUMNS, "error_class"]


@dataclasses.dataclass(frozen=True, slots=True)
class Entries:
    """What is taken down, by the column that names it."""

    url: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()
    key: frozenset[str] = frozenset()

    def __or__(self, other: "Entries") -> "Entries":
        return Entries(*(getattr(self, name) | getattr(other, name) for name in COLUMNS))

    def __sub__(self, other: "Entries") -> "Entries":
        return Entries(*(getattr(self, name) - getattr(other, name) for name in COLUMNS))

    def __len__(self) -> int:
        return sum(len(getattr(self, name)) for name in COLUMNS)

    def listed(self) -> list[dict[str, str]]:
        """Every entry as {column, value}, sorted."""
        return [{"column": name, "value": value} for name in COLUMNS for value in sorted(getattr(self, name))]


class Matcher:
    """Entries prepared for comparing many tables with them."""

    def __init__(self, entries: Entries) -> None:
        """Keep the entries as Arrow value sets."""
        self._sets = {
            name: pc.SetLookupOptions(pa.array(sorted(values), pa.string()))
            for name in COLUMNS
            if (values := getattr(entries, name))
        }

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """(n,) which rows of ``table`` any entry names, by whichever of the columns it has."""
        named = np.zeros(table.num_rows, dtype=np.bool_)
        for name in self._sets.keys() & set(table.column_names):
            named |= pc.is_in(table[name], options=self._sets[name]).to_numpy(zero_copy_only=False)
        return named


@stage_task(name="takedown")
def take_down(
    listed: str, images: ImageShards, base: str, *, cache: Path, previous: Takedown | None = None
) -> StageResult[Takedown]:
    """Add what the list at ``listed`` names in ``images`` to ``previous``, into ``base/takedown/<key>``.

    A picture is its bytes: beside a url stands the sha256 of what it served, so that copies at other URLs go too, and
    a key is kept as that sha256 alone, since keys repeat once databases are merged. A url or sha256 that names no
    picture yet is refused when it comes.

    Raises:
        InputError: no entry names a picture, now or before, or a key is borne by more than one.
    """
    before = read_entries(previous, cache) if previous is not None else Entries()
    asked = read_takedown_list(listed)
    known = not asked.key and not len(asked - before)  # what a key names is looked up: it is kept as a sha256
    entries = before if known else before | _resolved(asked, before, images, cache, listed)
    if previous is not None and entries == before:
        return StageResult(reference=previous, skipped=True, seconds=0.0, note="nothing that was not taken down before")
    return commit_takedown(entries, base, info={"list": storage.absolute(uris.hide(listed))})


def commit_takedown(entries: Entries, base: str, *, info: Mapping[str, str]) -> StageResult[Takedown]:
    """Store ``entries``; the same entries find the same folder, however they came together."""
    stage = artifacts.ArtifactBuilder(
        base, Takedown.kind, inputs={}, config={"entries": artifacts.digest_of(entries.listed())}
    )

    def make() -> artifacts.Manifest:
        with storage.scratch() as folder:
            tables.write_table(entries.listed(), _SCHEMA, folder / "takedown.parquet")
            shard = artifacts.commit_shard(stage.uri, "00000", folder, rows=len(entries), info={})
        return stage.commit([shard], info=info)

    return run_stage(stage, Takedown, make)


def read_entries(takedown: Takedown, cache: Path) -> Entries:
    """What a takedown artifact holds."""
    (shard,) = takedown.manifest().shards
    rows = tables.read_table(artifacts.fetch_shard(takedown.uri, shard, ".parquet", cache)).to_pylist()
    return Entries(*(frozenset(row["value"] for row in rows if row["column"] == name) for name in COLUMNS))


def all_takedown_entries(base: str, cache: Path, confined_to: str | None = None) -> Entries:
    """What was ever taken down in the domain whose folder is ``base``, whatever its registry and versions say.

    Raises:
        IntegrityError: a list is damaged; nobody knows what it named.
    """
    together, uris = Entries(), list_takedowns(base)
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            for entries in pool.map(lambda uri: read_entries(Takedown.open(uri, confined_to=confined_to), cache), uris):
                together |= entries
    except KNNDiffusionError:
        if list_takedowns(base) == uris:
            raise
        return all_takedown_entries(base, cache, confined_to)  # one that a wider one holds was collected meanwhile
    return together


def list_takedowns(base: str) -> list[str]:
    """The folder of every committed takedown of a domain."""
    folders = [
        storage.join(base, Takedown.kind, name) for name in storage.list_names(storage.join(base, Takedown.kind))
    ]
    return [folder for folder in folders if storage.exists(storage.join(folder, artifacts.MANIFEST))]


@contextlib.contextmanager
def rolled_back_on(
    base: str, when: type[Exception] | tuple[type[Exception], ...], *, but: Callable[[], Takedown | None] = lambda: None
) -> Iterator[None]:
    """Takedowns that are new below ``base`` go again ``when`` no version can be made with them: they bind nobody.

    ``but`` tells the one that a version was made with meanwhile.
    """
    before = list_takedowns(base)
    try:
        yield
    except when:
        kept = but()
        stays = {*before, *([] if kept is None else [storage.canonical(kept.uri)])}
        for folder in list_takedowns(base):
            if not {folder, storage.canonical(folder)} & stays:
                storage.discard(folder)
        raise


def inherited_takedown(version: DatabaseVersion, cache: Path) -> Entries:
    """What a database made of ``version`` may not show either: all that was ever taken down in its domain."""
    base, kind, _ = storage.join(version.uri).rsplit("/", 2)
    own = takedown_of(version)
    entries = Entries() if own is None else read_entries(own, cache)
    return entries | all_takedown_entries(base, cache, version.confined_to) if kind == DatabaseVersion.kind else entries


def with_image_hashes(entries: Entries, images: ImageShards, cache: Path) -> Entries:
    """``entries``, and the sha256 of the pictures that their urls served in ``images``: copies elsewhere go, too."""
    found, _ = _images_named(Entries(url=entries.url), images, cache) if entries.url else ([], None)
    return entries | Entries(sha256=frozenset(row["sha256"] for row in found if row["sha256"]))


def match_rows(takedown: Takedown, embeddings: EmbeddingShards, cache: Path) -> NDArray[np.int64]:
    """Dense row ids of ``embeddings`` that ``takedown`` names, ascending."""
    masks = match_shards(read_entries(takedown, cache), embeddings, embeddings.manifest().shards, cache)
    return np.flatnonzero(np.concatenate(masks)) if masks else np.empty(0, dtype=np.int64)


def match_shards(
    entries: Entries, source: EmbeddingShards | ImageShards, of: Iterable[artifacts.Shard], cache: Path
) -> list[NDArray[np.bool_]]:
    """For each shard ``of`` the source, which rows of its parquet are named."""
    matcher = Matcher(entries)

    def mask(shard: artifacts.Shard) -> NDArray[np.bool_]:
        path = artifacts.fetch_shard(source.uri, shard, ".parquet", cache)
        return matcher.mask(tables.read_table(path, list(COLUMNS)))

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(mask, of))


def read_takedown_list(uri: str) -> Entries:
    """The entries of a list: any of a URL list's formats, with a column url, sha256 or key, or several.

    Raises ``NotFoundError`` when it is not there, ``InputError`` when it cannot be read or names nothing.
    """
    table = tables.read_list(uri, "takedown")
    if not set(COLUMNS) & set(table.column_names):
        raise InputError(
            f"{uri} has none of the columns url, sha256 and key, only {', '.join(table.column_names) or 'nothing'}; "
            "rename the one that names pictures"
        )
    values = {
        name: frozenset(text.strip() for text in table[name].to_pylist() if text and text.strip())
        for name in set(COLUMNS) & set(table.column_names)
    }
    digests = frozenset(digest.lower() for digest in values.get("sha256", ()))
    if wrong := [d for d in sorted(digests) if len(d) != _SHA256_DIGITS or set(d) - set("0123456789abcdef")]:
        raise InputError(f"{uri}: {wrong[0]!r} is no sha256, which is {_SHA256_DIGITS} hex digits; mend the list")
    entries = Entries(**{**values, "sha256": digests})
    if not len(entries):
        raise InputError(f"{uri} is a takedown list naming nothing: every entry is empty; give it at least one")
    return entries


def _resolved(asked: Entries, before: Entries, images: ImageShards, cache: Path, listed: str) -> Entries:
    """``asked`` as it is kept: checked against the pictures of ``images``, with the sha256 of each that it names."""
    found, bearers = _images_named(asked, images, cache)
    there = Entries(*(frozenset(row[name] for row in found) for name in COLUMNS)) | before
    if absent := (asked - there).listed():
        _report_unmatched(absent, len(asked), images, listed)
    if repeated := sorted(key for key, count in bearers.items() if count > 1):
        raise InputError(
            f"{listed}: key {repeated[0]} is borne by {bearers[repeated[0]]} pictures of {images.uri}, a merged "
            "database; name the one meant by its url or sha256"
        )
    return Entries(
        url=asked.url,
        sha256=asked.sha256 | {row["sha256"] for row in found if row["sha256"]},
        key=frozenset(row["key"] for row in found if row["key"] in asked.key and not row["sha256"])
        | (asked.key & before.key),
    )


def _report_unmatched(absent: list[dict[str, str]], asked: int, images: ImageShards, listed: str) -> None:
    """Warn of entries that name no picture; refuse a list of nothing else, which is more likely the wrong one."""
    first = ", ".join(f"{entry['column']} {entry['value']}" for entry in absent[:_NAMED_FIRST])
    told = f"{len(absent)} of {asked} entries ({first}{', …' if len(absent) > _NAMED_FIRST else ''})"
    if len(absent) == asked:
        raise InputError(f"{listed} is a takedown list naming nothing in {told}: no picture of {images.uri} has them")
    logs.get("stage").warning(
        "%s names no picture of %s in %s; urls and sha256 among them are refused from now on", listed, images.uri, told
    )


def _images_named(asked: Entries, images: ImageShards, cache: Path) -> tuple[list[dict[str, str]], Counter[str]]:
    """The rows of pictures, kept or taken out, that an entry names, and how many bear each key that was asked."""
    matcher = Matcher(asked)

    def named(shard: artifacts.Shard) -> list[dict[str, str]]:
        table = tables.read_table(artifacts.fetch_shard(images.uri, shard, ".parquet", cache), _ASKED_COLUMNS)
        table = table.filter(pa.array(matcher.mask(table)))
        rows: list[dict[str, str]] = table.filter(pc.is_in(table["error_class"], pa.array(FINAL_OUTCOMES))).to_pylist()
        return rows

    with ThreadPoolExecutor(_READERS) as pool:
        found = [row for rows in pool.map(named, images.manifest().shards) for row in rows]
    return found, Counter(row["key"] for row in found if row["key"] in asked.key)
