"""Index shards of a database, built from embeddings and from the index shards of the previous version.

    index/NNNNN.faiss     covers the embedding shards from NNNNN on, up to shard_rows rows

Workers fill parts of a shard in parallel, and one worker merges them, so that each cell is contiguous in a search.

A version that grows from a previous one reuses the shards whose rows are unchanged. New rows form a shard of their own.
While the shard before it is at most twice as large, the two are merged. A row is thus copied only a few times, and a
database of n rows has about log2(n) shards, however often it grew.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra import artifacts, storage
from model.retrieval.index_files import FIRST_ID_SHIFT, fill_shard, merge_shards
from tasks.references.rows import finite_rows
from tasks.references.types import DatabaseVersion, EmbeddingShards
from tasks.stage import run_shards

PART_ROWS = 262_144
"""Maximum rows that one worker fills at a time; it does not affect the result."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """The embedding shards of one index shard, in row order.

    The ordinal is part of the ids in the index, so that shards of several versions can be searched together.
    """

    ordinal: int
    members: tuple[artifacts.Shard, ...]

    @property
    def name(self) -> str:
        """Name of the index shard, which is that of its first member."""
        return self.members[0].name

    @property
    def rows(self) -> int:
        """Total rows of all members."""
        return sum(member.rows for member in self.members)

    def source(self, template: artifacts.Shard) -> str:
        """Return the digest of the shard's inputs: quantizer, ordinal and rows. Equal digests mean equal files."""
        rows = [[one.name, one.file(".npy").sha256] for one in self.members]
        return artifacts.digest_of([template.file(".faiss").sha256, self.ordinal, rows])

    def info(self, template: artifacts.Shard, error: float) -> dict[str, Any]:
        """Return the manifest entry of the index shard; ``error`` is its quantization error."""
        names = [one.name for one in self.members]
        return {"members": names, "ordinal": self.ordinal, "error": error, "source": self.source(template)}


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Part of an index shard: an existing ``shard``, or None if it is still to be filled."""

    group: Group
    shard: artifacts.Shard | None = None


def fill_shards(
    stage: artifacts.ArtifactBuilder,
    embeddings: EmbeddingShards,
    template: artifacts.Shard,
    shard_rows: int,
    previous: DatabaseVersion | None,
    cache: Path,
) -> list[artifacts.Shard]:
    """Return all index shards in row order: reuse those of ``previous`` with unchanged rows, and build the others.

    Args:
        stage: Builder of the version.
        embeddings: Rows to index.
        template: Shard of the trained quantizer.
        shard_rows: Maximum rows per index shard.
        previous: Version that this one grows from, or None.
        cache: Folder for copies of remote files.
    """
    members = embeddings.manifest().shards
    groups = group_shards(members, shard_rows, previous)
    reusable = {} if previous is None else _reusable_shards(previous, members, template)
    # A temporary folder for parts: it is never committed, and deleted after the merge.
    parts = artifacts.ArtifactBuilder(stage.uri, "parts", inputs={}, config={"rows": PART_ROWS})
    found, finished = {}, stage.committed_shards()
    fills: list[tuple[str, Group]] = []
    part_fills: list[tuple[str, Group]] = []
    merges: list[tuple[str, tuple[Group, list[Piece]]]] = []
    for group in groups:
        pieces = pieces_of(group, reusable, mergeable=template.info.get("mergeable", False))
        if pieces[0].group != group:
            merges.append((group.name, (group, pieces)))
            if group.name not in finished:
                part_fills += [(piece.group.name, piece.group) for piece in pieces if piece.shard is None]
        elif pieces[0].shard is not None:
            found[group.name] = pieces[0].shard
        else:
            fills.append((group.name, group))
    settings = (embeddings.uri, stage.uri, template, cache)
    built = run_shards(stage, fills, _Fill, (*settings, stage.uri))[0]
    if merges:
        filled = {part.name: part for part in run_shards(parts, part_fills, _Fill, (*settings, parts.uri))[0]}
        built += run_shards(stage, merges, _Merge, (*settings[1:], parts.uri, filled))[0]
        storage.discard(storage.join(stage.uri, parts.kind))
    found |= {shard.name: shard for shard in built}
    return [found[group.name] for group in groups]


def group_shards(shards: Sequence[artifacts.Shard], shard_rows: int, previous: DatabaseVersion | None) -> list[Group]:
    """Group embedding shards into index shards: keep the groups of ``previous`` and append groups for new shards."""
    before = [] if previous is None else [one for one in previous.manifest().shards if "members" in one.info]
    starts = {group.info["members"][0] for group in before}
    grouped = {member for group in before for member in group.info["members"]}
    found: list[list[artifacts.Shard]] = []
    for number, shard in enumerate(shards):
        is_new = bool(grouped) and shard.name not in grouped
        begins = shard.name in starts or (is_new and shards[number - 1].name in grouped)
        if not found or begins or _rows(found[-1]) + shard.rows > shard_rows:
            found.append([])
        found[-1].append(shard)
    if found and found[-1][0].name not in starts:
        while len(found) > 1 and _should_merge(found[-2], found[-1], shard_rows):
            found[-2:] = [found[-2] + found[-1]]
    numbered = all(group[0].name.isdigit() for group in found)
    return [Group(int(group[0].name) if numbered else n, tuple(group)) for n, group in enumerate(found)]


def pieces_of(group: Group, reusable: dict[str, Piece], *, mergeable: bool) -> list[Piece]:
    """Split ``group`` into ``reusable`` shards (by first member) and parts of at most ``PART_ROWS`` rows."""
    whole = reusable.get(group.name)
    if whole is not None and whole.group == group:
        return [whole]
    if not mergeable:
        return [Piece(group)]
    pieces: list[Piece] = []
    pending: list[artifacts.Shard] = []

    def end_part() -> None:
        if pending:
            pieces.append(Piece(Group(group.ordinal, tuple(pending))))
            pending.clear()

    position = 0
    while position < len(group.members):
        member = group.members[position]
        piece = reusable.get(member.name)
        if piece is not None and group.members[position : position + len(piece.group.members)] == piece.group.members:
            end_part()
            pieces.append(piece)
            position += len(piece.group.members)
            continue
        if pending and _rows(pending) + member.rows > PART_ROWS:
            end_part()
        pending.append(member)
        position += 1
    end_part()
    return pieces


def _should_merge(last: list[artifacts.Shard], new: list[artifacts.Shard], shard_rows: int) -> bool:
    return _rows(last) <= 2 * _rows(new) and _rows(last) + _rows(new) <= shard_rows


def _rows(shards: Sequence[artifacts.Shard]) -> int:
    return sum(shard.rows for shard in shards)


def _reusable_shards(
    previous: DatabaseVersion, members: Sequence[artifacts.Shard], template: artifacts.Shard
) -> dict[str, Piece]:
    """Return the index shards of ``previous`` whose rows are all unchanged, by the name of their first member."""
    named = {member.name: member for member in members}
    reusable = {}
    for shard in previous.manifest().shards:
        names = shard.info.get("members", ())
        if names and all(name in named for name in names):
            group = Group(shard.info["ordinal"], tuple(named[name] for name in names))
            if group.source(template) == shard.info["source"]:
                reusable[group.name] = Piece(group, shard.reused_from(previous.uri))
    return reusable


class _Fill:
    """Worker that fills an index shard, or a part of one, with rows."""

    def __init__(
        self, embeddings_uri: str, folder_uri: str, template: artifacts.Shard, cache: Path, output_uri: str
    ) -> None:
        self._embeddings_uri, self._output_uri, self._cache = embeddings_uri, output_uri, cache
        self._template, self._path = template, artifacts.fetch_shard(folder_uri, template, ".faiss", cache)

    def __call__(self, item: tuple[str, Group]) -> artifacts.Shard:
        name, group = item
        rows = (finite_rows(self._embeddings_uri, one, self._cache) for one in group.members)
        with storage.scratch() as folder:
            error = fill_shard(self._path, rows, folder / "index" / f"{name}.faiss", ordinal=group.ordinal)
            info = group.info(self._template, error)
            return artifacts.commit_shard(self._output_uri, name, folder, rows=group.rows, info=info)


class _Merge:
    """Worker that merges the parts of an index shard."""

    def __init__(
        self, folder_uri: str, template: artifacts.Shard, cache: Path, parts_uri: str, parts: dict[str, artifacts.Shard]
    ) -> None:
        self._folder_uri, self._template, self._cache = folder_uri, template, cache
        self._parts_uri, self._parts = parts_uri, parts

    def __call__(self, item: tuple[str, tuple[Group, list[Piece]]]) -> artifacts.Shard:
        name, (group, pieces) = item
        files, error, first = [], 0.0, 0
        for piece in pieces:
            shard = piece.shard or self._parts[piece.group.name]
            offset = ((group.ordinal - piece.group.ordinal) << FIRST_ID_SHIFT) + first
            files.append((artifacts.fetch_shard(self._parts_uri, shard, ".faiss", self._cache), offset))
            error += shard.info["error"] * shard.rows / max(1, group.rows)
            first += shard.rows
        with storage.scratch() as folder:
            merge_shards(files, folder / "index" / f"{name}.faiss")
            info = group.info(self._template, error)
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=group.rows, info=info)
