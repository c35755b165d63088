"""Background processes that a later command can find and stop, recorded by process id and start time."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.errors import StageError
from infra.storage.folders import PRIVATE, make_folder

STOP_S = 20.0
"""Seconds that a process gets to end after SIGTERM."""
_POLL_S = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A process to start, and how to check its health.

    Attributes:
        name: Name in the record and of the log file.
        command: Program and arguments.
        environment: Variables in addition to those of this process. May hold passwords.
        health: URL that answers once the service is healthy. Default: ``port`` accepts connections.
        port: Port on 127.0.0.1 that the service listens on. None: healthy if it runs for ``settle_s``.
        settle_s: Seconds after which a service without a port counts as healthy.
        startup_s: Seconds within which it must become healthy.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    health: str | None = None
    port: int | None = None
    settle_s: float = 3.0
    startup_s: float = 180.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A recorded process. The start time distinguishes it from a later process with the same id."""

    name: str
    pid: int
    started: int  # clock ticks since boot

    def is_running(self) -> bool:
        """Return True if the process is the recorded one and has not ended."""
        return start_time(self.pid) == self.started


def start_time(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot, or None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def read_started(folder: Path) -> list[Started]:
    """Return the recorded processes in the order in which they were started."""
    with contextlib.suppress(FileNotFoundError):
        return [Started(**entry) for entry in json.loads((folder / "services.json").read_text())]
    return []


def start(services: Sequence[Service], folder: Path) -> list[Started]:
    """Start services together, record them in ``folder`` and wait until each is healthy.

    A service that already runs is kept and returned as it is.

    Raises:
        StageError: Another program uses a port, or a service ends or does not become healthy. Those started here are
            then stopped.
    """
    make_folder(folder, PRIVATE)
    started: list[Started] = []
    waiting: list[tuple[Service, subprocess.Popen[bytes]]] = []
    try:
        for service in services:
            recorded = [one for one in read_started(folder) if one.is_running()]
            running = next((one for one in recorded if one.name == service.name), None)
            if running is None:
                process = _launch(service, folder)
                waiting.append((service, process))
                running = Started(name=service.name, pid=process.pid, started=start_time(process.pid) or 0)
                _record(folder, [*recorded, running])
            started.append(running)
        for service, process in waiting:
            _wait_until_healthy(service, process, _log(service, folder))
    except BaseException:
        for service, _ in reversed(waiting):
            stop(folder, only=service.name)
        raise
    return started


def _launch(service: Service, folder: Path) -> subprocess.Popen[bytes]:
    if service.port is not None and _accepts(service.port):
        raise StageError(f"port of {service.name} is in use: {service.port}; choose another port, or end its program")
    with open(_log(service, folder), "ab") as output:
        return subprocess.Popen(  # noqa: S603 - a command of ours
            service.command,
            env={**os.environ, **service.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _log(service: Service, folder: Path) -> Path:
    return folder / f"{service.name}.log"


def stop(folder: Path, only: str | None = None) -> list[str]:
    """Stop the recorded processes, newest first, and return the names of those that were running."""
    stopped = []
    remaining = read_started(folder)
    for one in reversed(list(remaining)):
        if only is not None and one.name != only:
            continue
        if one.is_running():
            _end(one)
            stopped.append(one.name)
        remaining.remove(one)
        _record(folder, remaining)
    return stopped


def _end(one: Started) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(one.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while one.is_running() and time.monotonic() < deadline:
        _reap(one.pid)
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):  # its session: the process itself and what it left behind
        os.killpg(one.pid, signal.SIGKILL)
    _reap(one.pid)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _record(folder: Path, processes: Sequence[Started]) -> None:
    temporary = folder / "services.json.new"
    temporary.write_text(json.dumps([dataclasses.asdict(one) for one in processes]))
    temporary.replace(folder / "services.json")


def _wait_until_healthy(service: Service, process: subprocess.Popen[bytes], log: Path) -> None:
    began = time.monotonic()
    while (waited := time.monotonic() - began) < service.startup_s:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise StageError(f"{service.name} does not start ({lines[-1].strip()}); see {log}")
        if service.health is None and service.port is None:
            if waited >= service.settle_s:
                return
        elif _answers(service):
            return
        time.sleep(_POLL_S)
    raise StageError(f"{service.name} is not healthy after {service.startup_s:.0f} s; see {log}")


def _answers(service: Service) -> bool:
    if service.health is None:
        return service.port is not None and _accepts(service.port)
    try:
        with urllib.request.urlopen(service.health, timeout=5):  # noqa: S310 - a loopback address of our own
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
