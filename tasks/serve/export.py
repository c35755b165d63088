"""Export of a database's rows for other programs: Parquet, CSV, or the layout of clip-retrieval."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from infra.errors import InputError
from infra.settings import Settings
from infra.storage.folders import make_folder
from model.retrieval.database import Database
from tasks.references.database import Metadata, open_database
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.trust import open_named
from tasks.references.types import DatabaseVersion
from tasks.references.user_columns import UserColumns

_ROWS = 100_000  # of a file, which is in memory
_FIXED = pa.schema(
    [
        ("id", pa.int64()),
        *((name, pa.string()) for name in ("key", "url", "sha256")),
        *((name, pa.int32()) for name in ("width", "height")),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """Number of exported rows, and the files in the order of the rows."""

    rows: int
    files: tuple[Path, ...]


def export_database(
    reference: str, kind: str, out: Path, settings: Settings, *, trust: bool = False, file_rows: int = _ROWS
) -> Exported:
    """Write the rows that a search may return to files in ``out``.

    - ``parquet``: ``rows-NNNNN.parquet`` with id, key, url, sha256, width, height and the columns of the URL list.
    - ``csv``: the same in ``rows.csv``.
    - ``clip-retrieval``: ``img_emb/img_emb_N.npy``, float16, and ``metadata/metadata_N.parquet`` with the same columns
      and ``image_path``, which is the key. ``clip-retrieval index`` reads them.

    A column of the list that has the name of one of the first six gets the prefix ``user_``.

    Args:
        reference: Database: MLflow URI, short name or folder.
        kind: ``parquet``, ``csv`` or ``clip-retrieval``.
        out: Folder, which must be empty or not exist.
        settings: Settings of the registry and the root.
        trust: As in :func:`tasks.serve.load.load_database`.
        file_rows: Maximum rows of a file.

    Raises:
        InputError: ``kind`` is unknown, or ``out`` is not empty.
        NotFoundError: There is no such database.
        IntegrityError: A file is damaged.
    """
    if kind not in _WRITERS:
        raise InputError(f"format is unknown: {kind}; use {', '.join(_WRITERS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; give another folder")
    version, _ = open_named(DatabaseVersion, reference, settings, trust=trust)
    database = open_database(version, settings.cache_folder)
    tables = _tables(version, database, settings.cache_folder, file_rows)
    make_folder(out)
    files = tuple(_WRITERS[kind](out, tables, database))
    return Exported(rows=len(database), files=files)


def _tables(version: DatabaseVersion, database: Database, cache: Path, file_rows: int) -> Iterator[pa.Table]:
    embeddings = embeddings_of(version)
    lookup, own = Metadata(embeddings.uri, embeddings.manifest(), cache), UserColumns(images_of(embeddings), cache)
    types = own.types()
    names = [f"user_{name}" if name in (*_FIXED.names, "image_path") else name for name in types]
    ids = database.ids()
    for start in range(0, max(len(ids), 1), file_rows):
        part = ids[start : start + file_rows].tolist()
        described = database.describe(part)
        fixed = pa.Table.from_pylist(described, _FIXED)
        user = [
            own.table(shard, keys, types)
            for shard, keys in _runs([(lookup.shard(row["id"]), row["key"]) for row in described])
        ]
        columns = (
            pa.concat_tables(user) if user else pa.table({name: pa.array([], kind) for name, kind in types.items()})
        )
        yield pa.table([*fixed.columns, *columns.columns], names=[*fixed.column_names, *names])


def _runs(places: Sequence[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield shard and keys of consecutive rows of the same shard."""
    keys: list[str] = []
    for number, (shard, key) in enumerate(places):
        keys.append(key)
        if number + 1 == len(places) or places[number + 1][0] != shard:
            yield shard, keys
            keys = []


def _write_parquet(out: Path, tables: Iterator[pa.Table], database: Database) -> Iterator[Path]:
    for number, table in enumerate(tables):
        path = out / f"rows-{number:05d}.parquet"
        pq.write_table(table, path, compression="zstd")
        yield path


def _write_csv(out: Path, tables: Iterator[pa.Table], database: Database) -> Iterator[Path]:
    path, writer = out / "rows.csv", None
    for table in tables:
        writer = writer or pacsv.CSVWriter(str(path), table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    yield path


def _write_clip_retrieval(out: Path, tables: Iterator[pa.Table], database: Database) -> Iterator[Path]:
    make_folder(out / "img_emb")
    make_folder(out / "metadata")
    for number, table in enumerate(tables):
        rows, metadata = out / "img_emb" / f"img_emb_{number}.npy", out / "metadata" / f"metadata_{number}.parquet"
        np.save(rows, database.rows(table["id"].to_numpy()))
        pq.write_table(table.append_column("image_path", table["key"]), metadata)
        yield from (rows, metadata)


_WRITERS: dict[str, Callable[[Path, Iterator[pa.Table], Database], Iterator[Path]]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "clip-retrieval": _write_clip_retrieval,
}
