"""What a checkpoint holds, written and read. Where it is kept is for the caller's Protocol to say.

Every tensor in it is whole, however many workers trained, so a run may go on with another number of them, or sharded
where it was not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from model.errors import ModelError
from model.training.interfaces import Checkpoints
from model.training.sharding import gather_state, shard_like


def save(
    checkpoints: Checkpoints, step: int, kept: Mapping[str, Any], optimizers: Sequence[Any], *, rank: int = 0
) -> None:
    """Keep the state of the modules ``kept`` and of the optimizers as the checkpoint of ``step``.

    All workers call it, for what is split over them is gathered; rank 0 writes.
    """
    states = {name: gather_state(module.state_dict()) for name, module in kept.items()}
    stepped = [gather_state(optimizer.state_dict()) for optimizer in optimizers]
    if rank == 0:
        path = checkpoints.scratch()
        torch.save({"step": step, **states, "optimizers": stepped}, path)
        checkpoints.save(step, path)


def restore(path: Path | None, kept: Mapping[str, Any], optimizers: Sequence[Any]) -> int:
    """Load what :func:`save` kept, each part to where it is in use; the step to go on from, 0 without a checkpoint.

    Raises ``ModelError`` when the file is damaged or of another network.
    """
    if path is None:
        return 0
    try:
        # To the CPU: step counts of an AdamW that is not fused stay where they are loaded, and each makes a GPU wait.
        state = torch.load(path, map_location="cpu", weights_only=True)
        step = state["step"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"its step is {step!r}")
        for name, module in kept.items():
            own = module.state_dict()
            module.load_state_dict({key: shard_like(part, own.get(key, part)) for key, part in state[name].items()})
        for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(_as_of(optimizer, old))
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but the file is sound
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError, UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        told = f"checkpoint {path} is damaged or of another network ({reason}); remove its folder to start anew"
        raise ModelError(told) from error
    return step


def _as_of(optimizer: Any, old: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's whole state, split where its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stepped = {
        number: {
            name: shard_like(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        for number, state in old["state"].items()
    }
    return {**old, "state": stepped}
