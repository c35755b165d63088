"""Lists of rows in any format, as one Arrow table in a memory-mapped file.

The rows are read in batches and written to a temporary file, so a list of any length needs little memory. The file is
deleted at once; the table keeps its space until it is released.
"""

import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import storage, uris
from infra.errors import InputError
from infra.formats.delimited import read_delimited
from infra.formats.json_rows import read_json
from infra.formats.list_source import TEXT_COLUMNS, Hints, ListSource, ReadAgainError, find_files, suffix_of

Batches = Iterator[pa.RecordBatch]
_URL = re.compile(rb"\s*(?:[a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)
_TEXT_NAMES = ("text", "prompt", "caption")
_SNIFFED_LINES = 100
_BATCH_ROWS = 1 << 16
_IN_MEMORY = 64 << 20  # a shorter table is copied to memory


def read_list(uri: str | Sequence[str], what: str, url_column: str | None = None) -> pa.Table:
    """Read a list: a file, several, those of a folder or those that a pattern matches, in a stable order.

    The format is taken from the suffix, or else from the content: parquet, csv, tsv, JSON, or text with a URL in each
    line. Files may be compressed with gzip, zstd, bzip2 or xz, and text may be UTF-8, UTF-16 or UTF-32. Columns of
    several files are united by name; values of different types become text. The columns url, sha256 and key are text.

    Args:
        uri: Location, or locations, of the list.
        what: What it lists, for error messages.
        url_column: Column that is renamed to ``url``. Default: none.

    Raises:
        NotFoundError: The list does not exist.
        InputError: The list cannot be read.
    """
    files = [file for one in ([uri] if isinstance(uri, str) else uri) for file in find_files(uris.hide(one))]
    if not files:
        raise InputError(f"no {what} list is given; give at least one")
    with storage.scratch() as folder:
        parts = [part for number, file in enumerate(files) for part in _convert(file, what, folder, number, url_column)]
        table = _joined(parts, folder)
    return table.combine_chunks() if table.nbytes <= _IN_MEMORY else table


def read_texts(uri: str) -> list[str]:
    """Read the lines of a text file, or the column of texts of a table.

    Raises:
        NotFoundError: The file does not exist.
        InputError: The file cannot be read, or it has several columns and none of a known name.
    """
    if suffix_of(uri) in _TABLES:
        table = read_list(uri, "text")
        name = next((name for name in _TEXT_NAMES if name in table.column_names), None)
        if name is None:
            names = ", ".join(table.column_names) or "nothing"
            raise InputError(f"{uri} has no column text, only {names}; rename the column of the texts")
        return [str(text) for text in table[name].to_pylist() if text is not None]
    with storage.scratch() as folder:
        source = _open(uri, folder)
        try:
            return [line for block in source.line_blocks() for line in block.decode().splitlines()]
        except (UnicodeDecodeError, OSError) as error:
            problem = source.encoding_problem() if isinstance(error, UnicodeDecodeError) else str(error)
            raise InputError(f"{uri} is not UTF-8 text ({problem}); write one text per line") from error


def iter_list(uri: str, what: str, hints: Hints | None = None) -> Batches:
    """Yield the rows of one file in batches, in its own types. Raises errors as :func:`read_list` and its readers."""
    with storage.scratch() as folder:
        yield from _read(uri, what, folder, hints or Hints())


def _convert(uri: str, what: str, folder: Path, number: int, url_column: str | None) -> list[Path]:
    """Write the rows of one file to Arrow files in ``folder`` and return them."""
    hints = Hints()
    while True:
        try:
            with _Parts(folder / str(number)) as parts:
                for batch in _read(uri, what, folder, hints):
                    parts.write(_simple(_checked(batch, uri, url_column)))
            return parts.paths
        except ReadAgainError:
            continue
        except pa.ArrowException as error:  # a column of URLs that cannot be text
            raise _unreadable(uri, what, str(error)) from error


class _Parts:
    """Writes batches to Arrow files: a further one whenever the columns or types change."""

    def __init__(self, stem: Path) -> None:
        self.paths: list[Path] = []
        self._stem = stem
        self._writer: Any = None
        self._schema: pa.Schema | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        if self._writer is None or batch.schema != self._schema:
            self.__exit__()
            self.paths.append(self._stem.with_name(f"{self._stem.name}-{len(self.paths)}.arrow"))
            self._writer, self._schema = pa.ipc.new_file(str(self.paths[-1]), batch.schema), batch.schema
        self._writer.write_batch(batch)


def _read(uri: str, what: str, folder: Path, hints: Hints) -> Batches:
    """Yield the batches of a file; at least one, which is empty if the file has columns but no rows."""
    source: ListSource | None = None
    try:
        source = _open(uri, folder)
        yield from _reader(source)(source, hints)
    except ReadAgainError:
        raise
    except (pa.ArrowException, InputError, ValueError, OSError, EOFError, lzma.LZMAError) as error:
        problem = source.encoding_problem() if source is not None and _is_text_problem(error) else None
        raise _unreadable(uri, what, problem or " ".join(str(error).split())) from error


def _open(uri: str, folder: Path) -> ListSource:
    """Open a list. A remote one is copied to ``folder`` first, since it may be read twice."""
    with storage.open_read(uri):  # raises NotFoundError
        pass
    return ListSource(storage.fetch(uri, folder / "fetched"), suffix_of(uri))


def _is_text_problem(error: Exception) -> bool:
    return isinstance(error, UnicodeDecodeError) or "utf8" in str(error).lower() or "utf-8" in str(error).lower()


def _unreadable(uri: str, what: str, problem: str) -> InputError:
    path = Path(uri if uris.is_local(uri) else uri.partition("?")[0])
    return InputError(f"{uri} cannot be read as a {path.suffix.lower() or 'text'} {what} list ({problem})")


def _reader(source: ListSource) -> Callable[[ListSource, Hints], Batches]:
    """Return the reader for the suffix of a file, or else for its content."""
    if source.suffix in _TABLES:
        return _TABLES[source.suffix]
    head = source.head()
    if head.startswith(b"PAR1"):
        return _read_parquet
    if head.lstrip()[:1] in (b"{", b"["):
        return read_json
    first = next((line for line in head.splitlines() if line.strip() and not line.startswith(b"#")), b"")
    if not _URL.match(first) and any(separator in first for separator in (b",", b";", b"\t")):
        return read_delimited
    return _read_text


def _read_parquet(source: ListSource, hints: Hints) -> Batches:
    with pa.memory_map(str(source.path)) as stream:
        file = pq.ParquetFile(stream)
        yield pa.RecordBatch.from_pylist([], file.schema_arrow)
        yield from file.iter_batches(_BATCH_ROWS)


def _read_text(source: ListSource, hints: Hints) -> Batches:
    """Yield the lines that are neither empty nor comments. Raises ``InputError`` if most of the first are no URLs."""
    checked = False
    for block in source.line_blocks():
        lines = [line for line in map(bytes.strip, block.splitlines()) if line and not line.startswith(b"#")]
        first = lines[:_SNIFFED_LINES]
        if first and not checked:
            checked = True
            if 2 * sum(_URL.match(line) is not None for line in first) < len(first):
                shown = first[0][:40].decode("utf-8", "replace")
                raise InputError(f"its lines are not URLs: {shown!r}; write one URL per line, or name the columns")
        yield pa.record_batch({"url": pa.array([line.decode() for line in lines], pa.string())})
    yield pa.record_batch({"url": pa.array([], pa.string())})


def _checked(batch: pa.RecordBatch, uri: str, url_column: str | None) -> pa.RecordBatch:
    """Check the names of the columns, and rename the one with the URLs."""
    names = batch.schema.names
    if url_column not in (None, "url"):
        if url_column not in names:
            shown = ", ".join(names) or "nothing"
            raise InputError(f"{uri} has no column {url_column!r}, only {shown}; name one of them")
        others = {"url": "user_url", url_column: "url"}
        names = [others.get(name, name) for name in names]
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InputError(f"{uri} has several columns {repeated[0]!r}; keep only one of them")
    return batch.rename_columns(names)


def _simple(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch without dictionaries and metadata; the columns ``TEXT_COLUMNS`` are text."""
    for index, field in enumerate(batch.schema):
        column = batch.column(index)
        if pa.types.is_dictionary(field.type):
            column = column.dictionary_decode()
        column = column.cast(TEXT_COLUMNS.get(field.name, column.type))
        if column.type != field.type:
            batch = batch.set_column(index, pa.field(field.name, column.type), column)
    return batch.replace_schema_metadata(None)


def _joined(parts: Sequence[Path], folder: Path) -> pa.Table:
    """Return the rows of Arrow files as one memory-mapped table."""
    tables = [pa.ipc.open_file(pa.memory_map(str(part))).read_all() for part in parts]
    schemas = {table.schema for table in tables if table.num_rows} or {table.schema for table in tables}
    if len(schemas) <= 1:
        return pa.concat_tables([table for table in tables if table.schema in schemas])
    target = _united([table.schema for table in tables if table.schema in schemas])
    path = folder / "joined.arrow"
    with pa.ipc.new_file(str(path), target) as writer:
        for table in tables:
            for batch in table.to_batches():
                writer.write_batch(_fitted(batch, target))
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _united(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return a schema for the columns of all files; columns of types that do not go together are text."""
    types: dict[str, pa.DataType] = {}
    for field in (field for schema in schemas for field in schema):
        types[field.name] = _wider(types.get(field.name, field.type), field.type)
    return pa.schema(list(types.items()))


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the type of the values of both types; text if there is none."""
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return pa.struct(list(_united([pa.schema(list(one)), pa.schema(list(other))])))
    if pa.types.is_list(one) and pa.types.is_list(other):
        return pa.list_(_wider(one.value_type, other.value_type))
    try:
        schemas = [pa.schema([("x", kind)]) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _fitted(batch: pa.RecordBatch, target: pa.Schema) -> pa.RecordBatch:
    columns = []
    for field in target:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
        else:
            columns.append(_as_type(batch.column(index), field.type))
    return pa.record_batch(columns, schema=target)


def _as_type(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    if column.type == wanted:
        return column
    try:
        return pc.cast(column, wanted)
    except pa.ArrowException:  # lists and structs
        values = column.to_pylist()
        if wanted == pa.string():
            values = [None if one is None else json.dumps(one, ensure_ascii=False, default=str) for one in values]
        return pa.array(values, wanted)


_TABLES: dict[str, Callable[[ListSource, Hints], Batches]] = {
    ".parquet": _read_parquet,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
}
