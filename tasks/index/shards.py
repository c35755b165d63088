"""Fill: the index shards of a database, from rows and from the shards of the version before.

    index/NNNNN.faiss     over the embedding shards from NNNNN on, until shard_rows are reached

Workers fill parts of a shard side by side, and one merges them: a search then finds each cell in one place.

A version that grew takes over the shards whose rows are the same. Its new rows are a shard of their own, merged with
the last one unless that is more than twice as large, and so on: a row is copied a few times at most, and however often
a database of n rows grew, it has about log2(n) shards.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra import artifacts, storage
from model.retrieval.faiss_index import FIRST_ID_SHIFT, fill_shard, merge_shards
from tasks.references.rows import finite_rows
from tasks.references.types import DatabaseVersion, EmbeddingShards
from tasks.stage import run_shards

PART_ROWS = 262_144
"""So many rows are filled by one worker; it does not decide what comes out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """The embedding shards of one index shard, in row order.

    The ordinal lies in the ids that the index holds, so that shards of several versions can be searched as one.
    """

    ordinal: int
    members: tuple[artifacts.Shard, ...]

    @property
    def name(self) -> str:
        """That of its first member."""
        return self.members[0].name

    @property
    def rows(self) -> int:
        """Over all members."""
        return sum(member.rows for member in self.members)

    def source(self, template: artifacts.Shard) -> str:
        """Names what an index shard is made of: the same quantizer, number and rows make the same file."""
        rows = [[one.name, one.file(".npy").sha256] for one in self.members]
        return artifacts.digest_of([template.file(".faiss").sha256, self.ordinal, rows])

    def info(self, template: artifacts.Shard, error: float) -> dict[str, Any]:
        """What the manifest tells of its index shard; ``error`` is the quantizer's."""
        names = [one.name for one in self.members]
        return {"members": names, "ordinal": self.ordinal, "error": error, "source": self.source(template)}


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A part of an index shard: there already as ``shard``, or yet to be filled."""

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
    """All index shards in row order: those of ``previous`` that still hold the same rows, and the others, made."""
    members = embeddings.manifest().shards
    groups = group_shards(members, shard_rows, previous)
    held = {} if previous is None else _held(previous, members, template)
    # Never committed: gone once they are merged.
    parts = artifacts.ArtifactBuilder(stage.uri, "parts", inputs={}, config={"rows": PART_ROWS})
    found, there = {}, stage.done()
    fills: list[tuple[str, Group]] = []
    part_fills: list[tuple[str, Group]] = []
    merges: list[tuple[str, tuple[Group, list[Piece]]]] = []
    for group in groups:
        pieces = pieces_of(group, held, mergeable=template.info.get("mergeable", False))
        if pieces[0].group != group:
            merges.append((group.name, (group, pieces)))
            if group.name not in there:
                part_fills += [(piece.group.name, piece.group) for piece in pieces if piece.shard is None]
        elif pieces[0].shard is not None:
            found[group.name] = pieces[0].shard
        else:
            fills.append((group.name, group))
    settings = (embeddings.uri, stage.uri, template, cache)
    made = run_shards(stage, fills, _Fill, (*settings, stage.uri))[0]
    if merges:
        filled = {part.name: part for part in run_shards(parts, part_fills, _Fill, (*settings, parts.uri))[0]}
        made += run_shards(stage, merges, _Merge, (*settings[1:], parts.uri, filled))[0]
        storage.discard(storage.join(stage.uri, parts.kind))
    found |= {shard.name: shard for shard in made}
    return [found[group.name] for group in groups]


def group_shards(shards: Sequence[artifacts.Shard], shard_rows: int, previous: DatabaseVersion | None) -> list[Group]:
    """The index shards that there are to be: as before where there was a before, then what is new."""
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
        while len(found) > 1 and _joins(found[-2], found[-1], shard_rows):
            found[-2:] = [found[-2] + found[-1]]
    numbered = all(group[0].name.isdigit() for group in found)
    return [Group(int(group[0].name) if numbered else n, tuple(group)) for n, group in enumerate(found)]


def pieces_of(group: Group, held: dict[str, Piece], *, mergeable: bool) -> list[Piece]:
    """What ``group`` is made of: shards that are ``held`` (by first member), and parts of at most ``PART_ROWS``."""
    whole = held.get(group.name)
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

    place = 0
    while place < len(group.members):
        member, piece = group.members[place], held.get(group.members[place].name)
        if piece is not None and group.members[place : place + len(piece.group.members)] == piece.group.members:
            end_part()
            pieces.append(piece)
            place += len(piece.group.members)
            continue
        if pending and _rows(pending) + member.rows > PART_ROWS:
            end_part()
        pending.append(member)
        place += 1
    end_part()
    return pieces


def _joins(last: list[artifacts.Shard], new: list[artifacts.Shard], shard_rows: int) -> bool:
    return _rows(last) <= 2 * _rows(new) and _rows(last) + _rows(new) <= shard_rows


def _rows(shards: Sequence[artifacts.Shard]) -> int:
    return sum(shard.rows for shard in shards)


def _held(previous: DatabaseVersion, members: Sequence[artifacts.Shard], template: artifacts.Shard) -> dict[str, Piece]:
    """The index shards of ``previous`` whose rows are all still there, by their first member."""
    named = {member.name: member for member in members}
    held = {}
    for shard in previous.manifest().shards:
        names = shard.info.get("members", ())
        if names and all(name in named for name in names):
            group = Group(shard.info["ordinal"], tuple(named[name] for name in names))
            if group.source(template) == shard.info["source"]:
                held[group.name] = Piece(group, shard.reused_from(previous.uri))
    return held


class _Fill:
    """A shard of the index, or a part of one, from rows, on a worker."""

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
    """A shard of the index from its parts, on a worker."""

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
            shift = ((group.ordinal - piece.group.ordinal) << FIRST_ID_SHIFT) + first
            files.append((artifacts.fetch_shard(self._parts_uri, shard, ".faiss", self._cache), shift))
            error += shard.info["error"] * shard.rows / max(1, group.rows)
            first += shard.rows
        with storage.scratch() as folder:
            merge_shards(files, folder / "index" / f"{name}.faiss")
            info = group.info(self._template, error)
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=group.rows, info=info)
