"""Load registered databases and generators, and search databases over several machines."""

from typing import Any

_FORMER_NAMES = {"open_pipeline": "load_pipeline", "pull_database": "load_database"}


def __getattr__(name: str) -> Any:
    """Resolve the former names of functions, which generators registered by version 0.1 import from here."""
    if name in _FORMER_NAMES:
        from tasks.serve import load

        return getattr(load, _FORMER_NAMES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
