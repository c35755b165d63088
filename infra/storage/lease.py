"""One writer at a time: a lease on a folder, local or in an object store, that a dead holder loses.

    <folder>/lease/000007.json      who holds it; the highest number counts

A holder writes its file anew every third of ``ttl_s``. Whoever finds the highest file released, not written for
``ttl_s``, or of a process of this machine that runs no more, creates the next number, which the store grants to exactly
one (a hard link; ``If-None-Match: *``), and then deletes the lower ones. The highest is never deleted, so a number is
never used twice and one who was slow finds a higher one than its own.

**Clocks.** The age of a file is told by the store's own clock alone: when it was written, against when a probe written
just now was. Machines may disagree about the time as they like. A holder counts on its own clock how long ago it last
began to write, sleep of the machine included, and gives up before others may take over.

**What it cannot do.** A holder that is stopped between :meth:`Lease.check` and its next write, for longer than
``ttl_s``, still makes that write. Stages commit by digest into folders of their own, so that does no harm there; keep
the distance between check and commit short.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra import logs, storage
from infra.errors import KNNDiffusionError, NotFoundError, StageError
from infra.storage.locks import boot_id

FOLDER = "lease"
_POLL_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a lease, as its file says."""

    name: str
    host: str
    process: int
    token: str
    since: str
    ttl_s: float
    released: bool = False
    machine: str = ""  # where ``process`` is a number that means something; empty: unknown

    def is_dead(self) -> bool:
        """Whether it ran on this machine and runs no more: then nobody need wait for its lease to end."""
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
    """A lease that is held, and renewed in the background until it is released or lost."""

    def __init__(self, folder_uri: str, number: int, holder: Holder, began: float) -> None:
        """Hold generation ``number``, written at ``began`` (of :func:`_now`)."""
        self.holder = holder
        self._folder, self._number, self._began = folder_uri, number, began
        self._uri = _file(folder_uri, number)
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``StageError`` unless this process holds the lease still. Call it before each commit."""
        if self._lost is None and _now() - self._began > self.holder.ttl_s:
            self._lost = f"it could not be renewed for {self.holder.ttl_s:g} s"
        if self._lost is None and (higher := _highest(self._folder)) != self._number:
            self._lost = f"held by {_read(self._folder, higher) or 'another'} now" if higher else "its file is gone"
        if self._lost is not None:
            raise StageError(
                f"the lease on {self._folder} was lost ({self._lost}); nothing more is committed here, run again"
            )

    def release(self) -> None:
        """Let the next one in at once, from a full disk too. A store that does not answer does so after ``ttl_s``."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(KNNDiffusionError):
            self.check()
            try:
                self._write(dataclasses.replace(self.holder, released=True))
            except KNNDiffusionError:
                storage.expire(self._uri)

    def _renew(self) -> None:
        while not self._ended.wait(self.holder.ttl_s / 3):
            try:
                self.check()
                began = _now()
                self._write(self.holder)
                self._began = began
            except Exception as error:
                if self._lost is not None:
                    logs.get("lease").warning("the lease on %s was lost: %s", self._folder, self._lost)
                    return
                # The store may be back, or the disk have room again, before the time is over.
                logs.get("lease").warning("the lease on %s is not renewed yet: %s", self._folder, error)

    def _write(self, holder: Holder) -> None:
        storage.write_bytes(self._uri, _body(holder))


@contextlib.contextmanager
def lease(folder_uri: str, *, holder: str, ttl_s: float = 60.0, wait_s: float = 0.0) -> Iterator[Lease]:
    """Hold ``folder_uri`` alone for the length of the block; renewed meanwhile.

    Args:
        folder_uri: what is to have one writer, a domain's folder say.
        holder: what the others are told, "rebuild-index twemoji" say.
        ttl_s: a holder that dies loses it after this long; at least 3 in an object store, which counts whole seconds.
        wait_s: how long to wait for another holder to end.

    Raises:
        StageError: another one holds it, and who; or, when the block ends, it was lost meanwhile.
    """
    if ttl_s < 1.5 * _tick_s(folder_uri):
        raise ValueError(
            f"ttl_s is {ttl_s:g}; give at least {1.5 * _tick_s(folder_uri):g}: the store's clock is coarse"
        )
    folder_uri = storage.absolute(folder_uri)
    deadline = _now() + wait_s
    while (held := _acquire(folder_uri, holder, ttl_s)) is None:
        if _now() >= deadline:
            raise StageError(_refusal(folder_uri))
        time.sleep(min(_POLL_S, max(0.0, deadline - _now())))
    try:
        yield held
        held.check()
    finally:
        held.release()


def _acquire(folder_uri: str, name: str, ttl_s: float) -> Lease | None:
    """The lease, or None when another one has it."""
    highest = _highest(folder_uri)
    if highest and (_left_s(folder_uri, highest) or 0) > 0:
        return None
    mine = Holder(
        name=name, host=socket.gethostname(), process=os.getpid(), token=uuid.uuid4().hex, since=_time(), ttl_s=ttl_s,
        machine=_machine(),
    )  # fmt: skip
    number, began = highest + 1, _now()
    if not storage.create_bytes(_file(folder_uri, number), _body(mine)):
        return None
    if _highest(folder_uri) != number:  # the number was free because a later holder had deleted it
        storage.discard(_file(folder_uri, number))
        return None
    for older in _numbers(folder_uri):
        if older < number:
            storage.discard(_file(folder_uri, older))
    return Lease(folder_uri, number, mine, began)


def _left_s(folder_uri: str, number: int) -> float | None:
    """Seconds for which a generation is still held, by the store's clock; None when it was released or is gone."""
    try:
        holder = _read(folder_uri, number)
        if holder is None or holder.released or holder.is_dead():
            return None
        written = storage.modified(_file(folder_uri, number))
    except NotFoundError:
        return None
    return holder.ttl_s + _tick_s(folder_uri) - (_store_time(folder_uri) - written)


def _store_time(folder_uri: str) -> float:
    """What the store's clock says: when a file that is written now was written."""
    probe = storage.join(folder_uri, FOLDER, f"probe-{uuid.uuid4().hex}")
    storage.write_bytes(probe, b"")
    try:
        return storage.modified(probe)
    finally:
        storage.discard(probe)


def _tick_s(folder_uri: str) -> float:
    """How far apart the store's clock may be for two files written at one time: object stores count whole seconds."""
    return 0.1 if storage.is_local(folder_uri) else 2.0


def _refusal(folder_uri: str) -> str:
    number = _highest(folder_uri)
    holder = _read(folder_uri, number) if number else None
    left = _left_s(folder_uri, number) if holder else None
    if holder is None or left is None:
        return f"{folder_uri} was just let go by another writer; run again"
    ends = (datetime.now(UTC) + timedelta(seconds=max(0.0, left))).isoformat(timespec="seconds")
    return (
        f"{folder_uri} is being written by {holder}; wait until it ends, or, if it is dead, until its lease does "
        f"at {ends}, and run again"
    )


def _read(folder_uri: str, number: int) -> Holder | None:
    """Who wrote the file; None when it is gone. A file that is no such thing is taken for one of a minute's lease."""
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
    """The generation that counts; 0 when there was none yet."""
    return max(_numbers(folder_uri), default=0)


def _file(folder_uri: str, number: int) -> str:
    return storage.join(folder_uri, FOLDER, f"{number:06d}.json")


def _body(holder: Holder) -> bytes:
    return json.dumps(dataclasses.asdict(holder), sort_keys=True).encode()


def _machine() -> str:
    """This boot of this machine and its space of process numbers, where the system tells; else empty."""
    try:
        return f"{boot_id()}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _now() -> float:
    """Seconds on a clock that never jumps, and that goes on while the machine sleeps, where there is such a one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
