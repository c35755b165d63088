"""Logging: standard error, one line a stage. Libraries that chatter are turned down to warnings."""

import logging
import warnings

_CHATTER = (
    "alembic", "botocore", "fsspec", "httpx", "matplotlib", "mlflow", "mlflow.store.db.utils", "open_clip", "prefect",
    "ray", "urllib3",
)  # fmt: skip


def setup(verbose: bool = False) -> None:
    """Send logs to standard error, so that standard output stays clean for JSON."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    if not verbose:
        for name in _CHATTER:
            logging.getLogger(name).setLevel(logging.WARNING)
        for name in ("prefect.flow_runs", "prefect.task_runs"):  # they repeat, with a traceback, what is raised anyway
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore")
        logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("knn_diffusion").setLevel(logging.DEBUG if verbose else logging.INFO)


def get(name: str) -> logging.Logger:
    """The project's logger for one station of the line."""
    return logging.getLogger(f"knn_diffusion.{name}")
