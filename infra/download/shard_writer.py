"""Files of a shard of images: a tar and a parquet file, with members and rows in key order."""

import base64
import json
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.download.outcomes import classify_outcome
from infra.download.validators import Validators

SHARD_DIGITS, ROW_DIGITS = 5, 4
"""Digits of the shard and of the row in a key."""
SPOOL_BYTES = 64 << 20
"""Images that wait for their turn are held in memory up to this size, then on disk."""
VALIDATOR_COLUMNS = ("etag", "last_modified")
"""Columns with the validators of a response, which a refresh sends back."""
_IMAGE_COLUMNS = {"width", "height", "original_width", "original_height", "sha256"}
RESULT_COLUMNS = {"key", "status", "error_message", "error_class", *_IMAGE_COLUMNS}
"""Columns that a download adds to those of the list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCounts:
    """Counts of the outcomes of a shard's URLs."""

    requested: int
    downloaded: int
    outcomes: dict[str, int]  # error class -> rows, "success" included
    seconds: float


class ShardWriter:
    """A replacement for img2dataset's sample writer that receives samples in any order and writes them in key order.

    An image waits in ``spool`` until all images before it have arrived, because a shard may not fit in memory.
    """

    def __init__(
        self,
        shard_id: int,
        output_folder: str,
        save_caption: bool,
        oom_shard_count: int,
        schema: pa.Schema,
        encode_format: str,
        *,
        rows: pa.Table,
        spool: IO[bytes],
        validators: Mapping[str, Validators],
    ) -> None:
        """Open the tar; the other arguments than ``rows`` and ``spool`` are those of img2dataset."""
        name = f"{shard_id:0{oom_shard_count}d}"
        self._stem = Path(output_folder) / name
        self._keys = [f"{name}{index:0{ROW_DIGITS}d}" for index in range(rows.num_rows)]
        self._save_caption = save_caption
        self._schema = schema
        self._suffix = encode_format
        self._rows = rows
        self._spool = spool
        self._validators = validators
        self._results: dict[str, dict[str, Any]] = {}
        self._images: dict[str, tuple[int, int]] = {}  # key -> offset and size in the spool
        self._failure: OSError | None = None
        self._written = 0
        self._tar = tarfile.open(self._stem.with_suffix(".tar"), "w")  # noqa: SIM115  # close() closes it

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """Add the result of a row, with its image if there is one. Raises ``OSError``."""
        try:
            if img_str is not None:
                self._images[key] = (self._spool.seek(0, os.SEEK_END), len(img_str))
                self._spool.write(img_str)
            self._results[key] = meta
            while self._written < len(self._keys) and self._keys[self._written] in self._results:
                self._add_next()  # while other images are still being downloaded
        except OSError as error:  # img2dataset would swallow the error of a full disk as a failed row
            self._failure = error
            raise

    def close(self) -> None:
        """Write the remaining samples and the parquet file. Raises ``OSError``."""
        with self._tar:
            if self._failure is not None:
                raise self._failure
            while self._written < len(self._keys):
                self._add_next()
        results = [self._results.get(key) or _missing_result(key) for key in self._keys]
        table = self._rows.combine_chunks()
        for field in self._schema:
            if field.name in RESULT_COLUMNS:
                values = [result.get(field.name) for result in results]
                table = table.append_column(field, pa.array(values, field.type))
        classes = [classify_outcome(result["status"], result["error_message"]) for result in results]
        table = table.append_column(pa.field("error_class", pa.string()), pa.array(classes, pa.string()))
        table = self._with_validators(table, classes)
        pq.write_table(table, self._stem.with_suffix(".parquet"))

    def _with_validators(self, table: pa.Table, classes: list[str]) -> pa.Table:
        """Append the validators of the downloaded images, unless the list has columns of these names."""
        responses = [
            self._validators.get((url or "").strip(), Validators()) if error_class == "success" else Validators()
            for url, error_class in zip(table["url"].to_pylist(), classes, strict=True)
        ]
        for name in VALIDATOR_COLUMNS:
            if name not in table.column_names:
                values = pa.array([getattr(response, name) for response in responses], pa.string())
                table = table.append_column(pa.field(name, pa.string()), values)
        return table

    def _add_next(self) -> None:
        """Append the next sample in key order, if it has an image."""
        key = self._keys[self._written]
        self._written += 1
        if key not in self._images:
            return
        meta = self._results[key]
        offset, size = self._images.pop(key)
        self._spool.seek(offset)
        members = {"json": json.dumps(meta, default=_json_value).encode(), self._suffix: self._spool.read(size)}
        if self._save_caption:
            members["txt"] = ("" if meta["caption"] is None else str(meta["caption"])).encode()
        for suffix, data in members.items():
            member = tarfile.TarInfo(f"{key}.{suffix}")  # no owner and no time: the same bytes on every run
            member.size = len(data)
            self._tar.addfile(member, BytesIO(data))


def _json_value(value: Any) -> str:
    """Return a value that JSON lacks as text: bytes in base64, dates and decimals as they are printed."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _missing_result(key: str) -> dict[str, Any]:
    """Return the result of a row that img2dataset did not write: it swallows exceptions in a sample."""
    message = "internal_error: img2dataset returned no result for this row; see its log for the traceback"
    return {"key": key, "status": "failed_to_download", "error_message": message}


def count_outcomes(parquet: Path, *, seconds: float) -> ShardCounts:
    """Count the outcomes in the parquet file of a shard, which took ``seconds``."""
    outcomes = Counter(pq.read_table(parquet, columns=["error_class"])["error_class"].to_pylist())
    return ShardCounts(
        requested=outcomes.total(),
        downloaded=outcomes["success"],
        outcomes=dict(sorted(outcomes.items())),
        seconds=seconds,
    )
