"""Readers and writers of Parquet tables, and readers of URL lists and texts.

Rows keep the order of the file. Nothing here decodes images.
"""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import uris
from infra.errors import InputError
from infra.formats.lists import read_list, read_texts

_SNIFFED_ROWS = 100


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


def read_url_list(uri: str | Sequence[str], url_column: str | None = None) -> pa.Table:
    """Read a URL list in any format of :func:`infra.formats.lists.read_list`. Columns other than ``url`` are kept.

    A long list is in a memory-mapped temporary file.

    Args:
        uri: Location, or locations, of the list.
        url_column: Column with the URLs, which is renamed. Default: ``url``.

    Raises:
        NotFoundError: The list does not exist.
        InputError: The list cannot be read, is empty, or has no column of URLs.
    """
    table = read_list(uri, "URL", url_column)
    shown = shown_name(uri)
    if "url" not in table.column_names:
        names = ", ".join(table.column_names) or "nothing"
        raise InputError(f"{shown} has no column 'url', only {names}; {_advice(table)}")
    if table.num_rows == 0:
        raise InputError(f"{shown} lists no URL; add at least one row")
    return table


def shown_name(uri: str | Sequence[str]) -> str:
    """Return the location of a list, or of several, for messages and manifests, without secrets."""
    return ", ".join(uris.hide(one) for one in ([uri] if isinstance(uri, str) else uri))


def _advice(table: pa.Table) -> str:
    """Return how to name the column of the URLs: that with the most URLs in the first rows."""
    if any(_is_url(name) for name in table.column_names):
        return "add a header line with the names of the columns"
    first = table.slice(0, _SNIFFED_ROWS)
    counts = {name: sum(map(_is_url, first[name].to_pylist())) for name in table.column_names}
    likely = max(counts, key=lambda name: (counts[name], "url" in name.lower()), default="")
    return f"give --url-column {shlex.quote(likely)}" if counts.get(likely) else "rename the column of the URLs"


def _is_url(value: Any) -> bool:
    return str(value).strip().lower().startswith(("http://", "https://"))


def read_lines(uri: str) -> list[str]:
    """Read texts, stripped and without empty ones: the lines of a text file, or a column of a table.

    Of a parquet, csv, tsv or JSON file, the texts are in the column text, prompt or caption, or in its only column.

    Raises:
        NotFoundError: The file does not exist.
        InputError: The file cannot be read or has no texts.
    """
    uri = uris.hide(uri)
    texts = [text.strip() for text in read_texts(uri)]
    if found := [text for text in texts if text]:
        return found
    raise InputError(f"{uri} is empty; write one text per line")
