"""Logging: standard error, one line a stage. Libraries that chatter are turned down to warnings."""

import logging
import warnings

from infra.text import sanitised

_CHATTER = (
    "alembic", "botocore", "fsspec", "httpx", "matplotlib", "mlflow", "mlflow.store.db.utils", "open_clip", "prefect",
    "ray", "urllib3",
)  # fmt: skip


def setup(verbose: bool = False) -> None:
    """Send logs to standard error, so that standard output stays clean for JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    if not verbose:
        for name in _CHATTER:
            logging.getLogger(name).setLevel(logging.WARNING)
        for name in ("prefect.flow_runs", "prefect.task_runs"):  # they repeat, with a traceback, what is raised anyway
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore")
        logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("knn_diffusion").setLevel(logging.DEBUG if verbose else logging.INFO)


def get(name: str) -> logging.Logger:
    """The project's logger for one station of the line. Every handler gets its records sanitised."""
    logger = logging.getLogger(f"knn_diffusion.{name}")
    logger.addFilter(_sanitise)  # once; a filter of the logger above would not see this one's records
    return logger


def _sanitise(record: logging.LogRecord) -> bool:
    """Replace a record's message by one line without control characters and passwords."""
    record.msg, record.args = sanitised(record.getMessage()), None
    return True


class _Formatter(logging.Formatter):
    """Lines of libraries and tracebacks, sanitised one by one."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(sanitised(line) for line in super().format(record).split("\n"))
