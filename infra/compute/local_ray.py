"""Access control of a local Ray cluster: loopback, an authentication token and a private session folder."""

import contextlib
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ray._private import ray_constants
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from infra.errors import StageError
from infra.storage.folders import PRIVATE, make_folder

_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_PORT_S = 5.0


@contextlib.contextmanager
def private_token() -> Iterator[None]:
    """Make clusters that start inside the block require a token, which their processes read from the environment.

    Without a token in the environment, Ray writes ``~/.ray/auth_token``, readable by everyone. A later ``ray start`` of
    the user then requires that token, and drivers without ``RAY_AUTH_MODE`` cannot connect. Variables that the user
    has set remain in effect.
    """
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN)}
    if before[_MODE] is None:
        os.environ[_MODE] = "token"
    if os.environ[_MODE].lower() == "token" and before[_TOKEN] is None and _TOKEN_FILE not in os.environ:
        os.environ[_TOKEN] = secrets.token_hex(32)
    reload_ray_config()
    try:
        yield
    finally:
        _restore(before)
        reload_ray_config()


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block, for the processes of a cluster that starts there.

    Unlike the variables of a Ray runtime environment, these also reach the workers that Ray starts in advance, one per
    core. With a runtime environment, Ray leaves these workers idle and starts others.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        _restore(before)


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """Make every server of a cluster that starts inside the block listen on 127.0.0.1 only.

    Ray 2.60 replaces a node address of 127.0.0.1 with one that other machines can reach, and then listens on all
    interfaces, unless clusters are disabled, as on macOS and Windows. This constant disables them; ``ray.init`` has no
    argument for it.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def loopback_of(address: str) -> Iterator[None]:
    """Apply :func:`loopback` inside the block if the head at ``address`` listens on 127.0.0.1 only.

    A driver replaces 127.0.0.1 as well, and would wait for a minute at an address where nothing listens.
    """
    with loopback() if _is_loopback_only(address) else contextlib.nullcontext():
        yield


def _is_loopback_only(address: str) -> bool:
    if "://" in address:
        return False
    replaced = canonicalize_bootstrap_address(address)
    with loopback():
        given = canonicalize_bootstrap_address(address)
    return replaced != given and not accepts(replaced) and accepts(given)


def accepts(address: str | None) -> bool:
    """Return True if a server listens at HOST:PORT."""
    host, _, port = (address or "").rpartition(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host, int(port)), timeout=_PORT_S).close()
        return True
    return False


def session_folder() -> str:
    """Return a folder for Ray sessions inside a folder that only this user can enter.

    Ray makes its own session folders accessible to everyone. Raises ``StageError`` if the name belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"knn-ray-{os.getuid()}"
    make_folder(folder, PRIVATE)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StageError(f"{folder} belongs to another user; remove it, or set TMPDIR to a folder of your own")
    folder.chmod(PRIVATE)
    return str(folder / "ray")


def _restore(variables: Mapping[str, str | None]) -> None:
    """Set environment variables to earlier values; None unsets a variable."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def reload_ray_config() -> None:
    """Make Ray read its settings from the environment again; it caches them."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
