"""An image shard without some of its pictures: their bytes leave the tar, their rows stay on record in the parquet."""

import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import IntegrityError
from infra.formats.tables import read_table

DUPLICATE, TAKEN_DOWN = "duplicate_content", "taken_down"
"""Error classes of rows whose picture was dropped: its bytes are in the database already, or may not be shown."""
_DROPPED = "dropped"
_ON_RECORD = frozenset({"url", "key", "sha256", "status", "error_message", "error_class"})


def drop_images(tar: Path, parquet: Path, stem: Path, reasons: Mapping[str, str]) -> dict[str, int]:
    """Write both files as ``stem`` with their suffixes, without the pictures that ``reasons`` names.

    Args:
        tar: of webdataset samples.
        parquet: beside it, a row for each URL that was asked for.
        stem: where to, without suffix: folder and name of the shard.
        reasons: the error class that a dropped key's row gets; of its picture the row keeps url and sha256 alone.

    Returns:
        How many rows there are of each error class now.
    """
    table = read_table(parquet)
    keys = table["key"].to_pylist()
    gone = pa.array([key in reasons for key in keys])
    for index, name in enumerate(table.column_names):
        field = table.field(index)
        if name not in _ON_RECORD:
            kept = pc.if_else(gone, pa.scalar(None, field.type), table[name])
            table = table.set_column(index, field.with_nullable(True), kept)
    reason = pa.array([reasons.get(key) for key in keys], pa.string())
    told = {"status": pa.scalar(_DROPPED), "error_class": reason, "error_message": pc.binary_join_element_wise(
        reason, "left out of the shard", ": ")}  # fmt: skip
    for name, value in told.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, pa.field(name, pa.string()), pc.if_else(gone, value, table[name]))
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
        raise IntegrityError(f"{tar} is no whole tar ({error}); restore it, or download its shard again") from error
