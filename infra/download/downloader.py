"""Download of one shard of a URL list with img2dataset's ``Downloader``, in its webdataset layout.

    NNNNN.tar           KEY.json, KEY.png and, if the list has captions, KEY.txt for each downloaded image
    NNNNN.parquet       one row for each URL: the columns of the list, those of img2dataset, ``error_class``, and
                        ``etag`` and ``last_modified`` of the response
    NNNNN_stats.json    img2dataset's statistics

In addition to img2dataset, fetching is guarded (``infra.download.safe_urlopen``). Images are validated and normalised
(``infra.download.images``) in a process with limits on time and memory (``infra.download.decoder``). Rows and archive
members are in key order, so that equal responses give equal bytes, and every row has a result.
"""

import dataclasses
import functools
import ipaddress
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from annotated_types import Ge, Gt

from infra import storage
from infra.download.decoder import DecodeLimits, ImageBounds, NormaliserProcess
from infra.download.limits import Limits
from infra.download.safe_urlopen import guarded
from infra.download.shard_writer import (
    RESULT_COLUMNS,
    SHARD_DIGITS,
    SPOOL_BYTES,
    ShardCounts,
    ShardWriter,
    count_outcomes,
)
from infra.download.user_agent import require_user_agent
from infra.download.validators import Validators
from infra.errors import ConfigError, InputError
from infra.key_fields import IN_KEY_IF_SET, NOT_IN_KEY
from infra.quiet import set_quiet

SHARD_ROWS, SHARDS = 10_000, 100_000
"""Maximum rows of a shard, and maximum shards: a key is five digits of the shard and four of the row."""

_PILLOW_MAX_PIXELS = 178_956_970  # hard limit of Pillow


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadPolicy:
    """Limits on what may be fetched and for how long, and on which images are accepted.

    Attributes:
        allow_hosts: Entries ``host:port`` whose addresses need not be public, such as 127.0.0.1:8123.
        max_body_bytes: Largest response in bytes.
        deadline_s: Seconds of wall clock for one attempt at a URL, with its redirects and its body.
        timeout_s: Seconds for one operation on a socket.
        max_redirects: Maximum number of redirects to follow.
        max_pixels: Maximum number of pixels of an image, read from its header before anything is decoded.
        min_side_px: Shortest side of an accepted image in px. Trackers have one.
        max_side_px: Longest side in px. Larger images are reduced to it.
        retries: Further attempts after a failure, each with a deadline of its own.
        threads: Concurrent requests of a worker.
        respect_robots_tag: Skip images whose X-Robots-Tag is noai, noimageai, noindex, noimageindex or none.
        user_agent: User agent of the requests. Default: the name, version and address of this project.
        host_rate: Maximum number of requests per second to one host. 0 is unlimited.
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
        tempfile.SpooledTemporaryFile(SPOOL_BYTES, mode="w+b", dir=str(scratch)) as spool,
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
            oom_shard_count=SHARD_DIGITS,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format="png",
            retries=policy.retries,
            user_agent_token=None,  # the guard sets the header
            disallowed_header_directives=None,  # its parser misses most forms; the guard reads them
        )
        downloader.download_shard((shard_id, str(rows_file)))
    return count_outcomes(folder / f"{shard_id:0{SHARD_DIGITS}d}.parquet", seconds=time.monotonic() - started)


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


def _check_rows(shard_id: int, rows: pa.Table) -> None:
    if not 0 <= shard_id < SHARDS:
        raise InputError(f"shard id does not fit {SHARD_DIGITS} digits: {shard_id}; use fewer or larger shards")
    if rows.num_rows > SHARD_ROWS:
        raise InputError(f"shard {shard_id} has more than {SHARD_ROWS} rows: {rows.num_rows}; use smaller shards")
    if "url" not in rows.column_names:
        raise InputError(f"the list has no column url, only {rows.column_names}; rename the column of the URLs to url")
    if not (pa.types.is_string(rows["url"].type) or pa.types.is_large_string(rows["url"].type)):
        raise InputError(f"the column url of the list is not text: {rows['url'].type}; convert it to strings")
    if reserved := sorted(RESULT_COLUMNS & set(rows.column_names)):
        raise InputError(f"the list has columns that the download adds: {reserved}; rename them")


def _is_host_port(entry: str) -> bool:
    """Return True if ``entry`` is ``host:port``, with an IPv6 host in brackets."""
    host, colon, port = entry.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return False
    if not host.startswith("["):
        return not set(host) & set(":/@ []")
    try:
        return host.endswith("]") and bool(ipaddress.IPv6Address(host[1:-1]))
    except ValueError:
        return False
