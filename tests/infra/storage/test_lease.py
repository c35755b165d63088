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
from support.object_stores import Bucket, ObjectStore

from infra import storage
from infra.errors import StageError, TransientError
from infra.storage import errors
from infra.storage import lease as leases
from infra.storage.lease import Lease, lease

REAL = pytest.param("radosgw", marks=pytest.mark.s3)


class Domain:
    """A domain's folder that is not there yet, and the shortest time of a lease that its store can tell."""

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
            pytest.fail("two hold it")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def files(self) -> list[str]:
        names = storage.list_names(f"{self.folder}/{leases.FOLDER}")
        return [name for name in names if not name.endswith(".partial")]  # a renewal on its way

    def process(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Another process, with ``folder`` and ``ttl_s``."""
        head = (
            "import sys, time\nfrom infra.storage.lease import lease\nfolder, ttl_s = sys.argv[1], float(sys.argv[2])\n"
            "def held(**options):\n    return lease(folder, holder='rebuild-index twemoji', ttl_s=ttl_s, **options)\n"
        )
        command = [sys.executable, "-c", head + script, self.folder, str(self.ttl_s), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, **pipes)


@pytest.fixture(params=["local", "moto", REAL])
def domain(request: pytest.FixtureRequest, tmp_path: Path) -> Domain:
    """On every store."""
    return Domain(request, tmp_path)


@pytest.fixture(params=["local", REAL])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Domain:
    """Where what takes its time is tested; a mock would add nothing but that."""
    return Domain(request, tmp_path)


HOLD = """
with held():
    print("has it", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@contextmanager
def holding(domain: Domain, seconds: float = 600) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease."""
    other = domain.process(HOLD, str(seconds))
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n", other.communicate()[1]
        yield other
    finally:
        other.send_signal(signal.SIGCONT)
        other.kill()
        other.communicate()


def test_one_after_another(domain: Domain) -> None:
    for number in range(1, 4):
        with domain.lease("rebuild-index twemoji") as held:
            held.check()
            assert domain.files() == [f"{number:06d}.json"]
    assert json.loads(storage.read_bytes(f"{domain.folder}/lease/000003.json"))["released"]


def test_a_second_one_is_refused_with_the_first_ones_name(domain: Domain) -> None:
    started = time.time()
    with holding(domain) as other:
        message = domain.refusal()
        assert len(domain.files()) == 1  # no probe is left
    found = re.fullmatch(
        rf"{re.escape(domain.folder)} is being written by rebuild-index twemoji \(process {other.pid} on "
        rf"{re.escape(socket.gethostname())}\) since (\S+); wait until it finishes \(if it is dead, its lease "
        r"expires at (\S+)\) and run again",
        message,
    )
    assert found, message
    since, ends = (datetime.fromisoformat(text).timestamp() for text in found.groups())
    assert started - 1 <= since <= time.time()
    assert time.time() - 2 < ends <= time.time() + domain.ttl_s + 2


def test_a_living_holder_keeps_it_for_longer_than_its_time(place: Domain) -> None:
    with holding(place) as other:
        time.sleep(2 * place.ttl_s + 1)
        assert f"process {other.pid}" in place.refusal()
        assert place.files() == ["000001.json"]


def test_a_writer_that_may_not_delete_takes_it_and_keeps_out_others(moto_bucket: Bucket) -> None:
    moto_bucket.forbid_deletion("*")
    folder = f"{moto_bucket.uri}/twemoji"
    for _ in range(2):
        with (
            lease(folder, holder="first", ttl_s=30),
            pytest.raises(StageError, match="first"),
            lease(folder, holder="second", ttl_s=30),
        ):
            pytest.fail("two hold it")


def test_a_dead_holder_loses_it_and_a_second_one_may_wait(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")
    with holding(domain) as other:
        other.kill()
        other.wait()
    assert f"process {other.pid}" in domain.refusal()  # it may be alive, for all that is known
    started = time.monotonic()
    with domain.lease("second", wait_s=30) as held:
        assert time.monotonic() - started < domain.ttl_s + 6
        held.check()
        assert domain.files() == ["000002.json"]


def test_nobody_waits_for_a_process_of_this_machine_that_is_dead(place: Domain) -> None:
    with holding(place) as other:
        assert f"process {other.pid}" in place.refusal()
        other.kill()
        other.wait()
    with place.lease("second"):
        assert place.files() == ["000002.json"]


def test_who_waits_gets_it_when_the_first_one_ends(place: Domain) -> None:
    with holding(place, seconds=1) as other, place.lease("second", ttl_s=60, wait_s=30) as held:
        assert other.wait(10) == 0
        held.check()


def test_a_holder_that_slept_too_long_notices(place: Domain) -> None:
    script = """
try:
    with held() as lease:
        print("has it", flush=True)
        sys.stdin.readline()
        lease.check()
except Exception as error:
    print(error)
"""
    sleeper = place.process(script)
    assert sleeper.stdout is not None
    assert sleeper.stdout.readline() == "has it\n"
    sleeper.send_signal(signal.SIGSTOP)
    try:
        with place.lease("second", wait_s=30) as held:
            sleeper.send_signal(signal.SIGCONT)
            said, _ = sleeper.communicate("go on\n", timeout=30)
            assert said.startswith(f"the lease on {place.folder} was lost: ")
            assert said.endswith("; nothing more is committed, run again\n")
            held.check()
            assert place.files() == ["000002.json"]
    finally:
        sleeper.kill()


def test_a_lost_lease_commits_nothing_more(domain: Domain) -> None:
    higher = f"{domain.folder}/lease/000002.json"
    with pytest.raises(StageError) as caught, domain.lease("first") as held:
        storage.write_bytes(higher, b"somebody")
        with pytest.raises(StageError, match=r"was lost: now held by an unknown writer"):
            held.check()
        time.sleep(domain.ttl_s / 2)  # it is not renewed over another one's head
    assert str(caught.value).startswith(f"the lease on {domain.folder} was lost: ")
    assert str(caught.value).endswith("; nothing more is committed, run again")
    assert domain.files() == ["000001.json", "000002.json"]
    assert storage.read_bytes(higher) == b"somebody"
    assert not json.loads(storage.read_bytes(f"{domain.folder}/lease/000001.json"))["released"]


def test_an_error_in_the_block_is_the_one_that_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lease(str(tmp_path), holder="first", ttl_s=1):
        storage.write_bytes(f"{tmp_path}/lease/000002.json", b"somebody")
        raise ZeroDivisionError


def test_of_many_threads_one_at_a_time_holds_it(domain: Domain) -> None:
    inside, most, turns = [], [0], []
    guard = threading.Lock()

    def work(number: int) -> None:
        with domain.lease(f"worker {number}", ttl_s=30, wait_s=60) as held:
            with guard:
                inside.append(number)
                most[0] = max(most[0], len(inside))
            time.sleep(0.02)
            held.check()
            with guard:
                inside.remove(number)
                turns.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(6)))
    assert (most, sorted(turns)) == ([1], [0, 1, 2, 3, 4, 5])


RACE = """
time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
try:
    with lease(folder, holder="rescuer", ttl_s=30) as lease:
        print("has it", flush=True)
        time.sleep(2)
        lease.check()
except Exception as error:
    print("refused")
"""


def test_of_rescuers_one_wins(place: Domain) -> None:
    with holding(place) as other:
        other.kill()
        other.wait()
    start = time.time() + place.ttl_s + 4
    rescuers = [place.process(RACE, str(start)) for _ in range(4)]
    said = [rescuer.communicate(timeout=60)[0].strip() for rescuer in rescuers]
    assert sorted(said) == ["has it", "refused", "refused", "refused"]
    assert place.files() == ["000002.json"]


def test_one_who_was_slow_finds_the_number_taken_by_a_later_one(domain: Domain) -> None:
    for _ in range(3):
        with domain.lease("first"):
            pass
    with domain.lease("later", ttl_s=30):
        assert domain.files() == ["000004.json"]
        highest = leases._highest
        stale = iter([1])  # it looked when the first one was the highest, and slept
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leases, "_highest", lambda uri: next(stale, None) or highest(uri))
            assert leases._acquire(domain.folder, "slow", 30) is None
        assert domain.files() == ["000004.json"]


def test_a_store_that_is_away_for_too_long_loses_the_lease(
    moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "RETRY_DELAYS_S", ())
    own = ObjectStore()
    monkeypatch.setenv("AWS_ENDPOINT_URL", own.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    lost = pytest.raises(StageError, match=r"was lost: it could not be renewed for 3 s")
    with lost, lease(own.bucket().uri, holder="first", ttl_s=3) as held:
        own.stop()
        with pytest.raises(TransientError):
            held.check()  # not lost yet, and not certain
        time.sleep(3)
        held.check()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"name": 1}'])
def test_a_file_that_is_no_lease_counts_for_a_minute(data: bytes, tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/lease/000007.json", data)
    with pytest.raises(StageError, match="an unknown writer"), lease(str(tmp_path), holder="second", ttl_s=1):
        pass
    os.utime(tmp_path / "lease/000007.json", (time.time() - 70,) * 2)
    with lease(str(tmp_path), holder="second", ttl_s=1):
        assert storage.list_names(f"{tmp_path}/lease") == ["000008.json"]


def test_a_time_that_a_store_cannot_tell_is_refused(tmp_path: Path) -> None:
    for folder, least in (("s3://bucket/domain", 3), (str(tmp_path), 0.15)):
        with pytest.raises(ValueError, match=f"give at least {least}"), lease(folder, holder="first", ttl_s=0.1):
            pass


def test_a_full_disk_keeps_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "twemoji")

    def full(uri: str, data: bytes) -> None:
        raise errors.disk_full_error(uri)

    with lease(folder, holder="first"):
        monkeypatch.setattr(storage, "write_bytes", full)
    monkeypatch.undo()
    with lease(folder, holder="second") as held:
        held.check()


def test_a_disk_that_is_full_for_a_moment_loses_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, full = storage.write_bytes, iter([True])

    def full_for_a_moment(uri: str, data: bytes) -> None:
        if uri.endswith("000001.json") and next(full, None) is not None:
            raise errors.disk_full_error(uri)
        write(uri, data)

    with lease(str(tmp_path / "twemoji"), holder="first", ttl_s=1.5) as held:
        monkeypatch.setattr(storage, "write_bytes", full_for_a_moment)
        time.sleep(2)
        held.check()
    assert next(full, None) is None
