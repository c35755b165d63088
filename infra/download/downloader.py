"""Download of one shard of a URL list with img2dataset's ``Downloader``, in its webdataset layout.

    NNNNN.tar           KEY.json, KEY.png and, if the list has captions, KEY.txt for each downloaded image
    NNNNN.parquet       one row for each URL: the columns of the list, those of img2dataset, ``error_class``, and
                        ``etag`` and ``last_modified`` of the response
    NNNNN_stats.json    img2dataset's statistics

In addition to img2dataset, fetching is guarded (``infra.download.safe_urlopen``). Images are validated and normalised
(``infra.download.images``) in a process with limits on time and memory (``infra.download.decoder``). Rows and archive
members are in key order, so that equal responses give equal bytes, and every row has a result.
"""

import base64
import dataclasses
import functools
import ipaddress
import json
import math
import os
import re
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge, Gt

from infra import storage
from infra.download.decoder import DecodeLimits, ImageBounds, NormaliserProcess
from infra.download.limits import Limits
from infra.download.safe_urlopen import guarded
from infra.download.user_agent import require_user_agent
from infra.download.validators import Validators
from infra.errors import ConfigError, InputError
from infra.key_fields import IN_KEY_IF_SET, NOT_IN_KEY
from infra.quiet import set_quiet

SHARD_ROWS, SHARDS = 10_000, 100_000
"""Maximum rows of a shard, and maximum shards: a key is five digits of the shard and four of the row."""

_URL_ERRORS = (
    "invalid_url",
    "blocked_scheme",
    "blocked_address",
    "dns_error",
    "too_many_redirects",
    "robots_disallowed",
)
_TRANSFER_ERRORS = ("connection_error", "timeout", "deadline_exceeded", "body_too_large", "empty_body")
_IMAGE_ERRORS = (
    "not_an_image",
    "unsupported_format",
    "decode_error",
    "too_small",
    "too_many_pixels",
    "too_many_scans",
    "animated",
)
_DECODER_ERRORS = ("decode_timeout", "decode_memory", "decoder_died")
ERROR_CLASSES = frozenset(
    {"success", *_URL_ERRORS, *_TRANSFER_ERRORS, *_IMAGE_ERRORS, *_DECODER_ERRORS, "internal_error"}
)
"""Every outcome of a row's download, in addition to ``http_404`` and other HTTP statuses.

Rows whose image was dropped afterwards have the classes of ``infra.formats.webdataset`` in the same column.
"""

VALIDATOR_COLUMNS = ("etag", "last_modified")
"""Columns with the validators of a response, which a refresh sends back."""

_SPOOL_BYTES = 64 << 20  # images that wait for their turn are held in memory up to this size, then on disk
_SHARD_DIGITS = 5
_ROW_DIGITS = 4
_PILLOW_MAX_PIXELS = 178_956_970  # hard limit of Pillow
_IMAGE_COLUMNS = {"width", "height", "original_width", "original_height", "sha256"}
RESULT_COLUMNS = {"key", "status", "error_message", "error_class", *_IMAGE_COLUMNS}
# Messages of urllib and img2dataset that do not start with an error class; the first match counts.
_MESSAGE_PATTERNS = (
    (r"^HTTP Error 30\d: The HTTP server returned a redirect error", "too_many_redirects"),
    (r"^HTTP Error (\d{3})", r"http_\1"),
    (r"^Use of image disallowed by X-Robots-Tag", "robots_disallowed"),
    (r"^<urlopen error unknown url type", "blocked_scheme"),
    (
        r"^unknown url type|no host given|nonnumeric port|control characters|codec can't|codec failed|IPv6",
        "invalid_url",
    ),
    (r"Name or service not known|name resolution|No address associated|getaddrinfo failed", "dns_error"),
    (r"timed out", "timeout"),
    (r"^<urlopen error|Remote end closed|IncompleteRead|Connection|\[SSL", "connection_error"),
    (r"^Image decoding error", "decode_error"),
    (r"^image too small", "too_small"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadPolicy:
    """Limits on what may be fetched and for how long, and on which images are accepted.

    Attributes:
        allow_hosts: Entries ``host:port`` whose addresses need not be public, such as 127.0.0.1:8123.
        max_body_bytes: Largest response in bytes.
        deadline_s: Seconds of wall clock for one attempt at a URL, with its redirects and its body.
        timeout_s: Seconds for one operation on a socket.
        max_redirects: Most redirects to follow.
        max_pixels: Most pixels of an image, read from its header before anything is decoded.
        min_side_px: Shortest side of an accepted image in px. Trackers have one.
        max_side_px: Longest side in px. Larger images are reduced to it.
        retries: Further attempts after a failure, each with a deadline of its own.
        threads: Concurrent requests of a worker.
        respect_robots_tag: Skip images whose X-Robots-Tag is noai, noimageai, noindex, noimageindex or none.
        user_agent: User agent of the requests. Default: the name, version and address of this project.
        host_rate: Most requests per second to one host. 0 is unlimited.
        max_pause_s: Longest pause in seconds that a server may ask for with Retry-After.
        robots_txt: Skip what robots.txt disallows.
    """

    allow_hosts: tuple[str, ...] = ()
    max_body_bytes: Annotated[int, Ge(1)] = 20_000_000
    deadline_s: Annotated[float, Gt(0)] = 30.0
    timeout_s: Annotated[float, Gt(0)] = 10.0
    max_redirects: Annotated[int, Ge(0)] = 5
    max_pixels: Annotated[int, Ge(1)] = 50_000_000
    min_side_px: Annotated[int, Ge(1)] = 8
    max_side_px: Annotated[int, Ge(1)] = 512
    retries: Annotated[int, Ge(0)] = 1
    threads: Annotated[int, Ge(1)] = 32
    respect_robots_tag: bool = True
    user_agent: str | None = dataclasses.field(default=None, metadata=IN_KEY_IF_SET)
    host_rate: Annotated[float, Ge(0)] = dataclasses.field(default=10.0, metadata=NOT_IN_KEY)
    max_pause_s: Annotated[float, Ge(0)] = dataclasses.field(default=60.0, metadata=NOT_IN_KEY)
    robots_txt: bool = dataclasses.field(default=False, metadata=IN_KEY_IF_SET)

    def __post_init__(self) -> None:
        hosts: object = self.allow_hosts
        if isinstance(hosts, str):
            raise ConfigError(f'allow_hosts is a string, not a tuple; write ("{hosts}",)')
        for entry in self.allow_hosts:
            if not _is_host_port(entry):
                raise ConfigError(f'allow_hosts entry is not host:port: {entry!r}; use the form "127.0.0.1:8123"')
        for name in ("deadline_s", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is not positive and finite: {getattr(self, name)}; give seconds above 0")
        for name in ("max_body_bytes", "max_pixels", "min_side_px", "max_side_px", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is not positive: {getattr(self, name)}; give at least 1")
        for name in ("max_redirects", "retries", "host_rate", "max_pause_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is negative or not finite: {getattr(self, name)}; give at least 0")
        if self.max_pixels > _PILLOW_MAX_PIXELS:
            raise ConfigError(
                f"max_pixels exceeds the limit of Pillow: {self.max_pixels}; give at most {_PILLOW_MAX_PIXELS}"
            )
        if self.max_side_px < self.min_side_px:
            raise ConfigError(f"max_side_px={self.max_side_px} is below min_side_px={self.min_side_px}; raise it")
        if self.user_agent is not None:
            require_user_agent(self.user_agent)

    def limits(self) -> Limits:
        """Return the limits that the URL guard enforces."""
        return Limits(
            allow_hosts=tuple(entry.lower() for entry in self.allow_hosts),
            max_body_bytes=self.max_body_bytes,
            deadline_s=self.deadline_s,
            timeout_s=self.timeout_s,
            max_redirects=self.max_redirects,
            respect_robots_tag=self.respect_robots_tag,
            user_agent=self.user_agent,
            host_rate=self.host_rate,
            max_pause_s=self.max_pause_s,
            robots_txt=self.robots_txt,
        )

    def bounds(self) -> ImageBounds:
        """Return the bounds that the decoder enforces."""
        return ImageBounds(max_pixels=self.max_pixels, min_side_px=self.min_side_px, max_side_px=self.max_side_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCounts:
    """Counts of the outcomes of a shard's URLs."""

    requested: int
    downloaded: int
    outcomes: dict[str, int]  # error class -> rows, "success" included
    seconds: float


def download_shard(
    shard_id: int,
    rows: pa.Table,
    folder: Path,
    policy: DownloadPolicy,
    decode_limits: DecodeLimits | None = None,
    *,
    conditions: Mapping[str, Validators] | None = None,
) -> ShardCounts:
    """Download the ``url`` column of ``rows`` into a shard below ``folder``; other columns are kept.

    A failed URL becomes a row with its error class; the others continue. A process downloads one shard at a time: a
    second thread waits for the first.

    Args:
        shard_id: Number of the shard, below ``SHARDS``.
        rows: At most ``SHARD_ROWS`` rows with a string column ``url`` and optionally ``caption``.
        folder: Local output folder; created if necessary.
        policy: Limits on fetching and on images.
        decode_limits: Limits on decoding; by default those for the largest image that ``policy`` accepts.
        conditions: Validators by URL; an image that has not changed since gets the error class ``http_304``.

    Raises:
        InputError: The rows do not fit a shard, or a column is missing, of the wrong type, or reserved.
        StageError: The disk is full, or the image decoder does not start.
        OSError: Another failure of the disk.
    """
    _check_rows(shard_id, rows)
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with (
        storage.scratch() as scratch,
        tempfile.SpooledTemporaryFile(_SPOOL_BYTES, mode="w+b", dir=str(scratch)) as spool,
        NormaliserProcess(policy.bounds(), decode_limits) as normalise,
        guarded(policy.limits(), conditions=conditions) as opener,
    ):
        rows_file = scratch / "rows.arrow"
        with pa.ipc.new_file(str(rows_file), rows.schema) as sink:
            sink.write_table(rows)
        downloader = _downloader_class(scratch)(
            sample_writer_class=functools.partial(ShardWriter, rows=rows, spool=spool, validators=opener.validators),
            resizer=normalise,
            thread_count=policy.threads,
            save_caption="caption" in rows.column_names,
            extract_exif=False,
            output_folder=str(folder),
            column_list=rows.column_names,
            timeout=policy.timeout_s,
            number_sample_per_shard=SHARD_ROWS,
            oom_shard_count=_SHARD_DIGITS,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format="png",
            retries=policy.retries,
            user_agent_token=None,  # the guard sets the header
            disallowed_header_directives=None,  # its parser misses most forms; the guard reads them
        )
        downloader.download_shard((shard_id, str(rows_file)))
    classes = pq.read_table(folder / f"{shard_id:0{_SHARD_DIGITS}d}.parquet", columns=["error_class"])
    outcomes = Counter(classes["error_class"].to_pylist())
    return ShardCounts(
        requested=rows.num_rows,
        downloaded=outcomes["success"],
        outcomes=dict(sorted(outcomes.items())),
        seconds=time.monotonic() - started,
    )


def _downloader_class(scratch: Path) -> Any:
    """Import and return img2dataset's ``Downloader``.

    The import loads wandb, which creates temporary folders that a killed worker would leave behind. They are created in
    ``scratch``, which is deleted.
    """
    set_quiet()
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        from img2dataset.downloader import Downloader
    finally:
        tempfile.tempdir = before
    return Downloader


def classify_outcome(status: str, error_message: str | None) -> str:
    """Return the error class of a row: the class that its message starts with, or the one that the message implies.

    Args:
        status: img2dataset's status, "success" for a downloaded image.
        error_message: img2dataset's error message, None for a downloaded image.
    """
    if status == "success":
        return "success"
    message = error_message or ""
    head = message.partition(":")[0]
    if head in ERROR_CLASSES or re.fullmatch(r"http_\d{3}", head):
        return head
    for pattern, error_class in _MESSAGE_PATTERNS:
        if found := re.search(pattern, message):
            return found.expand(error_class)
    return "internal_error"


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
        self._keys = [f"{name}{index:0{_ROW_DIGITS}d}" for index in range(rows.num_rows)]
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


def _check_rows(shard_id: int, rows: pa.Table) -> None:
    if not 0 <= shard_id < SHARDS:
        raise InputError(f"shard id does not fit {_SHARD_DIGITS} digits: {shard_id}; use fewer or larger shards")
    if rows.num_rows > SHARD_ROWS:
        raise InputError(f"shard {shard_id} has more than {SHARD_ROWS} rows: {rows.num_rows}; use smaller shards")
    if "url" not in rows.column_names:
        raise InputError(f"the list has no column url, only {rows.column_names}; rename the column of the URLs to url")
    if not (pa.types.is_string(rows["url"].type) or pa.types.is_large_string(rows["url"].type)):
        raise InputError(f"the column url of the list is not text: {rows['url'].type}; convert it to strings")
    if reserved := sorted(RESULT_COLUMNS & set(rows.column_names)):
        raise InputError(f"the list has columns that the download adds: {reserved}; rename them")


def _is_host_port(entry: str) -> bool:
    """Return True if ``place`` is ``host:port``, with an IPv6 host in brackets."""
    host, colon, port = entry.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return False
    if not host.startswith("["):
        return not set(host) & set(":/@ []")
    try:
        return host.endswith("]") and bool(ipaddress.IPv6Address(host[1:-1]))
    except ValueError:
        return False
