"""Tests of the access control of a local Ray cluster."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.compute import local_ray
from infra.errors import StageError

OBSERVED = """
import os, signal, subprocess
import ray
from infra import compute

def handle(number, frame): ...

signal.signal(signal.SIGTERM, handle)
print(os.environ.get("RAY_AUTH_TOKEN"))
with compute.cluster(None, 1):
    compute.start()
    print(signal.getsignal(signal.SIGTERM) is handle)
    print(compute.run(os.getpid) > 0)
    print(ray.get_runtime_context().gcs_address)
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    own = {os.getpid()}
    running = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in running.splitlines()]
    for _ in range(4):
        own |= {pid for pid, parent in parents if parent in own}
    own_lines = [line for line in listening if any(f"pid={pid}," in line for pid in own)]
    print(len(own_lines), *sorted({line.split()[3].rpartition(":")[0] for line in own_lines}))
    print(len(os.environ["RAY_AUTH_TOKEN"]), os.environ["RAY_AUTH_MODE"])
    join = f"from ray._raylet import GcsClient; GcsClient('{ray.get_runtime_context().gcs_address}'); print('joined')"
    other = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    stranger = ["timeout", "30", os.sys.executable, "-c", join]
    done = subprocess.run(stranger, env=other, capture_output=True, text=True)
    print("InvalidAuthToken" in done.stderr, "joined" in done.stdout)
print(os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_MODE"))
with compute.cluster(None, 1):
    print(compute.run(os.getpid) > 0)
"""


@pytest.mark.slow
@pytest.mark.on_ray
def test_local_cluster_listens_on_loopback_requires_its_token_and_keeps_the_sigterm_handler(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment = {**clean, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", OBSERVED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, kept, ran, gcs, listening, auth, joined, after, again = done.stdout.splitlines()
    assert (before, after) == ("None", "None None")
    assert kept == "True"
    assert (ran, again) == ("True", "True")
    assert gcs.startswith("127.0.0.1:")
    count, *addresses = listening.split()
    assert int(count) >= 4
    assert set(addresses) <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}
    assert auth == "64 token"
    assert joined == "True False"
    assert not (tmp_path / ".ray").exists()


@pytest.fixture
def ray_variables() -> Iterator[pytest.MonkeyPatch]:
    """Change the environment of Ray for a test. Afterwards Ray reads it again, for later tests of this process."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    local_ray.reload_ray_config()


def test_private_token_keeps_variables_set_by_the_user(ray_variables: pytest.MonkeyPatch) -> None:
    ray_variables.delenv("RAY_AUTH_TOKEN", raising=False)
    ray_variables.setenv("RAY_AUTH_MODE", "disabled")
    with local_ray.private_token():
        assert os.environ["RAY_AUTH_MODE"] == "disabled"
        assert "RAY_AUTH_TOKEN" not in os.environ
    ray_variables.setenv("RAY_AUTH_MODE", "token")
    ray_variables.setenv("RAY_AUTH_TOKEN_PATH", "/of/the/user")
    with local_ray.private_token():
        assert "RAY_AUTH_TOKEN" not in os.environ


def test_session_folder_is_accessible_only_to_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = Path(local_ray.session_folder()).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    local_ray.session_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rename(tmp_path / "other")
    folder.symlink_to(tmp_path / "other")
    with pytest.raises(StageError, match="belongs to another user"):
        local_ray.session_folder()


HANDLER = """
import os, signal, threading, time
from infra import compute

class Cancelled(BaseException): ...

def handle(number, frame):
    raise Cancelled

def send_now(state):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    except Cancelled:
        print("cancelled while", state, flush=True)

def send():
    time.sleep(0.5)  # Ray takes seconds to start
    os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, handle)
with compute.cluster(None, 1):
    compute.start()
    send_now("connected")
send_now("disconnected")
threading.Thread(target=send).start()
try:
    with compute.cluster(None, 1):
        compute.start()
        print("started")
except Cancelled:
    print("cancelled while Ray starts")
"""


@pytest.mark.slow
@pytest.mark.on_ray
def test_start_keeps_the_sigterm_handler_of_the_caller_which_interrupts_it(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", HANDLER], env=environment, capture_output=True, text=True)
    states = ["connected", "disconnected", "Ray starts"]
    assert done.stdout.splitlines() == [f"cancelled while {state}" for state in states], done.stderr
    assert "SIGTERM handler" not in done.stderr
