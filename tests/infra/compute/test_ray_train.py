"""Tests of Ray Train on a local cluster: retries, final errors and requests that exceed the cluster."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra import compute
from infra.compute import preemption, ray_train
from infra.errors import StageError


@pytest.mark.slow
def test_train_restarts_stopped_and_killed_workers_but_no_final_error_and_stops_them_when_cancelled(
    tmp_path: Path,
) -> None:
    folder = str(tmp_path)

    def loop(config: dict[str, Any]) -> None:
        attempt = len(list(Path(folder).glob(f"{config['name']}-*")))
        with preemption.deferred_sigterm():
            Path(folder, f"{config['name']}-{attempt}").write_text(str(os.getpid()))
            if attempt == 0:
                for step in range(600):
                    time.sleep(0.05)
                    if preemption.stop_requested():
                        Path(folder, "stopped").write_text(str(step))
                        raise RuntimeError("stopped")
        if attempt == 1:
            time.sleep(3)
            os._exit(1)  # like the out-of-memory killer
        raise ArithmeticError("the loss is nan")

    def train(name: str, **changes: Any) -> None:
        arguments = {"workers": 1, "cpus_per_worker": 1, "use_gpu": False, "final": (ArithmeticError,)} | changes
        ray_train.train(loop, {"name": name}, folder_uri=f"{folder}/stage", **arguments)

    def cancelled_loop(config: dict[str, Any]) -> None:
        with preemption.deferred_sigterm():
            Path(folder, "trains").touch()
            while not preemption.stop_requested():
                time.sleep(0.05)
            time.sleep(1)
            Path(folder, "checkpoint").touch()
        raise RuntimeError("stopped")

    class CancelledError(BaseException):
        pass

    def cancel(*_: object) -> None:
        if Path(folder, "trains").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise CancelledError

    with compute.cluster(cores=1), ThreadPoolExecutor(1) as pool:
        with pytest.raises(StageError, match="1 GPUs per worker requested, but the largest machine has 0; request no"):
            train("never", use_gpu=True)
        with pytest.raises(StageError, match=r"^2 workers of 1 cores .* the cluster has room for 1; reduce workers or"):
            train("never", workers=2, cpus_per_worker=2)
        terminated = pool.submit(_terminate, tmp_path / "killed-0")
        with pytest.raises(ArithmeticError, match=r"^the loss is nan$"):
            train("killed")
        terminated.result()
        before = signal.signal(signal.SIGALRM, cancel)
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        try:
            with pytest.raises(CancelledError):
                ray_train.train(
                    cancelled_loop, {}, workers=1, cpus_per_worker=1, use_gpu=False, folder_uri=f"{folder}/stage"
                )
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert Path(folder, "checkpoint").exists(), "the worker was not asked to stop, or got no time for it"
        for name in ("trains", "checkpoint"):
            Path(folder, name).unlink()
    assert int((tmp_path / "stopped").read_text()) > 0
    attempts = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert attempts == {"killed-0", "killed-1", "killed-2", "stopped"}
    pids = [(tmp_path / f"killed-{attempt}").read_text() for attempt in range(3)]
    assert len(set(pids)) == 3, "Ray Train restarts the worker"
    assert not (tmp_path / "stage" / "ray").exists()


def _terminate(path: Path) -> None:
    """Send SIGTERM to the worker that writes its pid to ``path``."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, "the worker has not started"
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(int(path.read_text()), signal.SIGTERM)
