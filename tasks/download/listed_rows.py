"""Rows of a URL list: what a list may contain, which rows are downloaded, and the digest of the list."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra.download.shard_writer import RESULT_COLUMNS
from infra.errors import InputError
from infra.formats import tables
from infra.formats.image_folder import read_image_folder
from infra.formats.urls import normal_urls
from infra.manifest import canonical_json
from tasks.download.config import DownloadConfig, ListOptions
from tasks.references.takedown import Entries
from tasks.references.url_history import UrlHistory, hash_texts

PREFIX = "user_"
"""Prefix of the user's columns whose names the download uses itself, such as ``key`` and ``width``."""
_DOWNLOADED = frozenset({"url", "key", "status", "error_message"})
"""Columns of the parquet of a shard that this project or img2dataset has downloaded."""
_NOT_FAILED = pa.array(["success", "dropped"])
_BATCH_ROWS = 1 << 18


def read_rows(urls: str | Sequence[str], options: ListOptions) -> pa.Table:
    """Read a URL list, or a folder of images, whose columns do not conflict with those of a download.

    The parquet of a downloaded shard is a list too: its results are removed.

    Raises:
        NotFoundError: the list does not exist.
        InputError: the list cannot be used.
    """
    if options.images:
        listed = pa.concat_tables(
            [read_image_folder(one) for one in ([urls] if isinstance(urls, str) else urls)],
            promote_options="permissive",
        )
        return listed.drop_columns(sorted(RESULT_COLUMNS & set(listed.column_names)))
    table = tables.read_url_list(urls, options.url_column)
    if set(table.column_names) >= _DOWNLOADED:
        if options.only_failed:
            table = table.filter(pc.invert(pc.is_in(table["status"], _NOT_FAILED)))
            if table.num_rows == 0:
                raise InputError(f"no URL of {tables.shown_name(urls)} failed; there is nothing to download again")
        return table.drop_columns(sorted(RESULT_COLUMNS & set(table.column_names)))
    if options.only_failed:
        raise InputError(
            f"{tables.shown_name(urls)} has no outcomes; give --only-failed with the parquet files of a download"
        )
    return table.rename_columns(_free_names(table.column_names))


def _free_names(names: Sequence[str]) -> list[str]:
    """Prefix the names that the download uses itself."""
    taken, renamed = {*names, *RESULT_COLUMNS}, []
    for name in names:
        free = name
        while name in RESULT_COLUMNS and free in taken:
            free = PREFIX + free
        taken.add(free)
        renamed.append(free)
    return renamed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Rows of a list to download, in its order.

    Attributes:
        rows: Row numbers (n,) that are new and not refused.
        repeated: Mask (n,) of those that repeat the URL of an earlier row.
    """

    rows: NDArray[np.int64]
    repeated: NDArray[np.bool_]


def select_rows(table: pa.Table, seen: UrlHistory | None, refused: Entries, config: DownloadConfig) -> Selection:
    """Select the rows to download. URLs are compared in their normal form.

    Rows that are refused are excluded, and those that ``seen`` contains (failed ones unless ``config.retry_failed``).
    """
    wanted, hashes = np.ones(table.num_rows, dtype=np.bool_), np.empty(table.num_rows, dtype=np.uint64)
    refused_urls = pa.array(sorted(refused.url), pa.string())
    for start in range(0, table.num_rows, _BATCH_ROWS):
        listed = table["url"].slice(start, _BATCH_ROWS)
        urls = normal_urls(listed)
        part = slice(start, start + len(urls))
        hashes[part] = hash_texts(urls.to_pylist())
        if len(refused_urls):
            wanted[part] &= ~pc.is_in(urls, refused_urls).to_numpy(zero_copy_only=False)
        if seen is not None:
            wanted[part] &= ~seen.requested(listed.to_pylist(), failed_too=not config.retry_failed)
    rows = np.flatnonzero(wanted)
    repeated = np.ones(len(rows), dtype=np.bool_)
    repeated[np.unique(hashes[rows], return_index=True)[1]] = False
    return Selection(rows=rows, repeated=repeated)


class RowSlice:
    """Some rows of a list. Pickled, it contains only these rows and not the whole list."""

    def __init__(self, table: pa.Table, rows: NDArray[np.int64]) -> None:
        """Refer to ``rows`` of ``table``, which is not copied yet."""
        self._table, self._rows = table, rows

    def read(self) -> pa.Table:
        """Return the rows as a table in memory."""
        return self._table.take(pa.array(self._rows)).combine_chunks()

    def __reduce__(self) -> tuple[Any, ...]:
        sink = pa.BufferOutputStream()
        table = self.read()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return _unpickle, (sink.getvalue().to_pybytes(),)


def _unpickle(data: bytes) -> RowSlice:
    table = pa.ipc.open_stream(data).read_all()
    return RowSlice(table, np.arange(table.num_rows))


def list_digest(table: pa.Table, rows: NDArray[np.int64]) -> str:
    """Return the digest of column names and of the values of ``rows``.

    Types that JSON lacks (dates, bytes, decimals) count as text. The digest is that of :func:`infra.manifest.digest_of`
    of a list of columns, without the whole list in memory.
    """
    digest = hashlib.sha256(("[" + canonical_json(table.column_names)).encode())
    for name in table.column_names:
        digest.update(b",[")
        for number, values in enumerate(_values(table[name], rows)):
            text = canonical_json(json.loads(json.dumps(values, default=str)))[1:-1]
            digest.update(("," if number else "").encode() + text.encode())
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()


def _values(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> Iterator[list[Any]]:
    for start in range(0, len(rows), _BATCH_ROWS):
        yield column.take(pa.array(rows[start : start + _BATCH_ROWS])).to_pylist()
