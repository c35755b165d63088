r"""CSV and TSV files, with the quotes of RFC 4180 or without quotes.

Whether a file uses quotes is decided from the whole file, because a caption may start with ``"`` in a file without
quotes. Such a caption would otherwise swallow the following lines. A file is read

1. with quotes, if every line is a complete row of quoted and plain fields;
2. without quotes, if every line has as many separators as the header;
3. with quotes that span lines, if all quotes are balanced.

Otherwise it is refused, and the message names the first line that does not fit.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from infra.errors import InputError
from infra.formats.list_source import BLOCK_BYTES, MAX_FIELD_BYTES, TEXT_COLUMNS, Hints, ListSource, ReadAgainError

_CONVERSION = re.compile(r"In CSV column #(\d+): .*CSV conversion error to ([^:]+): (?:.*?'(.*)')?", re.S)
_TOO_SMALL = "straddl"  # in pyarrow's message about a row that exceeds its block
_MAX_REPEATED = 900  # RE2 repeats a pattern 1,000 times at most
_SEPARATORS = (";", "\t", "|")
"""Tried in a file .csv whose header has no comma."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """Notation of the fields of a file: separator, quotes, and whether quoted fields span lines."""

    separator: str
    quotes: bool = False
    spans_lines: bool = False
    rows: int | None = None  # without the header; None: not counted


def read_delimited(source: ListSource, hints: Hints) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a CSV or TSV file in batches. A file without any quote is read in one pass.

    Raises:
        ReadAgainError: ``hints`` have changed, and the rows so far are wrong.
        InputError: the quotes are not balanced, or a row is longer than ``MAX_FIELD_BYTES``.
    """
    separator = _separator(source)

    def watch(block: bytes) -> None:
        if b'"' in block:
            hints.quotes = True
            raise ReadAgainError

    if hints.quotes or b'"' in source.head():
        yield from _parse(source, find_dialect(source, separator), hints, None)
    else:
        yield from _parse(source, Dialect(separator=separator), hints, watch)


def find_dialect(source: ListSource, separator: str) -> Dialect:
    """Read a file that contains quotes and return how it uses them. Raises ``InputError`` if that is not consistent."""
    rows = _simple_rows(source, separator)
    if rows is not None:
        return Dialect(separator=separator, quotes=True, rows=rows)
    scan = _Scan(separator.encode())
    for line in source.lines():
        scan.add(line)
    return scan.result()


def _simple_rows(source: ListSource, separator: str) -> int | None:
    """Count the rows if every line is a complete row of quoted and plain fields; None if one is not.

    This is the first rule of the module, checked by pyarrow on many lines at once.
    """
    columns = _Patterns(separator.encode()).separators(source.head().partition(b"\n")[0])
    s = re.escape(separator)
    one = rf'(?:"(?:[^"]|"")*"|[^"{s}][^{s}]*|)'
    whole, rows = rf"^{one}(?:{s}{one}){{{columns}}}$", 0
    if columns > _MAX_REPEATED:
        return None
    for block in source.line_blocks():
        try:
            lines = pacsv.read_csv(
                pa.BufferReader(block),
                read_options=pacsv.ReadOptions(column_names=["line"], block_size=max(len(block), 1)),
                parse_options=pacsv.ParseOptions(delimiter="\1", quote_char=False),
                convert_options=pacsv.ConvertOptions(column_types={"line": pa.binary()}),
            )["line"]
            if not pc.all(pc.match_substring_regex(lines, whole)).as_py():
                return None
        except pa.ArrowInvalid:  # a separator that is not text, or a pattern that is too large
            return None
        rows += len(lines)
    return max(rows - 1, 0)


@dataclass(slots=True)
class _Scan:
    """Reads the lines of a file both with and without quotes."""

    separator: bytes
    lines: int = 0
    rows: int = 0
    columns: int | None = None  # separators of the header
    uneven: int | None = None  # first line without as many
    malformed: int | None = None  # first line whose quotes are wrong
    opened: int | None = None  # line in which the open quoted field starts
    spans: bool = False
    narrow: int | None = None  # first row on one line that has another number of columns with quotes
    patterns: "_Patterns" = field(init=False)

    def __post_init__(self) -> None:
        self.patterns = _Patterns(self.separator)

    def add(self, line: bytes) -> None:
        self.lines += 1
        if not line and self.opened is None:
            return  # as pyarrow does
        count = line.count(self.separator)
        if self.columns is None:
            self.columns = self.patterns.separators(line)
        if self.uneven is None and count != self.columns:
            self.uneven = self.lines
        if self.malformed is None:
            self._add_quoted(line)

    def _add_quoted(self, line: bytes) -> None:
        patterns = self.patterns
        if self.opened is not None:
            self.spans = True
            if patterns.inside.fullmatch(line) or patterns.reopens.fullmatch(line):
                return
            if patterns.closes.fullmatch(line):
                self.opened = None
            else:
                self.malformed = self.opened
            return
        self.rows += 1
        if b'"' not in line:
            return
        if patterns.row.fullmatch(line):
            if self.narrow is None and patterns.separators(line) != self.columns:
                self.narrow = self.lines
        elif patterns.opens.fullmatch(line):
            self.opened = self.lines
        else:
            self.malformed = self.lines

    def result(self) -> Dialect:
        """Choose the dialect by the rules of this module."""
        wrong = self.malformed or self.opened
        separator, rows = self.separator.decode(), max(self.rows - 1, 0)
        if wrong is None and not self.spans and (self.narrow is None or self.uneven is not None):
            return Dialect(separator=separator, quotes=True, rows=rows)
        if self.uneven is None:
            return Dialect(separator=separator)
        if wrong is None:
            return Dialect(separator=separator, quotes=True, spans_lines=True, rows=rows)
        raise InputError(
            f"the quotes in line {wrong} are not balanced, and without quotes line {self.uneven} has another number of "
            "columns; quote every field that contains a quote, and write it twice"
        )


class _Patterns:
    """Lines of a file with quotes, by what they do to a quoted field."""

    def __init__(self, separator: bytes) -> None:
        s = re.escape(separator)
        quoted, text = rb'"(?:[^"]++|"")*+"', rb'(?:[^"]++|"")*+'
        fields = rb'(?:%s|(?!")[^%s]*+)' % (quoted, s)
        more = rb"(?:%s%s)*+" % (s, fields)
        self.row = re.compile(fields + more)
        # A field that stays open is the last one. Fields before it are complete.
        self.opens = re.compile(rb'(?:%s%s)*+"%s' % (fields, s, text))
        self.inside = re.compile(text)
        self.closes = re.compile(rb'%s"%s' % (text, more))
        self.reopens = re.compile(rb'%s"%s(?:%s%s)*+"%s' % (text, s, fields, s, text))
        self._quoted = re.compile(rb"(?:(?<=%s)|^)%s" % (s, quoted))
        self._separator = separator

    def separators(self, row: bytes) -> int:
        """Count the separators of a row outside of quoted fields."""
        return (self._quoted.sub(b"", row) if b'"' in row else row).count(self._separator)


def _separator(source: ListSource) -> str:
    header = source.head().partition(b"\n")[0].decode("utf-8", "replace")
    if source.suffix == ".tsv":
        return "\t"
    if "," in header:
        return ","
    return next((one for one in _SEPARATORS if one in header), ",")


def _parse(
    source: ListSource, dialect: Dialect, hints: Hints, watch: Callable[[bytes], None] | None
) -> Iterator[pa.RecordBatch]:
    """Yield batches; a row that exceeds a block is read with larger blocks."""
    size, rows = BLOCK_BYTES, 0
    while True:
        try:
            for batch in _parse_blocks(source, dialect, hints.types, size, watch):
                rows += batch.num_rows
                yield batch
            break
        except pa.ArrowInvalid as error:
            if _TOO_SMALL in str(error) and not rows and size < MAX_FIELD_BYTES:
                size = MAX_FIELD_BYTES
            elif _TOO_SMALL in str(error):
                raise InputError(f"a row is longer than {size >> 20} MiB; shorten its fields") from error
            else:
                _widen(source, dialect, hints, error)
    if dialect.rows is not None and rows != dialect.rows:
        raise InputError(f"{dialect.rows} rows are read as {rows}; quote every field that contains a quote or newline")


def _parse_blocks(
    source: ListSource,
    dialect: Dialect,
    types: Mapping[str, pa.DataType],
    size: int,
    watch: Callable[[bytes], None] | None,
) -> Iterator[pa.RecordBatch]:
    with source.open(watch) as stream:
        reader = pacsv.open_csv(
            stream,
            read_options=pacsv.ReadOptions(block_size=size),
            parse_options=pacsv.ParseOptions(
                delimiter=dialect.separator,
                quote_char='"' if dialect.quotes else False,
                newlines_in_values=dialect.spans_lines,
            ),
            convert_options=pacsv.ConvertOptions(column_types={**TEXT_COLUMNS, **types}),
        )
        if any(pa.types.is_binary(field.type) for field in reader.schema):
            raise InputError("a column is not UTF-8")
        yield pa.RecordBatch.from_pylist([], reader.schema)  # there may be no rows
        yield from reader


def _widen(source: ListSource, dialect: Dialect, hints: Hints, error: pa.ArrowInvalid) -> None:
    """Change the type of the column that the error is about and raise ``ReadAgainError``; raise other errors again."""
    found = _CONVERSION.search(str(error))
    if found is None:
        raise error
    names = next(csv.reader([source.head().partition(b"\n")[0].decode()], delimiter=dialect.separator))
    name = names[int(found[1])].rstrip("\r")
    if hints.types.get(name) == pa.string():
        raise error
    hints.types[name] = pa.float64() if _is_number(found[3]) and found[2] in ("int64", "null") else pa.string()
    raise ReadAgainError from error


def _is_number(value: str | None) -> bool:
    try:
        return value is not None and bool(float(value) or True)
    except ValueError:
        return False
