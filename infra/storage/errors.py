"""Translate storage and disk exceptions into project errors, and retry transient ones.

There are three layers of retries, each for failures that the others cannot detect. botocore tries a request twice (a
503, a refused connection). s3fs tries a part or a range twice (a truncated body). :func:`with_retries` retries a whole
call for about ten seconds, then raises ``TransientError``. Prefect then retries the task after 2, 10 and 60 s.
"""

import errno
import functools
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from botocore import exceptions as boto

from infra.errors import InputError, KNNDiffusionError, NotFoundError, StageError, TransientError
from infra.settings import Settings
from infra.uris import HIDDEN, is_s3, masked

T = TypeVar("T")

RETRY_DELAYS_S: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
"""Delay before each retry. Up to half of it is added at random, so that workers do not retry in lockstep."""
RETRY_DEADLINE_S = 60.0
"""No retry starts later than this after the first attempt, which may take long because of timeouts."""

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_STORE_ERRNOS = frozenset({errno.EREMOTEIO, errno.EBUSY})  # s3fs maps 500, 503 and SlowDown to these
_CONFLICTS = frozenset({"409", "ConditionalRequestConflict", "OperationAborted"})  # only these 409 errors are transient
_NO_ACCESS = frozenset({"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})
_DISK_FULL_BYTES = 1 << 20
_SHORT_WRITE = re.compile(rf"{os.strerror(errno.ENOSPC)}|\d+ requested and \d+ written")  # faiss | numpy


def with_retries(
    uri: str,
    call: Callable[[], T],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call ``call`` and return its result, retrying transient errors with backoff.

    Raises the errors of :func:`storage_errors`.
    """
    started = clock()
    for pause in RETRY_DELAYS_S:
        try:
            with storage_errors(uri):
                return call()
        except TransientError:
            if clock() - started > RETRY_DEADLINE_S:
                raise
            sleep(pause * random.uniform(1.0, 1.5))
    with storage_errors(uri):
        return call()


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Translate exceptions of the block, which accesses ``uri``, into project errors with a one-line message.

    Raises:
        NotFoundError: The object or bucket does not exist, or access to it is denied.
        InputError: The URI cannot be used.
        StageError: The disk is full.
        TransientError: The failure is temporary, e.g. an unreachable store.
    """
    try:
        yield
    except KNNDiffusionError:
        raise
    except Exception as error:
        masked_uri = masked(uri)
        translated = _translate(masked_uri, error)
        if HIDDEN in masked_uri:  # the original may quote the whole URI, and a traceback would show it
            raise translated or InputError(f"{masked_uri} cannot be used: {_one_line(error)}; check the URI") from None
        if translated is None:
            raise
        raise translated from error


@contextmanager
def disk_full_errors(folder: Path) -> Iterator[None]:
    """Raise ``StageError`` if the disk fills up while the block writes below ``folder``, whichever library fails."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # faiss raises RuntimeError; numpy an OSError without errno
        if not is_disk_full(error, folder):
            raise
        raise disk_full_error(str(folder)) from error


def disk_full_error(where: str) -> StageError:
    """Return the error for a full disk; ``where`` is the path that could not be written."""
    return StageError(
        f"no space left for {where}; free some space or choose another location (--root, KNN_DIFFUSION_CACHE, TMPDIR) "
        "and run again: committed work is kept"
    )


def error_code(error: BaseException) -> str:
    """Return the store's error code, or "" if the store did not respond. s3fs keeps the code in ``__cause__``."""
    return str(_response_of(error).get("Error", {}).get("Code", ""))


def _response_of(error: BaseException) -> dict[str, Any]:
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _is_transient(error: BaseException) -> bool:
    """Return True if the store, or a proxy in front of it, returned a temporary error. 501 means "not supported"."""
    status = int(_response_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return (status >= 500 and status != 501) or status == 429 or error_code(error) in _CONFLICTS


def _translate(uri: str, error: Exception) -> KNNDiffusionError | None:
    """Return the project error for ``error``, or None if ``error`` does not come from the store."""
    if type(error).__module__ == "boto3.exceptions" and isinstance(error.__context__, Exception):
        error = error.__context__  # an upload by MLflow, which wraps the original error
    reason, code = _one_line(error), error_code(error)
    match error:
        case _ if code == "NoSuchBucket" or code == "InvalidBucketName":
            return NotFoundError(
                f"{uri}: bucket {_bucket(uri)} does not exist{_endpoint_hint(uri)}; create it or choose another root"
            )
        case boto.ClientError() if code in _NO_ACCESS:
            return NotFoundError(
                f"access to {uri} is denied{_endpoint_hint(uri)}: {reason}; check the credentials and the bucket"
            )
        case FileNotFoundError():
            return NotFoundError(f"{uri} does not exist; check the path or run the stage that writes it")
        case PermissionError():
            return NotFoundError(
                f"access to {uri} is denied{_endpoint_hint(uri)}: {reason}; check the credentials and the bucket"
            )
        case boto.NoCredentialsError() | boto.PartialCredentialsError() | boto.ProfileNotFound():
            return NotFoundError(f"no credentials for {uri}: {reason}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        case IsADirectoryError() | NotADirectoryError() | FileExistsError():
            return InputError(f"{uri} cannot be used: {reason}; choose another path")
        case OSError(errno=number) if number in _DISK_FULL:
            return disk_full_error(str(error.filename or uri))
        case OSError(errno=number) if number in _STORE_ERRNOS and _remote(uri):
            return TransientError(
                f"{uri} could not be reached{_endpoint_hint(uri)}: {reason}; check that the store is up and run again"
            )
        case _ if _is_transient(error) or isinstance(error, _transient_types()):
            return TransientError(
                f"{uri} could not be reached{_endpoint_hint(uri)}: {reason}; check that the store is up and run again"
            )
        case boto.BotoCoreError():
            return InputError(f"{uri} cannot be used{_endpoint_hint(uri)}: {reason}; fix the URI or AWS_ENDPOINT_URL")
        case OSError() | boto.ClientError() if code:  # an error response for which there is no exception class
            return InputError(
                f"{uri}: the store rejected the request{_endpoint_hint(uri)}: {code}, {reason}; fix the URI or its "
                "permissions"
            )
    return None


@functools.cache
def _transient_types() -> tuple[type[Exception], ...]:
    """Return the exception types of failed connections. Imported on first use, because aiohttp is slow to import."""
    from aiohttp import ClientError
    from botocore.parsers import ResponseParserError
    from fsspec.exceptions import FSTimeoutError

    return (
        ConnectionError, TimeoutError, socket.gaierror, ClientError, ResponseParserError, FSTimeoutError,
        boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError,
    )  # fmt: skip


def _one_line(error: Exception) -> str:
    """Return the error message on one line, or the error code if there is no message (RadosGW sends codes only)."""
    text = getattr(error, "strerror", None) or str(error)
    if text in {"", "None"}:
        text = error_code(error) or type(error).__name__
    return masked(" ".join(str(text).split()))


def is_disk_full(error: Any, folder: Path) -> bool:
    """Return True if ``error`` means a full disk, or if the disk of ``folder`` has less than 1 MiB free."""
    if getattr(error, "errno", None) in _DISK_FULL or _SHORT_WRITE.search(str(error)):
        return True
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < _DISK_FULL_BYTES


def _remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def _bucket(uri: str) -> str:
    return uri.partition("://")[2].partition("/")[0]


def _endpoint_hint(uri: str) -> str:
    """Return " at <endpoint>" for a custom S3 endpoint: a wrong endpoint is the most common mistake."""
    endpoint = Settings().object_store if is_s3(uri) else None
    return f" at {masked(endpoint)}" if endpoint else ""
