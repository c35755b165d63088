"""Tests of preemption: the SIGTERM handler in a separate process, and SIGTERM to a worker of a local cluster."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]

HANDLER = """
import os, signal
from infra.compute import preemption
signal.signal(signal.SIGTERM, lambda *_: print("previous handler", flush=True))
preemption.install_handler()
os.kill(os.getpid(), signal.SIGTERM)
with preemption.deferred_sigterm():
    print(preemption.stop_requested(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print(preemption.stop_requested(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
with preemption.deferred_sigterm():
    print(preemption.stop_requested(), flush=True)
"""

TRAINING = """
import os, sys, time
from pathlib import Path
from infra import compute
from infra.compute import preemption, ray_train

folder = Path(sys.argv[1])

def loop(config):
    attempts = len(list(folder.glob("pid-*")))
    (folder / f"pid-{attempts}").write_text(str(os.getpid()))
    with preemption.deferred_sigterm():
        for step in range(600):
            time.sleep(0.05)
            if preemption.stop_requested():
                (folder / "stopped").write_text(str(step))
                raise RuntimeError("stopped")
            if attempts:
                break
    (folder / "finished").touch()

with compute.cluster(cores=1):
    ray_train.train(loop, {}, workers=1, cpus_per_worker=1, use_gpu=False, folder_uri=str(folder / "stage"))
"""


def test_handler_defers_only_the_first_sigterm_during_training() -> None:
    done = subprocess.run([sys.executable, "-c", HANDLER], cwd=ROOT, capture_output=True, text=True, timeout=60)
    expected = ["previous handler", "False", "True", "previous handler", "previous handler", "False"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_handler_without_a_previous_handler_exits_on_sigterm() -> None:
    script = (
        "import os, signal; from infra.compute import preemption; "
        "preemption.install_handler(); os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM


def test_ray_train_worker_stops_on_sigterm_and_is_restarted(tmp_path: Path) -> None:
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
    )
    try:
        _wait_for(tmp_path / "pid-0", process)
        time.sleep(0.5)
        worker = int((tmp_path / "pid-0").read_text())
        os.kill(worker, signal.SIGTERM)
        assert process.wait(120) == 0, (tmp_path / "log").read_text()[-2000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert int((tmp_path / "stopped").read_text()) > 0
    assert (tmp_path / "finished").exists(), "Ray Train did not restart the worker"
    assert int((tmp_path / "pid-1").read_text()) != worker


def _wait_for(path: Path, process: subprocess.Popen[bytes], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text()):
        assert process.poll() is None, path.with_name("log").read_text()[-2000:]
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
