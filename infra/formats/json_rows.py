"""JSON lists: one object per line, an array of objects, or indented objects one after the other."""

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json as pajson

from infra.errors import InputError
from infra.formats.list_source import MAX_FIELD_BYTES, Hints, ListSource, ReadAgainError

_OBJECTS = 10_000  # of an array, parsed at a time
_SPACE = " \t\r\n"


def read_json(source: ListSource, hints: Hints) -> Iterator[pa.RecordBatch]:
    """Yield the objects of a file in batches, which may differ in their columns and types.

    A column of mixed types becomes text: strings as they are, other values as JSON.

    Raises:
        ReadAgainError: ``hints`` have changed, and the rows so far are wrong.
        InputError: a value is not an object, or is longer than ``MAX_FIELD_BYTES``.
    """
    texts: set[str] = set()
    times: set[str] = set()
    for block in source.line_blocks() if _is_line_delimited(source) else _value_blocks(source):
        table = _parse(block, hints)
        table.validate(full=True)  # the parser does not check that text is UTF-8
        for field in table.schema:
            (times if pa.types.is_timestamp(field.type) else texts if field.type == pa.string() else set()).add(
                field.name
            )
        for name in texts & times:  # text that looks like a time in one block only
            hints.types[name] = pa.string()
        if texts & times:
            raise ReadAgainError
        yield from table.to_batches()


def _parse(block: bytes, hints: Hints) -> pa.Table:
    options = pajson.ParseOptions(explicit_schema=pa.schema(list(hints.types.items())) if hints.types else None)
    if not block.strip():
        return pa.table({})
    for size in (1 << 20, len(block)):
        try:
            table = pajson.read_json(io.BytesIO(block), pajson.ReadOptions(block_size=size), options)
        except pa.ArrowInvalid as error:
            if "straddl" in str(error) and size < len(block):
                continue
            if "changed from" not in str(error):
                raise
            break
        unknown = [name for name in hints.types if table[name].null_count == table.num_rows]
        return table.drop_columns(unknown)  # given in the schema, but not in this block
    return _mixed(block)


def _mixed(block: bytes) -> pa.Table:
    """Parse objects in Python, where the types of a column may differ."""
    rows = [json.loads(line) for line in block.splitlines() if line.strip()]
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: column_of([row.get(name) for row in rows]) for name in names})


def column_of(values: list[Any]) -> pa.Array:
    """Return a column of parsed JSON values; values of mixed types become text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        texts = (one if one is None or isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in values)
        return pa.array(list(texts), pa.string())


def _is_line_delimited(source: ListSource) -> bool:
    """Return True if the first line is a whole object."""
    if source.head().lstrip()[:1] == b"[":
        return False
    first = next((line for line in source.lines() if line.strip()), b"{}")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _value_blocks(source: ListSource) -> Iterator[bytes]:
    """Yield the objects of an array, or of values one after the other, as blocks of lines."""
    objects: list[str] = []
    for value in _values(source):
        if not isinstance(value, dict):
            raise InputError(f"value {len(objects) + 1} is not an object but {json.dumps(value)[:40]}; use objects")
        objects.append(json.dumps(value))
        if len(objects) == _OBJECTS:
            yield "\n".join(objects).encode()
            objects.clear()
    if objects:
        yield "\n".join(objects).encode()


def _values(source: ListSource) -> Iterator[Any]:
    """Yield the values of the outermost array, or of the file. Only the text of one value and block is in memory."""
    decoder, text, position, first, in_array = json.JSONDecoder(), "", 0, True, False
    blocks = _text_blocks(source)
    while True:
        while position < len(text) and text[position] in _SPACE + ("," if in_array else ""):
            position += 1
        if position < len(text) and first:
            first, in_array = False, text[position] == "["
            position += in_array
            continue
        if in_array and text[position : position + 1] == "]":
            if (text[position + 1 :] + "".join(blocks)).strip():
                raise InputError("there is text after the array; remove it")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError:
            block = next((block for block in blocks if block), "")
            if not block:
                if in_array or text[position:].strip():
                    raise
                return
            text, position = text[position:] + block, 0
            if len(text) > 2 * MAX_FIELD_BYTES:
                raise InputError(f"a value is longer than {MAX_FIELD_BYTES >> 20} MiB, or is not JSON") from None
            continue
        yield value


def _text_blocks(source: ListSource) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in source.blocks(4 << 20):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)
