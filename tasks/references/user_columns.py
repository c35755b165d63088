"""The user's own columns of a URL list: id, caption, licence and the like, as the image shards store them."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import artifacts, storage
from infra.download.shard_writer import RESULT_COLUMNS, VALIDATOR_COLUMNS
from infra.formats import tables
from tasks.references.types import ImageShards

_MAX_CACHED_TABLES = 32
_ADDED = frozenset({"url", *RESULT_COLUMNS, *VALIDATOR_COLUMNS})


class UserColumns:
    """Columns of the list behind each image. Reads the Parquet files of image shards on demand. Thread-safe."""

    def __init__(self, images: ImageShards, cache: Path, *, kept: int = _MAX_CACHED_TABLES) -> None:
        """Look up the columns in the shards of ``images``; the tables of ``kept`` shards are cached."""
        self._uri, self._cache = images.uri, cache
        self._shards = {shard.name: shard for shard in images.manifest().shards}
        # Not a bound method: the reference cycle would keep the tables after their last use.
        self._table = lru_cache(kept)(partial(_read, images.uri, self._shards, cache))

    def types(self) -> dict[str, pa.DataType]:
        """Return the columns of all shards in the order of their names: int64, float64, or string for others."""
        found: dict[str, pa.DataType] = {}
        for schema in storage.read_all(self._schema, self._shards.values()):
            for field in schema:
                if field.name not in _ADDED:
                    found[field.name] = _wider(found.get(field.name), field.type)
        return dict(sorted((name, pa.string() if kind == pa.null() else kind) for name, kind in found.items()))

    def rows(self, shard: str, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Return the columns that are not null of images of a shard, as values that JSON has."""
        table, places = self._table(shard)
        if not table.column_names:
            return [{} for _ in keys]
        found = table.take([places[key] for key in keys]).to_pylist()
        return [{name: plain(value) for name, value in row.items() if value is not None} for row in found]

    def table(self, shard: str, keys: Sequence[str], types: dict[str, pa.DataType]) -> pa.Table:
        """Return the columns of images of a shard in the given types. Values that are not text become JSON."""
        table, places = self._table(shard)
        taken = table.take([places[key] for key in keys]) if table.column_names else table
        absent = pa.nulls(len(keys))
        columns = [taken[name] if name in taken.column_names else absent for name in types]
        return pa.table(
            [_as_type(column, kind) for column, kind in zip(columns, types.values(), strict=True)], names=list(types)
        )

    def _schema(self, shard: artifacts.Shard) -> pa.Schema:
        return pq.read_schema(artifacts.fetch_shard(self._uri, shard, ".parquet", self._cache))


def _read(uri: str, shards: Mapping[str, artifacts.Shard], cache: Path, name: str) -> tuple[pa.Table, dict[str, int]]:
    """Return the user's columns of a shard, and the row of each key."""
    table = tables.read_table(artifacts.fetch_shard(uri, shards[name], ".parquet", cache))
    places = {key: row for row, key in enumerate(table["key"].to_pylist())}
    own = [column for column in table.column_names if column not in _ADDED]
    return table.select(own), places


def plain(value: Any) -> Any:
    """Return a value of a column as JSON has it: bytes as base64, dates and the like as text, NaN as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return json.loads(json.dumps(value, default=_text))


def _text(value: object) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _wider(before: pa.DataType | None, kind: pa.DataType) -> pa.DataType:
    number = pa.float64() if pa.types.is_floating(kind) else pa.int64()
    simple = number if pa.types.is_floating(kind) or pa.types.is_integer(kind) else pa.string()
    if pa.types.is_null(kind):
        simple = pa.null()
    if before is None or before == simple or before == pa.null():
        return simple
    if simple == pa.null():
        return before
    return pa.string() if pa.string() in (before, simple) else pa.float64()


def _as_type(column: pa.ChunkedArray | pa.Array, kind: pa.DataType) -> pa.ChunkedArray | pa.Array:
    if kind != pa.string() or pa.types.is_null(column.type) or pa.types.is_string(column.type):
        return pc.cast(column, kind)
    values = (plain(value) for value in column.to_pylist())
    texts = (
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values
    )
    return pa.array(list(texts), pa.string())
