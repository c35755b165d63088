"""A PostgreSQL server on loopback, from Debian's package."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, which Debian does not put on the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def unprivileged() -> pwd.struct_passwd | None:
    """Return the user that runs the server, because PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres")
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("nobody")
    return None


def is_installed() -> bool:
    """Return True if :func:`postgres_server` can start a server."""
    return programs() is not None and unprivileged() is not None


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Run a new cluster on a free port within the block, and provide USER@HOST:PORT/DATABASE."""
    folder, user = programs(), unprivileged()
    assert folder is not None
    assert user is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pg-") as base:  # pytest's own folders are closed to other users
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        os.chown(base, user.pw_uid, user.pw_gid)
        options = f"-h 127.0.0.1 -p {port} -k {base} -c fsync=off"
        control = [str(folder / "pg_ctl"), "--pgdata", f"{base}/data", "--silent", "--wait", "--log", f"{base}/log"]
        initialise = [str(folder / "initdb"), "--pgdata", f"{base}/data", "--username=keeper", "--auth=trust"]
        for command in ([*initialise, "--no-sync"], [*control, "--options", options, "start"]):
            subprocess.run(command, cwd=base, check=True, stdout=subprocess.DEVNULL, **identity)  # type: ignore[call-overload]
        try:
            yield f"keeper@127.0.0.1:{port}/postgres"
        finally:
            stop = [*control, "--mode=immediate", "stop"]
            subprocess.run(stop, cwd=base, check=True, stdout=subprocess.DEVNULL, **identity)  # type: ignore[call-overload]
