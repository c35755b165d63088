"""Errors of the service. The API answers each with a status of its own; the page shows the message."""

import contextlib
import re
from collections.abc import Iterator

from infra import logs
from infra.errors import KNNDiffusionError, StageError
from infra.text import sanitised
from model.errors import ModelError

_PLACE = re.compile(r"""(?<![\w:.])(?:[a-z][a-z0-9+.-]*:)?/{1,4}[\w.@:~-]+/[^\s,;'")]*""", re.ASCII)
"""An absolute path, or a URI below a host. ``models:/NAME`` is a name."""


class QueueFullError(KNNDiffusionError):
    """Raised when the queue is full. ``retry_after_s`` is the expected time until a place is free, in seconds."""

    def __init__(self, line: str, *, retry_after_s: float) -> None:
        """Store the message and the time to wait."""
        super().__init__(line)
        self.retry_after_s = retry_after_s


class UnknownDatabaseError(KNNDiffusionError):
    """Raised when a request names a database that is not served."""


class DatabaseUnavailableError(KNNDiffusionError):
    """Raised when a served version can no longer answer: its files were deleted, or are damaged."""


class ServiceClosedError(KNNDiffusionError):
    """Raised when the service is shutting down."""


class JobCancelledError(KNNDiffusionError):
    """Raised by the result of a job that was cancelled."""


@contextlib.contextmanager
def expected_errors() -> Iterator[None]:
    """Raise ``StageError`` instead of any error that has no message for users. The log has the traceback.

    Damaged files and exhausted memory raise the errors of many libraries. None of them may stop a thread.
    """
    try:
        yield
    except (KNNDiffusionError, ModelError):
        raise
    except Exception as error:
        logs.get("serve").error("an unexpected error", exc_info=error)
        raise StageError(f"{type(error).__name__}; see the log of the service") from error


def public_message(error: BaseException) -> str:
    """Return the message of an error on one line, without paths, URIs and passwords."""
    line = " ".join(sanitised(str(error)).split())
    return _PLACE.sub(lambda match: match[0] if match[0].startswith("models:/") else "…", line)
