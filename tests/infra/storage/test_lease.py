import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import s3fs
from support.fakes import FakeClock
from support.object_stores import Bucket, ObjectStore

from infra import storage
from infra.errors import StageError, TransientError
from infra.storage import errors
from infra.storage import lease as leases
from infra.storage.lease import Lease, lease

REAL = pytest.param("radosgw", marks=pytest.mark.s3)


class Domain:
    """The folder of a new domain, and the shortest ``ttl_s`` that its store supports."""

    def __init__(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        if request.param == "local":
            self.folder, self.ttl_s = str(tmp_path / "twemoji"), 0.9
        else:
            bucket: Bucket = request.getfixturevalue(f"{request.param}_bucket")
            self.folder, self.ttl_s = f"{bucket.uri}/twemoji", 3.0

    def lease(self, holder: str, **options: Any) -> AbstractContextManager[Lease]:
        return lease(self.folder, holder=holder, **{"ttl_s": self.ttl_s, **options})

    def refusal(self) -> str:
        with pytest.raises(StageError) as caught, self.lease("second"):
            pytest.fail("two writers hold the lease")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def files(self) -> list[str]:
        names = storage.list_names(f"{self.folder}/{leases.FOLDER}")
        return [name for name in names if not name.endswith(".partial")]  # a renewal in progress

    def process(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Run a script in another process, with ``folder`` and ``ttl_s``."""
        head = (
            "import sys, time\nfrom infra.storage.lease import lease\nfolder, ttl_s = sys.argv[1], float(sys.argv[2])\n"
            "def held(**options):\n    return lease(folder, holder='rebuild-index twemoji', ttl_s=ttl_s, **options)\n"
        )
        command = [sys.executable, "-c", head + script, self.folder, str(self.ttl_s), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, **pipes)


@pytest.fixture(params=["local", "moto", REAL])
def any_domain(request: pytest.FixtureRequest, tmp_path: Path) -> Domain:
    """A domain on every type of store."""
    return Domain(request, tmp_path)


@pytest.fixture(params=["local", REAL])
def slow_domain(request: pytest.FixtureRequest, tmp_path: Path) -> Domain:
    """A domain for slow tests, which a mock store would only repeat."""
    return Domain(request, tmp_path)


HOLD = """
with held():
    print("acquired", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@contextmanager
def held_by_another_process(any_domain: Domain, seconds: float = 600) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds the lease."""
    other = any_domain.process(HOLD, str(seconds))
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "acquired\n", other.communicate()[1]
        yield other
    finally:
        other.send_signal(signal.SIGCONT)
        other.kill()
        other.communicate()


def test_lease_released_can_be_acquired_again(any_domain: Domain) -> None:
    for number in range(1, 4):
        with any_domain.lease("rebuild-index twemoji") as acquired:
            acquired.check()
            assert any_domain.files() == [f"{number:06d}.json"]
    assert json.loads(storage.read_bytes(f"{any_domain.folder}/lease/000003.json"))["released"]


def test_lease_second_writer_fails_with_the_holders_name(any_domain: Domain) -> None:
    started = time.time()
    with held_by_another_process(any_domain) as other:
        message = any_domain.refusal()
        assert len(any_domain.files()) == 1  # probes are deleted
    found = re.fullmatch(
        rf"{re.escape(any_domain.folder)} is being written by rebuild-index twemoji \(process {other.pid} on "
        rf"{re.escape(socket.gethostname())}\) since (\S+); wait until it finishes \(if it is dead, its lease "
        r"expires at (\S+)\) and run again",
        message,
    )
    assert found, message
    since, ends = (datetime.fromisoformat(text).timestamp() for text in found.groups())
    assert started - 1 <= since <= time.time()
    assert time.time() - 2 < ends <= time.time() + any_domain.ttl_s + 2


def test_lease_live_holder_keeps_it_beyond_ttl(slow_domain: Domain) -> None:
    with held_by_another_process(slow_domain) as other:
        renewed = storage.modified(f"{slow_domain.folder}/lease/000001.json") + slow_domain.ttl_s
        deadline = time.monotonic() + 30
        while storage.modified(f"{slow_domain.folder}/lease/000001.json") < renewed:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert f"process {other.pid}" in slow_domain.refusal()
        assert slow_domain.files() == ["000001.json"]


def test_lease_works_without_permission_to_delete(moto_bucket: Bucket) -> None:
    moto_bucket.forbid_deletion("*")
    folder = f"{moto_bucket.uri}/twemoji"
    for _ in range(2):
        with (
            lease(folder, holder="first", ttl_s=30),
            pytest.raises(StageError, match="first"),
            lease(folder, holder="second", ttl_s=30),
        ):
            pytest.fail("two writers hold the lease")


def test_lease_of_dead_holder_expires_for_a_waiting_writer(any_domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")
    with held_by_another_process(any_domain) as other:
        other.kill()
        other.wait()
    assert f"process {other.pid}" in any_domain.refusal()  # from another machine it could still be alive
    clock, store_time = FakeClock(), leases._store_time
    monkeypatch.setattr(leases, "_store_time", lambda folder: store_time(folder) + clock.now)
    with any_domain.lease("second", wait_s=30, clock=clock, sleep=clock.sleep) as acquired:
        assert clock.now < any_domain.ttl_s + 6
        acquired.check()
        assert any_domain.files() == ["000002.json"]


def test_lease_of_dead_local_process_is_free_at_once(slow_domain: Domain) -> None:
    with held_by_another_process(slow_domain) as other:
        assert f"process {other.pid}" in slow_domain.refusal()
        other.kill()
        other.wait()
    with slow_domain.lease("second"):
        assert slow_domain.files() == ["000002.json"]


def test_lease_waiting_writer_acquires_it_on_release(slow_domain: Domain) -> None:
    with (
        held_by_another_process(slow_domain, seconds=1) as other,
        slow_domain.lease("second", ttl_s=60, wait_s=30) as acquired,
    ):
        assert other.wait(10) == 0
        acquired.check()


def test_check_after_long_suspension_raises_lost_lease(slow_domain: Domain) -> None:
    script = """
try:
    with held() as lease:
        print("acquired", flush=True)
        sys.stdin.readline()
        lease.check()
except Exception as error:
    print(error)
"""
    sleeper = slow_domain.process(script)
    assert sleeper.stdout is not None
    assert sleeper.stdout.readline() == "acquired\n"
    sleeper.send_signal(signal.SIGSTOP)
    try:
        with slow_domain.lease("second", wait_s=30) as acquired:
            sleeper.send_signal(signal.SIGCONT)
            outputs, _ = sleeper.communicate("resume\n", timeout=30)
            assert outputs.startswith(f"the lease on {slow_domain.folder} was lost: ")
            assert outputs.endswith("; nothing more is committed, run again\n")
            acquired.check()
            assert slow_domain.files() == ["000002.json"]
    finally:
        sleeper.kill()


def test_check_after_takeover_raises_and_keeps_the_new_lease(any_domain: Domain) -> None:
    higher = f"{any_domain.folder}/lease/000002.json"
    with pytest.raises(StageError) as caught, any_domain.lease("first") as acquired:
        storage.write_bytes(higher, b"another writer")
        with pytest.raises(StageError, match=r"was lost: now held by an unknown writer"):
            acquired.check()
        assert not acquired.renew(), "a renewal does not overwrite the new holder"
    assert str(caught.value).startswith(f"the lease on {any_domain.folder} was lost: ")
    assert str(caught.value).endswith("; nothing more is committed, run again")
    assert any_domain.files() == ["000001.json", "000002.json"]
    assert storage.read_bytes(higher) == b"another writer"
    assert not json.loads(storage.read_bytes(f"{any_domain.folder}/lease/000001.json"))["released"]


def test_lease_lost_in_failing_block_raises_the_blocks_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lease(str(tmp_path), holder="first", ttl_s=1):
        storage.write_bytes(f"{tmp_path}/lease/000002.json", b"another writer")
        raise ZeroDivisionError


def test_lease_many_threads_hold_it_one_at_a_time(any_domain: Domain) -> None:
    inside, most, turns = [], [0], []
    guard = threading.Lock()

    def work(number: int) -> None:
        with any_domain.lease(f"worker {number}", ttl_s=30, wait_s=60) as acquired:
            with guard:
                inside.append(number)
                most[0] = max(most[0], len(inside))
            time.sleep(0.02)
            acquired.check()
            with guard:
                inside.remove(number)
                turns.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(6)))
    assert (most, sorted(turns)) == ([1], [0, 1, 2, 3, 4, 5])


RACE = """
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease(folder, holder="rescuer", ttl_s=30) as lease:
        print("acquired", flush=True)
        sys.stdin.readline()
        lease.check()
except Exception as error:
    print("refused", flush=True)
"""


def test_lease_expired_is_taken_over_by_one_of_many(slow_domain: Domain) -> None:
    with held_by_another_process(slow_domain) as other:
        other.kill()
        other.wait()
    writers: list[Any] = [slow_domain.process(RACE) for _ in range(4)]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 4
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    outputs = [writer.stdout.readline().strip() for writer in writers]
    assert sorted(outputs) == ["acquired", "refused", "refused", "refused"]
    assert [writer.communicate("end\n", timeout=60)[0] for writer in writers] == [""] * 4
    assert slow_domain.files() == ["000002.json"]


def test_acquire_slow_writer_detects_a_later_generation(any_domain: Domain) -> None:
    for _ in range(3):
        with any_domain.lease("first"):
            pass
    with any_domain.lease("later", ttl_s=30):
        assert any_domain.files() == ["000004.json"]
        highest = leases._highest
        stale = iter([1])  # the slow writer read the number 1 and was suspended
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leases, "_highest", lambda uri: next(stale, None) or highest(uri))
            assert leases._acquire(any_domain.folder, "slow", 30, time.monotonic) is None
        assert any_domain.files() == ["000004.json"]


def test_check_store_unreachable_beyond_ttl_raises_lost_lease(
    moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "RETRY_DELAYS_S", ())
    own = ObjectStore()
    monkeypatch.setenv("AWS_ENDPOINT_URL", own.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    clock = FakeClock()
    lost = pytest.raises(StageError, match=r"was lost: it could not be renewed for 30 s")
    with lost, lease(own.bucket().uri, holder="first", ttl_s=30, clock=clock) as acquired:
        own.stop()
        with pytest.raises(TransientError):
            acquired.check()  # not lost yet, but not verifiable
        clock.sleep(31)
        acquired.check()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"name": 1}'])
def test_lease_invalid_file_counts_for_one_minute(data: bytes, tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/lease/000007.json", data)
    with pytest.raises(StageError, match="an unknown writer"), lease(str(tmp_path), holder="second", ttl_s=1):
        pass
    os.utime(tmp_path / "lease/000007.json", (time.time() - 70,) * 2)
    with lease(str(tmp_path), holder="second", ttl_s=1):
        assert storage.list_names(f"{tmp_path}/lease") == ["000008.json"]


def test_lease_ttl_below_clock_resolution_raises_value_error(tmp_path: Path) -> None:
    for folder, least in (("s3://bucket/domain", 3), (str(tmp_path), 0.15)):
        with pytest.raises(ValueError, match=f"give at least {least}"), lease(folder, holder="first", ttl_s=0.1):
            pass


def test_release_on_full_disk_frees_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "twemoji")

    def full(uri: str, data: bytes) -> None:
        raise errors.disk_full_error(uri)

    with lease(folder, holder="first"):
        monkeypatch.setattr(storage, "write_bytes", full)
    monkeypatch.undo()
    with lease(folder, holder="second") as acquired:
        acquired.check()


def test_renew_retries_after_a_briefly_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, full = storage.write_bytes, iter([True])

    def briefly_full(uri: str, data: bytes) -> None:
        if uri.endswith("000001.json") and next(full, None) is not None:
            raise errors.disk_full_error(uri)
        write(uri, data)

    with lease(str(tmp_path / "twemoji"), holder="first") as acquired:
        monkeypatch.setattr(storage, "write_bytes", briefly_full)
        assert acquired.renew() and acquired.renew()
        acquired.check()
    assert next(full, None) is None
