"""Logging to standard error, one line per stage. Verbose libraries log only warnings."""

import logging
import os
import warnings

from infra.text import sanitised

_VERBOSE_LIBRARIES = (
    "alembic", "botocore", "fsspec", "httpx", "matplotlib", "mlflow", "mlflow.store.db.utils", "open_clip", "prefect",
    "ray", "urllib3",
)  # fmt: skip


def setup(verbose: bool = False) -> None:
    """Send logs to standard error, so that standard output can be pure JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    if not verbose:
        for name in _VERBOSE_LIBRARIES:
            logging.getLogger(name).setLevel(logging.WARNING)
        for name in ("prefect.flow_runs", "prefect.task_runs"):  # they log tracebacks of errors that are raised, too
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore")
        logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("knn_diffusion").setLevel(logging.DEBUG if verbose else logging.INFO)


def show_progress() -> None:
    """Show the lines of the stages, unless a level has been set. Prefect adds a handler, but its level is WARNING."""
    logger = logging.getLogger("knn_diffusion")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def get(name: str) -> logging.Logger:
    """Return the project's logger of one component. Its records are sanitised before any handler sees them."""
    logger = logging.getLogger(f"knn_diffusion.{name}")
    logger.addFilter(_sanitise)  # added once; filters of a parent logger do not see the records of its children
    return logger


def _sanitise(record: logging.LogRecord) -> bool:
    """Replace a record's message with one line without control characters and passwords."""
    record.msg, record.args = sanitised(record.getMessage()), None
    return True


class _Formatter(logging.Formatter):
    """Formatter that sanitises each line of libraries' messages and of tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(sanitised(line) for line in super().format(record).split("\n"))


if "PREFECT__FLOW_RUN_ID" in os.environ:  # a Prefect worker started this process for one flow run
    show_progress()
