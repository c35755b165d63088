"""Readers and writers of Parquet tables, URL lists and webdataset tars.

Rows keep the order of the file. Nothing here decodes images.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage, uris
from infra.errors import InputError

_TEXT_COLUMNS = {name: pa.string() for name in ("url", "sha256", "key")}  # a key is digits with leading zeros


def read_table(path: Path | str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file. Raises ``InputError`` if it is not readable or lacks one of ``columns``."""
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file ({' '.join(str(error).split())})") from error
    if absent := set(columns or ()) - set(table.column_names):
        raise InputError(f"{path} has no column {min(absent)}; rebuild the file")
    return table


def write_table(rows: Iterable[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    """Write ``rows`` to a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")


def read_url_list(uri: str) -> pa.Table:
    """Read a URL list: parquet, csv, tsv, json lines or plain text, with one URL per row. Other columns are kept.

    Raises ``NotFoundError`` if it does not exist, and ``InputError`` if it is empty or has no ``url`` column.
    """
    uri = uris.hide(uri)
    table = read_list(uri, "URL")
    if "url" not in table.column_names:
        raise InputError(f"{uri} has no column 'url', only {', '.join(table.column_names) or 'nothing'}; rename it")
    if table.num_rows == 0:
        raise InputError(f"{uri} lists no URL; add at least one row")
    return table


def read_list(uri: str, what: str) -> pa.Table:
    """Read a list in any format of a URL list. The columns url, sha256 and key are read as text.

    Args:
        uri: Location of the list.
        what: What it lists, for error messages.

    Raises:
        NotFoundError: The list does not exist.
        InputError: The list cannot be read.
    """
    uri = uris.hide(uri)
    path = uri if storage.is_local(uri) else uri.partition("?")[0]  # a signed URI ends in its signature
    suffix = PurePosixPath(path).suffix.lower()
    with storage.open_read(uri) as stream:
        data = pa.BufferReader(stream.read())
    try:
        table = _PARSERS.get(suffix, _parse_lines)(data)
        if repeated := sorted(name for name, count in Counter(table.column_names).items() if count > 1):
            raise InputError(f"{uri} has several columns {repeated[0]!r}; keep only one of them")
        for name in _TEXT_COLUMNS.keys() & set(table.column_names):
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{uri} cannot be read as a {suffix or 'text'} {what} list ({error})") from error
    return table.combine_chunks()


def read_lines(uri: str) -> list[str]:
    """Read the non-empty lines of a text file, stripped. Raises ``NotFoundError`` and ``InputError``."""
    uri = uris.hide(uri)
    try:
        lines = storage.read_bytes(uri).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{uri} is not UTF-8 text ({error}); write one prompt per line") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{uri} is empty; write one text per line")
    return texts


def _parse_csv(data: pa.BufferReader, delimiter: str = ",") -> pa.Table:
    import pyarrow.csv as csv

    return csv.read_csv(
        data,
        parse_options=csv.ParseOptions(delimiter=delimiter),
        convert_options=csv.ConvertOptions(column_types=_TEXT_COLUMNS),
    )


def _parse_json(data: pa.BufferReader) -> pa.Table:
    import pyarrow.json as json

    return json.read_json(data)


def _parse_lines(data: pa.BufferReader) -> pa.Table:
    lines = [line.strip() for line in bytes(data.read()).decode("utf-8-sig").splitlines()]
    return pa.table({"url": pa.array([line for line in lines if line and not line.startswith("#")], pa.string())})


_PARSERS = {
    ".parquet": pq.read_table,
    ".csv": _parse_csv,
    ".tsv": lambda data: _parse_csv(data, "\t"),
    ".json": _parse_json,
    ".jsonl": _parse_json,
}
