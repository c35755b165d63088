"""Single-writer lease on a folder, local or in an object store; it expires when its holder dies.

    <folder>/lease/000007.json      the holder; the highest number is the current generation

The holder rewrites its file every ``ttl_s`` / 3. A writer may take over if the file with the highest number is marked
as released, is older than ``ttl_s``, or belongs to a dead process of this machine. It creates the file with the next
number; the store lets exactly one writer succeed (a hard link, or ``If-None-Match: *``). It then deletes the files with
lower numbers. The highest file is never deleted. A number is therefore never used twice, and a slow writer finds a
higher number than its own.

**Clocks.** The age of a file is measured with the store's clock only: its modification time is compared with that of a
new probe file. The clocks of the machines may differ by any amount. A holder measures the time since its last renewal
began on its own clock, including suspension of the machine. It gives up before others may take over.

**Limitation.** A holder that is suspended between :meth:`Lease.check` and its next write, for longer than ``ttl_s``,
still performs that write. Stages commit by digest into their own folders, so this is harmless there. Keep the time
between check and commit short.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra import logs, storage
from infra.errors import ConfigError, KNNDiffusionError, LeaseHeldError, NotFoundError, StageError
from infra.storage.locks import boot_id

FOLDER = "lease"
Clock = Callable[[], float]
_POLL_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Holder of a lease, as recorded in the lease file."""

    name: str
    host: str
    process: int
    token: str
    since: str
    ttl_s: float
    released: bool = False
    machine: str = ""  # boot id and PID namespace in which ``process`` is valid; "" if unknown

    def is_dead(self) -> bool:
        """Return True if the holder was a process of this machine that has ended. Its lease is then free at once."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def __str__(self) -> str:
        return f"{self.name} (process {self.process} on {self.host}) since {self.since}"


class Lease:
    """Acquired lease, renewed in a background thread until it is released or lost."""

    def __init__(self, folder_uri: str, number: int, holder: Holder, began: float, clock: Clock) -> None:
        """Hold generation ``number``, whose write began at ``began`` on ``clock`` (seconds)."""
        self.holder = holder
        self._clock = clock
        self._folder, self._number, self._began = folder_uri, number, began
        self._uri = _file(folder_uri, number)
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``StageError`` if this process no longer holds the lease. Call this before each commit."""
        if self._lost is None and self._clock() - self._began > self.holder.ttl_s:
            self._lost = f"it could not be renewed for {self.holder.ttl_s:g} s"
        if self._lost is None and (higher := _highest(self._folder)) != self._number:
            self._lost = (
                f"now held by {_read(self._folder, higher) or 'another writer'}" if higher else "its file is gone"
            )
        if self._lost is not None:
            raise StageError(
                f"the lease on {self._folder} was lost: {self._lost}; nothing more is committed, run again"
            )

    def release(self) -> None:
        """Release the lease immediately, even on a full disk.

        If the store is unreachable, the lease expires after ``ttl_s``.
        """
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(KNNDiffusionError):
            self.check()
            try:
                self._write(dataclasses.replace(self.holder, released=True))
            except KNNDiffusionError:
                storage.expire(self._uri)

    def renew(self) -> bool:
        """Write the holder again, and return False if the lease was lost. Other failures are logged.

        The background thread calls this every third of ``ttl_s``.
        """
        try:
            self.check()
            began = self._clock()
            self._write(self.holder)
            self._began = began
        except Exception as error:
            if self._lost is not None:
                logs.get("lease").warning("the lease on %s was lost: %s", self._folder, self._lost)
                return False
            # The store may recover, or the disk may have space again, before the lease expires.
            logs.get("lease").warning("could not renew the lease on %s, will retry: %s", self._folder, error)
        return True

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self.holder.ttl_s / 3) and self.renew():
            pass

    def _write(self, holder: Holder) -> None:
        storage.write_bytes(self._uri, _encode(holder))


@contextlib.contextmanager
def lease(
    folder_uri: str,
    *,
    holder: str,
    ttl_s: float = 60.0,
    wait_s: float = 0.0,
    clock: Clock | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Lease]:
    """Hold the lease on ``folder_uri`` for the duration of the block; it is renewed in the background.

    Args:
        folder_uri: Folder with a single writer, e.g. the folder of a domain.
        holder: Name shown to other writers, e.g. "rebuild-index twemoji".
        ttl_s: Seconds after which a dead holder loses the lease. At least 3 in an object store, whose clock counts
            whole seconds. Default: 60.
        wait_s: Seconds to wait for another holder to finish. Default: 0.
        clock: This process's clock in seconds. Default: a monotonic one that includes suspension of the machine.
        sleep: Function that waits between attempts to acquire the lease. Default: ``time.sleep``.

    Raises:
        LeaseHeldError: Another writer holds the lease; the message names it.
        StageError: The lease was lost during the block.
        ConfigError: ``ttl_s`` is too short for the clock of the store.
    """
    if ttl_s < 1.5 * _clock_resolution_s(folder_uri):
        raise ConfigError(
            f"ttl_s is too short for the store's clock: {ttl_s:g}; "
            f"give at least {1.5 * _clock_resolution_s(folder_uri):g}"
        )
    folder_uri = storage.absolute(folder_uri)
    clock = clock or _now
    deadline = clock() + wait_s
    while (acquired := _acquire(folder_uri, holder, ttl_s, clock)) is None:
        if clock() >= deadline:
            raise LeaseHeldError(_conflict_message(folder_uri))
        sleep(min(_POLL_S, max(0.0, deadline - clock())))
    try:
        yield acquired
        acquired.check()
    finally:
        acquired.release()


def _acquire(folder_uri: str, name: str, ttl_s: float, clock: Clock) -> Lease | None:
    """Acquire and return the lease, or return None if another writer holds it."""
    highest = _highest(folder_uri)
    if highest and (_seconds_left(folder_uri, highest) or 0) > 0:
        return None
    own = Holder(
        name=name, host=socket.gethostname(), process=os.getpid(), token=uuid.uuid4().hex, since=_timestamp(),
        ttl_s=ttl_s, machine=_machine(),
    )  # fmt: skip
    number, began = highest + 1, clock()
    if not storage.create_bytes(_file(folder_uri, number), _encode(own)):
        return None
    if _highest(folder_uri) != number:  # the number was free because a later holder deleted it
        storage.discard(_file(folder_uri, number))
        return None
    for older in _numbers(folder_uri):
        if older < number:
            storage.discard(_file(folder_uri, older))
    return Lease(folder_uri, number, own, began, clock)


def _seconds_left(folder_uri: str, number: int) -> float | None:
    """Return the seconds until a generation expires, by the store's clock; None if it was released or deleted."""
    try:
        holder = _read(folder_uri, number)
        if holder is None or holder.released or holder.is_dead():
            return None
        written = storage.modified(_file(folder_uri, number))
    except NotFoundError:
        return None
    return holder.ttl_s + _clock_resolution_s(folder_uri) - (_store_time(folder_uri) - written)


def _store_time(folder_uri: str) -> float:
    """Return the store's time in seconds since 1970: the modification time of a file written now."""
    probe = storage.join(folder_uri, FOLDER, f"probe-{uuid.uuid4().hex}")
    storage.write_bytes(probe, b"")
    try:
        return storage.modified(probe)
    finally:
        storage.discard(probe)


def _clock_resolution_s(folder_uri: str) -> float:
    """Return the resolution of the store's modification times in seconds: object stores count whole seconds."""
    return 0.1 if storage.is_local(folder_uri) else 2.0


def _conflict_message(folder_uri: str) -> str:
    number = _highest(folder_uri)
    holder = _read(folder_uri, number) if number else None
    left = _seconds_left(folder_uri, number) if holder else None
    if holder is None or left is None:
        return f"{folder_uri} was just released by another writer; run again"
    ends = (datetime.now(UTC) + timedelta(seconds=max(0.0, left))).isoformat(timespec="seconds")
    return (
        f"{folder_uri} is being written by {holder}; wait until it finishes (if it is dead, its lease expires at "
        f"{ends}) and run again"
    )


def _read(folder_uri: str, number: int) -> Holder | None:
    """Return the holder that wrote the file, or None if there is no such file.

    An unreadable file counts as a lease of an unknown writer with a ``ttl_s`` of 60.
    """
    try:
        raw: dict[str, Any] = json.loads(storage.read_bytes(_file(folder_uri, number)))
        return Holder(**raw)
    except NotFoundError:
        return None
    except (ValueError, TypeError):
        return Holder(name="an unknown writer", host="?", process=0, token="", since="?", ttl_s=60)


def _numbers(folder_uri: str) -> list[int]:
    stems = (name.removesuffix(".json") for name in storage.list_names(storage.join(folder_uri, FOLDER)))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _highest(folder_uri: str) -> int:
    """Return the current generation; 0 if there is none yet."""
    return max(_numbers(folder_uri), default=0)


def _file(folder_uri: str, number: int) -> str:
    return storage.join(folder_uri, FOLDER, f"{number:06d}.json")


def _encode(holder: Holder) -> bytes:
    return json.dumps(dataclasses.asdict(holder), sort_keys=True).encode()


def _machine() -> str:
    """Return the boot id and PID namespace of this process, or "" if the system does not expose them."""
    try:
        return f"{boot_id()}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _now() -> float:
    """Return seconds on a monotonic clock, which includes suspension of the machine where the system supports it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
