"""Import of one shard of image files, in the layout and through the decoder of a download."""

import hashlib
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa

from infra import storage
from infra.download.decoder import DecodeLimits, NormaliserProcess
from infra.download.downloader import DownloadPolicy
from infra.download.shard_writer import ROW_DIGITS, SHARD_DIGITS, SPOOL_BYTES, ShardCounts, ShardWriter, count_outcomes
from infra.errors import KNNDiffusionError
from infra.formats.image_folder import SOURCE_COLUMNS, read_source

_RESULT = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        ("sha256", pa.string()),
    ]
)


def import_shard(
    shard_id: int, rows: pa.Table, folder: Path, policy: DownloadPolicy, decode_limits: DecodeLimits | None = None
) -> ShardCounts:
    """Read the image files of ``rows`` into a shard below ``folder``, as :func:`download_shard` does with URLs.

    A file that cannot be read or decoded becomes a row with its error class; the others continue.

    Args:
        shard_id: Number of the shard.
        rows: Rows of :func:`infra.formats.image_folder.read_image_folder`.
        folder: Local output folder; created if necessary.
        policy: Limits on images, and on the bytes of a file.
        decode_limits: Limits on decoding; by default those for the largest image that ``policy`` accepts.

    Raises:
        StageError: The image decoder does not start.
        OSError: The disk is full, or another failure of it.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    kept = rows.drop_columns(list(SOURCE_COLUMNS))
    with (
        storage.scratch() as scratch,
        tempfile.SpooledTemporaryFile(SPOOL_BYTES, mode="w+b", dir=str(scratch)) as spool,
        NormaliserProcess(policy.bounds(), decode_limits) as normalise,
    ):
        has_captions = "caption" in kept.column_names
        writer = ShardWriter(
            shard_id, str(folder), has_captions, SHARD_DIGITS, _RESULT, "png", rows=kept, spool=spool, validators={}
        )  # fmt: skip
        for index, row in enumerate(rows.to_pylist()):
            key = f"{shard_id:0{SHARD_DIGITS}d}{index:0{ROW_DIGITS}d}"
            meta = {name: value for name, value in row.items() if name not in SOURCE_COLUMNS}
            png, result = _read(row, policy, normalise)
            writer.write(png, key, row.get("caption"), {**meta, "key": key, **result})
        writer.close()
    return count_outcomes(folder / f"{shard_id:0{SHARD_DIGITS}d}.parquet", seconds=time.monotonic() - started)


def _read(
    row: dict[str, Any], policy: DownloadPolicy, normalise: Callable[[BytesIO], tuple[Any, ...]]
) -> tuple[bytes | None, dict[str, Any]]:
    """Return the normalised image of a row, and the columns of its result."""
    failed: dict[str, Any] = {"status": "failed_to_download"}
    if row["source_bytes"] > policy.max_body_bytes:
        return None, {**failed, "error_message": f"body_too_large: {row['source_bytes']} bytes"}
    try:
        data = read_source(row)
    except (OSError, KNNDiffusionError) as error:
        return None, {**failed, "error_message": f"connection_error: the file cannot be read ({error})"}
    if len(data) != row["source_bytes"]:
        return None, {**failed, "error_message": "connection_error: the file has changed since it was listed"}
    png, *sizes, message = normalise(BytesIO(data))
    if message is not None:
        return None, {"status": "failed_to_resize", "error_message": message}
    names = ("width", "height", "original_width", "original_height")
    result = {"status": "success", "error_message": None, "sha256": hashlib.sha256(data).hexdigest()}
    return png, {**result, **dict(zip(names, sizes, strict=True))}
