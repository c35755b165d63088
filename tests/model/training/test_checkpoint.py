from pathlib import Path
from typing import Any

import pytest
import torch
from support.fakes import FolderCheckpoints
from torch import nn

from model.errors import ModelError
from model.training.checkpoint import restore, save
from model.training.muon import Muon


def stepped_optimizers(device: str) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a layer on ``device`` after one step."""
    layer = nn.Linear(4, 4, device=device)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW([layer.bias]), Muon([layer.weight])]
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


def test_restore_states_on_the_device_of_their_weights_and_step_counts_on_the_cpu(tmp_path: Path) -> None:
    checkpoints = FolderCheckpoints(tmp_path)
    save(checkpoints, 3, {}, stepped_optimizers("cpu"))
    restored = stepped_optimizers("meta")  # a device that exists everywhere and is not the CPU
    assert restore(checkpoints.latest(), {}, restored) == 3
    adam, muon = (next(iter(optimizer.state.values())) for optimizer in restored)
    assert {name: value.device.type for name, value in (adam | muon).items()} == {
        "step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta", "momentum_buffer": "meta"
    }  # fmt: skip
    assert adam["step"] == 1


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"optimizers": []}, id="no step"),
        *({"step": step, "optimizers": []} for step in (None, "three", 1.5, -1)),
        pytest.param({"step": 3}, id="no optimizers"),
        pytest.param({"step": 3, "optimizers": 7}, id="a number of optimizers"),
        pytest.param([3], id="a list"),
    ],
)
def test_restore_malformed_checkpoint_raises(tmp_path: Path, state: Any) -> None:
    path = tmp_path / "3.pt"
    torch.save(state, path)
    with pytest.raises(
        ModelError, match=r"checkpoint is damaged or belongs to another network: .*3\.pt.*delete its folder"
    ):
        restore(path, {}, [])
