"""A Prefect API for a command that has none: started when ``PREFECT_API_URL`` is unset, gone with the command.

Prefect can start such a server by itself, but that one outlives a killed parent, and it puts site-packages in front of
the standard library, where img2dataset's dependency ``dataclasses`` (a Python 3.6 backport) shadows the real module.
"""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from infra.errors import StageError
from infra.storage.folders import PRIVATE, make_folder

STARTUP_S = 90.0

_SERVER = """
import os, sys, threading, uvicorn
os.umask(0o077)  # its database holds the parameters of every run
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # ends with its parent
uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=int(sys.argv[1]),
            log_level="error")
"""


@contextmanager
def prefect_api(home: Path | None = None) -> Iterator[None]:
    """Point Prefect at a server for the length of the block: the configured one, or one of our own.

    Our own listens on loopback and answers nobody but this command and its children: a port is open to every user of
    the machine, so each request carries a secret that they find in the environment.

    Must be entered before Prefect is imported, since it reads its settings then. ``home`` keeps the server's state;
    None leaves Prefect's default. Raises ``StageError`` with the server's own words when it does not come up.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    if home is not None:
        make_folder(home, PRIVATE)
        os.environ["PREFECT_HOME"] = str(home.absolute())
    port = _free_port()
    secret = f"knn-diffusion:{secrets.token_urlsafe(32)}"
    environment = {
        **os.environ,
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT_API_AUTH_STRING": secret,
        "PREFECT_SERVER_API_AUTH_STRING": secret,
    }
    configured = os.environ.get("PREFECT_API_AUTH_STRING")
    with (
        tempfile.TemporaryFile() as words,
        subprocess.Popen(  # noqa: S603 - our own interpreter and script
            [sys.executable, "-c", _SERVER, str(port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=words,
            stderr=words,
            start_new_session=True,  # Ctrl-C ends this command, which then ends the server
        ) as server,
    ):
        try:
            _await(server, words, f"http://127.0.0.1:{port}/api/health")
            os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
            os.environ["PREFECT_API_AUTH_STRING"] = secret
            yield
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            os.environ.pop("PREFECT_API_AUTH_STRING", None)
            if configured is not None:
                os.environ["PREFECT_API_AUTH_STRING"] = configured
            server.kill()


def _await(server: subprocess.Popen[bytes], words: IO[bytes], health: str) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            words.seek(0)
            said = words.read().decode(errors="replace").strip().splitlines()
            raise StageError(f"Prefect's server does not start ({said[-1] if said else server.returncode}); "
                             "set PREFECT_API_URL to a running one")  # fmt: skip
        try:
            with urllib.request.urlopen(health, timeout=5):  # noqa: S310 - a loopback address of our own
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise StageError(f"Prefect's server did not answer within {STARTUP_S:.0f} s; set PREFECT_API_URL to a running one")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
