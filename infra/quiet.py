"""Environment variables that switch off usage reports, update checks and start-up banners of libraries."""

import os

QUIET = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # else each registration prints a line about its input example
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is for results
    "NO_ALBUMENTATIONS_UPDATE": "1",  # else importing img2dataset looks for a newer version on the network
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Values by variable. Libraries read most of them at import."""


def set_quiet() -> None:
    """Set the variables in this process and its children; values that the user has set remain."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
