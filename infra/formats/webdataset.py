"""Image shards in webdataset format: a tar of images beside a Parquet file with a row for each URL."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import IntegrityError
from infra.formats.tables import read_table

DUPLICATE, TAKEN_DOWN = "duplicate_content", "taken_down"
"""Error classes of dropped images: the database already has the same bytes, or the image was taken down."""
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
_DROPPED = "dropped"
_KEPT_COLUMNS = frozenset({"url", "key", "sha256", "status", "error_message", "error_class"})


def iter_images(tar: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (key, encoded image) for each sample of a webdataset tar. Raises ``IntegrityError`` for a damaged tar."""
    try:
        _require_end(tar)
        with tarfile.open(tar, "r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if member.isfile() and name.suffix in IMAGE_SUFFIXES:
                    stream = archive.extractfile(member)
                    if stream is not None:
                        yield name.stem, stream.read()
    except tarfile.TarError as error:
        raise IntegrityError(
            f"{tar} is not a complete tar ({error}); delete its shard's marker and run again"
        ) from error


def _require_end(tar: Path) -> None:
    """Raise ``TarError`` if the two zero blocks at the end are missing; tarfile itself misses some truncations."""
    with tar.open("rb") as stream:
        stream.seek(-min(2 * tarfile.BLOCKSIZE, tar.stat().st_size), os.SEEK_END)
        if stream.read() != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.TarError("its end is missing")


def drop_images(tar: Path, parquet: Path, stem: Path, reasons: Mapping[str, str]) -> dict[str, int]:
    """Write a copy of a shard without the images whose keys are in ``reasons``.

    Their bytes leave the tar, and their rows in the Parquet file record the reason.

    Args:
        tar: Webdataset samples of the shard.
        parquet: Rows of the shard, one for each requested URL.
        stem: Output path without suffix: folder and name of the shard.
        reasons: Error class for each dropped key. Of a dropped image, the row keeps only the url and sha256.

    Returns:
        The number of rows of each error class after the removal.
    """
    table = read_table(parquet)
    keys = table["key"].to_pylist()
    is_dropped = pa.array([key in reasons for key in keys])
    for index, name in enumerate(table.column_names):
        field = table.field(index)
        if name not in _KEPT_COLUMNS:
            cleared = pc.if_else(is_dropped, pa.scalar(None, field.type), table[name])
            table = table.set_column(index, field.with_nullable(True), cleared)
    reason = pa.array([reasons.get(key) for key in keys], pa.string())
    outcome = {"status": pa.scalar(_DROPPED), "error_class": reason, "error_message": pc.binary_join_element_wise(
        reason, "left out of the shard", ": ")}  # fmt: skip
    for name, value in outcome.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, pa.field(name, pa.string()), pc.if_else(is_dropped, value, table[name]))
    pq.write_table(table, stem.with_suffix(".parquet"))
    _copy_members(tar, stem.with_suffix(".tar"), reasons)
    return dict(sorted(Counter(table["error_class"].to_pylist()).items()))


def _copy_members(tar: Path, to: Path, dropped: Mapping[str, str]) -> None:
    try:
        with tarfile.open(tar, "r|") as source, tarfile.open(to, "w") as target:
            for member in source:
                if PurePosixPath(member.name).stem not in dropped:
                    target.addfile(member, source.extractfile(member))
    except tarfile.TarError as error:
        raise IntegrityError(
            f"{tar} is not a complete tar ({error}); restore it, or download its shard again"
        ) from error
