"""Tests of Ray Train on a local cluster: retries, final errors and requests that exceed the cluster."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from infra import compute
from infra.compute import preemption, ray_train
from infra.errors import StageError


@pytest.mark.slow
def test_train_retries_a_killed_worker_but_not_a_final_error_and_stops_workers_when_cancelled(tmp_path: Path) -> None:
    folder = str(tmp_path)

    def loop(config: dict[str, Any]) -> None:
        with open(f"{folder}/{config['fault']}", "a") as attempts:
            attempts.write(".")
        if config["fault"] == "final":
            raise ArithmeticError("the loss is nan")
        if Path(folder, config["fault"]).stat().st_size == 1:
            time.sleep(3)
            os._exit(1)  # like the out-of-memory killer

    def train(fault: str, **changes: Any) -> None:
        arguments = {"workers": 1, "cpus_per_worker": 1, "use_gpu": False, "final": (ArithmeticError,)} | changes
        ray_train.train(loop, {"fault": fault}, folder_uri=f"{folder}/stage", **arguments)

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

    with compute.cluster(cores=1):
        with pytest.raises(StageError, match="1 GPUs per worker requested, but the largest machine has 0; request no"):
            train("never", use_gpu=True)
        with pytest.raises(StageError, match=r"^2 workers of 1 cores .* the cluster has room for 1; set workers or"):
            train("never", workers=2, cpus_per_worker=2)
        with pytest.raises(ArithmeticError, match=r"^the loss is nan$"):
            train("final")
        train("killed")
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
    attempts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert attempts == {"final": ".", "killed": ".."}
    assert not (tmp_path / "stage" / "ray").exists()
