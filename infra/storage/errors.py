"""What object stores and disks raise, as the errors a caller can act on; and what may pass, tried again.

Retries are in three layers, each for what the others do not see: botocore tries a request twice (a 503, a refused
connection), s3fs a part or a range twice (a body cut off), and :func:`patiently` a whole call, for about ten seconds.
Then it is a ``TransientError``, after which the task is tried again 2, 10 and 60 s later.
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
"""Before each further try of a call; up to half as much is added, so that workers do not come back in step."""
RETRY_DEADLINE_S = 60.0
"""A call that has failed for so long already, by timeouts inside it, is not tried again."""

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OUT_OF_ORDER = frozenset({errno.EREMOTEIO, errno.EBUSY})  # what s3fs makes of 500, 503 and SlowDown
_CONFLICTS = frozenset({"409", "ConditionalRequestConflict", "OperationAborted"})  # not every 409 passes
_NO_ACCESS = frozenset({"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})
_DISK_FULL_BYTES = 1 << 20
_SHORT_WRITE = re.compile(rf"{os.strerror(errno.ENOSPC)}|\d+ requested and \d+ written")  # faiss | numpy


def with_retries(uri: str, call: Callable[[], T]) -> T:
    """What ``call`` returns; tried again after a pause while its errors may pass. Raises as :func:`told`."""
    started = time.monotonic()
    for pause in RETRY_DELAYS_S:
        try:
            with storage_errors(uri):
                return call()
        except TransientError:
            if time.monotonic() - started > RETRY_DEADLINE_S:
                raise
            time.sleep(pause * random.uniform(1.0, 1.5))
    with storage_errors(uri):
        return call()


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn what goes wrong at ``uri`` into one of our errors, in one line.

    Raises:
        NotFoundError: no such object, no such bucket, or no access to it.
        InputError: the address cannot be used.
        StageError: the disk is full.
        TransientError: what may pass.
    """
    try:
        yield
    except KNNDiffusionError:
        raise
    except Exception as error:
        shown = masked(uri)
        translated = _translated(shown, error)
        if HIDDEN in shown:  # the original may quote the whole URI, and a traceback would show it
            raise translated or InputError(f"{shown} cannot be used: {_one_line(error)}; check the URI") from None
        if translated is None:
            raise
        raise translated from error


@contextmanager
def disk_full_errors(folder: Path) -> Iterator[None]:
    """Tell of a disk that fills up while the block writes below ``folder``, whichever library finds out."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # faiss raises the latter; numpy an OSError without a number
        if not is_disk_full(error, folder):
            raise
        raise disk_full_error(str(folder)) from error


def disk_full_error(where: str) -> StageError:
    """The disk under ``where`` is full."""
    return StageError(
        f"no space left for {where}; free some, or name another place (--root, KNN_DIFFUSION_CACHE, TMPDIR), and run "
        "again: what is committed stays"
    )


def error_code(error: BaseException) -> str:
    """The store's own name for the error, which s3fs keeps in the cause; empty when it has not answered."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _answer(error: BaseException) -> dict[str, Any]:
    for said in (error, error.__cause__):
        response = getattr(said, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _is_transient(error: BaseException) -> bool:
    """Whether the store, or a proxy before it, has answered with what passes. 501 says that it cannot do it at all."""
    status = int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return (status >= 500 and status != 501) or status == 429 or error_code(error) in _CONFLICTS


def _translated(uri: str, error: Exception) -> KNNDiffusionError | None:
    """Ours for ``error``, or None when it says nothing of the store."""
    if type(error).__module__ == "boto3.exceptions" and isinstance(error.__context__, Exception):
        error = error.__context__  # an upload of MLflow's, which hides the reason behind one of its own
    said, code = _one_line(error), error_code(error)
    match error:
        case _ if code == "NoSuchBucket" or code == "InvalidBucketName":
            return NotFoundError(
                f"{uri}: there is no bucket {_bucket(uri)}{_endpoint_hint(uri)}; make it, or name another root"
            )
        case boto.ClientError() if code in _NO_ACCESS:
            return NotFoundError(
                f"{uri} may not be accessed{_endpoint_hint(uri)} ({said}); check the credentials and the bucket"
            )
        case FileNotFoundError():
            return NotFoundError(f"{uri} does not exist; check the path, or run the stage that writes it")
        case PermissionError():
            return NotFoundError(
                f"{uri} may not be accessed{_endpoint_hint(uri)} ({said}); check the credentials and the bucket"
            )
        case boto.NoCredentialsError() | boto.PartialCredentialsError() | boto.ProfileNotFound():
            return NotFoundError(f"{uri} needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({said})")
        case IsADirectoryError() | NotADirectoryError() | FileExistsError():
            return InputError(f"{uri} cannot be used: {said}; name another path")
        case OSError(errno=number) if number in _DISK_FULL:
            return disk_full_error(str(error.filename or uri))
        case OSError(errno=number) if number in _OUT_OF_ORDER and _remote(uri):
            return TransientError(
                f"{uri} could not be reached{_endpoint_hint(uri)}: {said}; is the store up? then run again"
            )
        case _ if _is_transient(error) or isinstance(error, _transient_types()):
            return TransientError(
                f"{uri} could not be reached{_endpoint_hint(uri)}: {said}; is the store up? then run again"
            )
        case boto.BotoCoreError():
            return InputError(
                f"{uri} cannot be used{_endpoint_hint(uri)}: {said}; mend the address or AWS_ENDPOINT_URL"
            )
        case OSError() | boto.ClientError() if code:  # an answer of the store's that has no class of its own
            return InputError(
                f"{uri}: the store refuses{_endpoint_hint(uri)}: {code}, {said}; mend the address or its rights"
            )
    return None


@functools.cache
def _transient_types() -> tuple[type[Exception], ...]:
    """Errors of connections. Imported when one has happened: aiohttp takes its time."""
    from aiohttp import ClientError
    from botocore.parsers import ResponseParserError
    from fsspec.exceptions import FSTimeoutError

    return (
        ConnectionError, TimeoutError, socket.gaierror, ClientError, ResponseParserError, FSTimeoutError,
        boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError,
    )  # fmt: skip


def _one_line(error: Exception) -> str:
    """What the error says, in one line; RadosGW sends codes without a message."""
    text = getattr(error, "strerror", None) or str(error)
    if text in {"", "None"}:
        text = error_code(error) or type(error).__name__
    return masked(" ".join(str(text).split()))


def is_disk_full(error: Any, folder: Path) -> bool:
    """Whether the disk under ``folder`` is full: by what the error says, or by a look at it."""
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
    """Which store, when it is not Amazon's own: the usual mistake is the wrong one."""
    endpoint = Settings().object_store if is_s3(uri) else None
    return f" at {masked(endpoint)}" if endpoint else ""
