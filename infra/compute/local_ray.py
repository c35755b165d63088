"""What keeps a Ray cluster on this machine to the user who started it: loopback, a token, a closed folder."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from infra.errors import StageError
from infra.storage.folders import PRIVATE, make_folder

_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextlib.contextmanager
def private_token() -> Iterator[None]:
    """Let clusters that start inside the block demand a token, which their processes find in the environment.

    Without one Ray writes ``~/.ray/auth_token``, readable for everybody. A later ``ray start`` of the user demands that
    token, and drivers that do not set ``RAY_AUTH_MODE`` cannot connect. What the user has set stays in force.
    """
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN)}
    if before[_MODE] is None:
        os.environ[_MODE] = "token"
    if os.environ[_MODE].lower() == "token" and before[_TOKEN] is None and _TOKEN_FILE not in os.environ:
        os.environ[_TOKEN] = secrets.token_hex(32)
    _reread()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reread()


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """Let every server of a cluster that starts inside the block listen on 127.0.0.1 alone.

    Ray 2.60 replaces a node address of 127.0.0.1 by one that others reach, and then listens on all interfaces, unless
    it runs without clusters, as on macOS and Windows. No argument of ``ray.init`` says so, only this constant.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def session_folder() -> str:
    """Return a folder for sessions that only this user enters: Ray opens its own below to everybody.

    Raises ``StageError`` where another user has taken its name.
    """
    folder = Path(tempfile.gettempdir()) / f"knn-ray-{os.getuid()}"
    make_folder(folder, PRIVATE)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StageError(f"{folder} belongs to another user; remove it, or set TMPDIR to a folder of your own")
    folder.chmod(PRIVATE)
    return str(folder / "ray")


def _reread() -> None:
    """Make Ray read its settings from the environment again, of which it keeps a copy."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
