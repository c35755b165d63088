"""Load registered databases and generators, and search databases over several machines."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Resolve the names that generators registered by version 0.1 import from here."""
    if name in ("open_pipeline", "pull_database"):
        from tasks.serve import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
