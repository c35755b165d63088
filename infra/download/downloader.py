"""One shard of a URL list downloaded into img2dataset's webdataset layout, by img2dataset's own ``Downloader``.

    NNNNN.tar           KEY.json, KEY.png and, when the list has captions, KEY.txt for each picture taken
    NNNNN.parquet       one row for each URL asked for: the list's columns, img2dataset's, and ``error_class``
    NNNNN_stats.json    img2dataset's statistics

In addition to img2dataset, fetching is guarded (``infra.download.safe_urlopen``). Images are validated and normalised
(``infra.download.images``) in a process with limits on time and memory (``infra.download.decoder``). Rows and members
are in key order, so that the same answers give the same bytes, and no row is lost.
"""

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
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.download.decoder import DecodeLimits, ImageBounds, NormaliserProcess
from infra.download.limits import Limits
from infra.download.safe_urlopen import guarded
from infra.errors import InputError

SHARD_ROWS, SHARDS = 10_000, 100_000
"""Most rows of a shard, and most shards: a key is five digits of the shard and four of the row."""

_OF_URLS = ("invalid_url", "blocked_scheme", "blocked_address", "dns_error", "too_many_redirects", "robots_disallowed")
_OF_TRANSFERS = ("connection_error", "timeout", "deadline_exceeded", "body_too_large", "empty_body")
_OF_IMAGES = ("not_an_image", "decode_error", "too_small", "too_many_pixels", "too_many_scans", "animated")
_OF_DECODING = ("decode_timeout", "decode_memory", "decoder_died")
ERROR_CLASSES = frozenset({"success", *_OF_URLS, *_OF_TRANSFERS, *_OF_IMAGES, *_OF_DECODING, "internal_error"})
"""Every outcome of a row's download, besides ``http_404`` and its like.

Rows whose picture was left out afterwards have those of ``infra.formats.webdataset`` in the same column.
"""

_SPOOL_BYTES = 64 << 20  # of pictures that wait for their turn are held in memory, more on disk
_SHARD_DIGITS = 5
_ROW_DIGITS = 4
_PILLOW_MOST_PIXELS = 178_956_970  # Pillow refuses more, whatever is asked for
_IMAGE_COLUMNS = {"width", "height", "original_width", "original_height", "sha256"}
_RESULT_COLUMNS = {"key", "status", "error_message", "error_class", *_IMAGE_COLUMNS}
# What urllib and img2dataset say where no class heads the message; the first pattern found counts.
_MESSAGE_PATTERNS = (
    (r"^HTTP Error 30\d: The HTTP server returned a redirect error", "too_many_redirects"),
    (r"^HTTP Error (\d{3})", r"http_\1"),
    (r"^Use of image disallowed by X-Robots-Tag", "robots_disallowed"),
    (r"^<urlopen error unknown url type", "blocked_scheme"),
    (r"^unknown url type|no host given|nonnumeric port|control characters|codec can't|codec failed", "invalid_url"),
    (r"Name or service not known|name resolution|No address associated|getaddrinfo failed", "dns_error"),
    (r"timed out", "timeout"),
    (r"^<urlopen error|Remote end closed|IncompleteRead|Connection|\[SSL", "connection_error"),
    (r"^Image decoding error", "decode_error"),
    (r"^image too small", "too_small"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadPolicy:
    """What may be fetched, how long that may take, and which pictures are taken."""

    allow_hosts: tuple[str, ...] = ()  # "host:port" entries whose addresses need not be public ("127.0.0.1:8123")
    max_body_bytes: int = 20_000_000
    deadline_s: float = 30.0  # wall clock for one attempt at a URL, its redirects and its body included
    timeout_s: float = 10.0  # for one socket operation
    max_redirects: int = 5
    max_pixels: int = 50_000_000  # read from the header, before anything is decoded
    min_side_px: int = 8  # trackers are 1x1
    max_side_px: int = 512  # the longer side is reduced to this
    retries: int = 1  # further attempts after any failure, each with a deadline of its own
    threads: int = 32
    respect_robots_tag: bool = True  # X-Robots-Tag: noai, noimageai, noindex, noimageindex, none

    def __post_init__(self) -> None:
        hosts: object = self.allow_hosts
        if isinstance(hosts, str):
            raise ValueError(f'allow_hosts is a tuple: write ("{hosts}",)')
        for place in self.allow_hosts:
            if not _is_place(place):
                raise ValueError(f'allow_hosts: {place!r} is no host and port; write it like "127.0.0.1:8123"')
        for name in ("deadline_s", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of seconds above 0")
        for name in ("max_body_bytes", "max_pixels", "min_side_px", "max_side_px", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("max_redirects", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 for none")
        if self.max_pixels > _PILLOW_MOST_PIXELS:
            raise ValueError(f"max_pixels is {self.max_pixels}; Pillow decodes at most {_PILLOW_MOST_PIXELS}")
        if self.max_side_px < self.min_side_px:
            raise ValueError(f"max_side_px={self.max_side_px} is below min_side_px={self.min_side_px}; raise it")

    def limits(self) -> Limits:
        """The part that the guard enforces."""
        return Limits(
            allow_hosts=tuple(place.lower() for place in self.allow_hosts),
            max_body_bytes=self.max_body_bytes,
            deadline_s=self.deadline_s,
            timeout_s=self.timeout_s,
            max_redirects=self.max_redirects,
            respect_robots_tag=self.respect_robots_tag,
        )

    def bounds(self) -> ImageBounds:
        """The part that the decoder enforces."""
        return ImageBounds(max_pixels=self.max_pixels, min_side_px=self.min_side_px, max_side_px=self.max_side_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCounts:
    """What became of a shard's URLs."""

    requested: int
    downloaded: int
    outcomes: dict[str, int]  # error class -> rows, "success" included
    seconds: float


def download_shard(
    shard_id: int, rows: pa.Table, folder: Path, policy: DownloadPolicy, decode_limits: DecodeLimits | None = None
) -> ShardCounts:
    """Download the ``url`` column of ``rows`` into shard ``shard_id`` below ``folder``; other columns are kept.

    A URL that fails is a row with its error class and no reason to stop. Raises ``InputError`` for rows that cannot
    make a shard, and what the disk raises. One shard at a time in a process: a second thread waits for the first.
    ``decode_limits`` are by default those for the policy's largest image.
    """
    _check_rows(shard_id, rows)
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with (
        storage.scratch() as scratch,
        tempfile.SpooledTemporaryFile(_SPOOL_BYTES, mode="w+b", dir=str(scratch)) as spool,
        NormaliserProcess(policy.bounds(), decode_limits) as normalise,
        guarded(policy.limits()),
    ):
        rows_file = scratch / "rows.arrow"
        with pa.ipc.new_file(str(rows_file), rows.schema) as sink:
            sink.write_table(rows)
        downloader = _downloader_class(scratch)(
            sample_writer_class=functools.partial(_ShardWriter, rows=rows, spool=spool),
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
            user_agent_token="img2dataset",  # noqa: S106  # no secret: the name by which a site may refuse it
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
    """img2dataset's ``Downloader``, imported.

    With it comes wandb, whose folders for temporary files would outlive a worker that is ended; ``scratch`` goes.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing img2dataset asks PyPI for a newer version
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        from img2dataset.downloader import Downloader
    finally:
        tempfile.tempdir = before
    return Downloader


def classify_outcome(status: str, error_message: str | None) -> str:
    """The error class of a row of the parquet: the one its message starts with, or what the message means."""
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


class _ShardWriter:
    """Stands in for img2dataset's sample writer: takes samples in any order, and writes them in key order.

    A picture waits in ``spool`` until all before it have come: a shard's worth may not fit in memory.
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
    ) -> None:
        name = f"{shard_id:0{oom_shard_count}d}"
        self._stem = Path(output_folder) / name
        self._keys = [f"{name}{index:0{_ROW_DIGITS}d}" for index in range(rows.num_rows)]
        self._save_caption = save_caption
        self._schema = schema
        self._suffix = encode_format
        self._rows = rows
        self._spool = spool
        self._results: dict[str, dict[str, Any]] = {}
        self._pictures: dict[str, tuple[int, int]] = {}  # key -> offset and size in the spool
        self._failure: OSError | None = None
        self._written = 0
        self._tar = tarfile.open(self._stem.with_suffix(".tar"), "w")  # noqa: SIM115  # close() closes it

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        try:
            if img_str is not None:
                self._pictures[key] = (self._spool.seek(0, os.SEEK_END), len(img_str))
                self._spool.write(img_str)
            self._results[key] = meta
            while self._written < len(self._keys) and self._keys[self._written] in self._results:
                self._add_next()  # while others are still downloaded
        except OSError as error:  # img2dataset would swallow a full disk as a lost row
            self._failure = error
            raise

    def close(self) -> None:
        with self._tar:
            if self._failure is not None:
                raise self._failure
            while self._written < len(self._keys):
                self._add_next()
        results = [self._results.get(key) or _missing_result(key) for key in self._keys]
        table = self._rows.combine_chunks()
        for field in self._schema:
            if field.name in _RESULT_COLUMNS:
                values = [result.get(field.name) for result in results]
                table = table.append_column(field, pa.array(values, field.type))
        classes = [classify_outcome(result["status"], result["error_message"]) for result in results]
        table = table.append_column(pa.field("error_class", pa.string()), pa.array(classes, pa.string()))
        pq.write_table(table, self._stem.with_suffix(".parquet"))

    def _add_next(self) -> None:
        """Append the sample whose turn it is, if it has a picture."""
        key = self._keys[self._written]
        self._written += 1
        if key not in self._pictures:
            return
        meta = self._results[key]
        offset, size = self._pictures.pop(key)
        self._spool.seek(offset)
        members = {"json": json.dumps(meta, default=str).encode(), self._suffix: self._spool.read(size)}
        if self._save_caption:
            members["txt"] = ("" if meta["caption"] is None else str(meta["caption"])).encode()
        for suffix, data in members.items():
            member = tarfile.TarInfo(f"{key}.{suffix}")  # no owner and no time: the same bytes on every run
            member.size = len(data)
            self._tar.addfile(member, BytesIO(data))


def _missing_result(key: str) -> dict[str, Any]:
    """The result of a row for which img2dataset, which swallows what goes wrong in a sample, has written nothing."""
    message = "internal_error: img2dataset gave no result for this row; its log has the traceback"
    return {"key": key, "status": "failed_to_download", "error_message": message}


def _check_rows(shard_id: int, rows: pa.Table) -> None:
    if not 0 <= shard_id < SHARDS:
        raise InputError(f"shard {shard_id} has no key of {_SHARD_DIGITS} digits; use fewer or larger shards")
    if rows.num_rows > SHARD_ROWS:
        raise InputError(f"shard {shard_id} has {rows.num_rows} rows, but keys for {SHARD_ROWS}; use smaller shards")
    if "url" not in rows.column_names:
        raise InputError(f"the list has no column url, only {rows.column_names}; rename the one with the addresses")
    if not (pa.types.is_string(rows["url"].type) or pa.types.is_large_string(rows["url"].type)):
        raise InputError(f"the list's column url is {rows['url'].type}; make it text")
    if taken := sorted(_RESULT_COLUMNS & set(rows.column_names)):
        raise InputError(f"the list has columns {taken}, which the download writes itself; rename them")


def _is_place(place: str) -> bool:
    """Whether ``place`` is ``host:port``, an IPv6 host in brackets."""
    host, colon, port = place.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return False
    if not host.startswith("["):
        return not set(host) & set(":/@ []")
    try:
        return host.endswith("]") and bool(ipaddress.IPv6Address(host[1:-1]))
    except ValueError:
        return False
