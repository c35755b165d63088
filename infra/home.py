"""``KNN_DIFFUSION_HOME``: one folder for the state that this project and its libraries otherwise keep in the user's.

Containers often run with a user id that has no account, a home folder that nobody can write to, or a read-only file
system. Libraries read these variables at import, so :func:`set_home` must run before they are imported.
"""

import os
import pwd
from collections.abc import MutableMapping
from pathlib import Path

from infra.errors import InputError

VARIABLE = "KNN_DIFFUSION_HOME"
FOLDERS = {
    "HF_HOME": "huggingface",
    "KNN_DIFFUSION_CACHE": "cache",
    "MPLCONFIGDIR": "matplotlib",
    "PREFECT_HOME": "prefect",
    "TORCHINDUCTOR_CACHE_DIR": "torch/inductor",
    "TORCH_HOME": "torch",
    "TRITON_CACHE_DIR": "triton",
    "XDG_CACHE_HOME": "xdg/cache",
    "XDG_CONFIG_HOME": "xdg/config",
    "XDG_DATA_HOME": "xdg/data",
}
"""Folder below ``KNN_DIFFUSION_HOME`` of each variable; variables that the user has set remain."""

_TEMPORARY = ("/tmp", "/var/tmp", "/usr/tmp")  # noqa: S108  # where tempfile looks


def set_home(environment: MutableMapping[str, str] | None = None) -> None:
    """Set the variables of ``FOLDERS`` in ``environment`` if ``KNN_DIFFUSION_HOME`` is set.

    Also set a user name for a user id without an account, and ``TMPDIR`` if no folder for temporary files is writable.
    The path should be short: Ray's sockets are below ``TMPDIR``, and their paths have at most 107 bytes.
    """
    environment = os.environ if environment is None else environment
    given = environment.get(VARIABLE)
    if not given:
        return
    home = Path(given).expanduser().absolute()
    for name, folder in FOLDERS.items():
        environment.setdefault(name, str(home / folder))
    if "LOGNAME" not in environment and not _has_account():
        environment["LOGNAME"] = f"uid{os.getuid()}"
    if "TMPDIR" not in environment and not any(os.access(folder, os.W_OK | os.X_OK) for folder in _TEMPORARY):
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        environment["TMPDIR"] = str(home / "tmp")


def require_state_folder(variable: str, default: str) -> None:
    """Raise ``InputError`` if a library cannot create the folder in which it keeps its state.

    Args:
        variable: Variable of the folder, for example ``PREFECT_HOME``.
        default: Folder that the library uses without it.
    """
    folder = Path(os.environ.get(variable) or default).expanduser().absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise InputError(f"{folder} cannot be written; set {VARIABLE} to a folder for the state of all libraries")


def cache_folder() -> Path:
    """Return the default folder of the cache."""
    given = os.environ.get(VARIABLE)
    return Path(given).expanduser() / "cache" if given else Path("~/.cache/knn-diffusion")


def _has_account() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True
