"""Tests of Ray Train on a local cluster: retries, final errors and requests that exceed the cluster."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from infra import compute
from infra.compute import ray_train
from infra.errors import StageError


@pytest.mark.slow
def test_train_retries_a_killed_worker_but_not_a_final_error(tmp_path: Path) -> None:
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

    with compute.cluster(cores=1):
        with pytest.raises(StageError, match="1 GPUs per worker requested, but the largest machine has 0; request no"):
            train("never", use_gpu=True)
        with pytest.raises(StageError, match=r"^2 workers of 1 cores .* the cluster has room for 1; set workers or"):
            train("never", workers=2, cpus_per_worker=2)
        with pytest.raises(ArithmeticError, match=r"^the loss is nan$"):
            train("final")
        train("killed")
    attempts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert attempts == {"final": ".", "killed": ".."}
    assert not (tmp_path / "stage" / "ray").exists()
