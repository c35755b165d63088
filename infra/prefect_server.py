"""Temporary Prefect server of a command, started if ``PREFECT_API_URL`` is unset.

Prefect can start such a server itself, but that one survives a killed parent. It also puts site-packages before the
standard library, where img2dataset's dependency ``dataclasses`` (a Python 3.6 backport) shadows the real module.
"""

import logging
import os
import re
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
from infra.home import require_state_folder
from infra.storage.folders import PRIVATE, make_folder

STARTUP_S = 90.0
DRAIN_S = 3.0
"""Maximum seconds to wait for events that were not sent yet. Usually they take less than 0.1 seconds."""
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception): ")

_SERVER = """
import os, sys, threading, uvicorn
os.umask(0o077)  # its database holds the parameters of every run
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # ends with its parent
uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=int(sys.argv[1]),
            log_level="error")
"""


@contextmanager
def prefect_api(home: Path | None = None) -> Iterator[None]:
    """Connect Prefect to a server within the block: the configured server, or a temporary one.

    The temporary server listens on loopback. A port is open to every user of the machine, so each request needs a
    secret that only this command and its children get, through the environment.

    Enter the block before Prefect is imported, because Prefect reads its settings then.

    Args:
        home: Folder for the server's state. Default: Prefect's own default.

    Raises:
        InputError: The folder for the server's state cannot be written.
        StageError: The server does not start; the message includes its last line of output.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    if home is not None:
        make_folder(home, PRIVATE)
        os.environ["PREFECT_HOME"] = str(home.absolute())
    require_state_folder("PREFECT_HOME", "~/.prefect")
    if given := os.environ.get("PREFECT_HOME"):
        make_folder(Path(given).expanduser(), PRIVATE)  # Prefect does not create the folders above it
    port = free_port()
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
        tempfile.TemporaryFile() as output,
        subprocess.Popen(  # noqa: S603 - our own interpreter and script
            [sys.executable, "-c", _SERVER, str(port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C ends this command, which then ends the server
        ) as server,
    ):
        try:
            _wait_until_healthy(server, output, f"http://127.0.0.1:{port}/api/health")
            os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
            os.environ["PREFECT_API_AUTH_STRING"] = secret
            try:
                yield
            finally:
                _send_events()
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            os.environ.pop("PREFECT_API_AUTH_STRING", None)
            if configured is not None:
                os.environ["PREFECT_API_AUTH_STRING"] = configured
            server.kill()


def _send_events() -> None:
    """Wait until Prefect has sent its events: without a server it loses them and prints an error."""
    module = sys.modules.get("prefect.events.worker")
    if module is not None:
        logging.getLogger("EventsWorker").setLevel(logging.ERROR)  # else it warns about events that it still sends
        module.EventsWorker.drain_all(timeout=DRAIN_S, at_exit=False)


def _wait_until_healthy(server: subprocess.Popen[bytes], output: IO[bytes], health: str) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            output.seek(0)
            reason = _last_error(output.read().decode(errors="replace")) or f"exit code {server.returncode}"
            raise StageError(f"the Prefect server does not start ({reason}); set PREFECT_API_URL to a running one")
        try:
            with urllib.request.urlopen(health, timeout=5):  # noqa: S310 - a loopback address of our own
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise StageError(f"the Prefect server did not answer in {STARTUP_S:.0f} s; set PREFECT_API_URL to a running one")


def _last_error(output: str) -> str:
    """Return the last line that ends a traceback, or else the last line."""
    lines = output.strip().splitlines()
    return next((line for line in reversed(lines) if _EXCEPTION.match(line)), lines[-1] if lines else "")


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
