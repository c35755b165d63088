"""Contents of checkpoints. Where they are stored is up to the implementation of the ``Checkpoints`` protocol.

All tensors in a checkpoint are unsharded, for any number of workers. A run can therefore resume with another number of
workers, and with or without sharding.

``torch.distributed.checkpoint.state_dict`` is not used, because it cannot load existing checkpoints. They identify the
parameters of each optimizer by number. Its loading function expects names, and raises ``KeyError`` for an AdamW state.
Converting numbers to names would take more code than :func:`_shard_state`, and Muon needs ``shard_like`` in any case.
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
    checkpoints: Checkpoints, step: int, modules: Mapping[str, Any], optimizers: Sequence[Any], *, rank: int = 0
) -> None:
    """Save the state of the named modules and of the optimizers as the checkpoint of ``step``.

    Collective: every rank must call it, because sharded tensors are gathered. Only rank 0 writes.
    """
    states = {name: gather_state(module.state_dict()) for name, module in modules.items()}
    optimizer_states = [gather_state(optimizer.state_dict()) for optimizer in optimizers]
    if rank == 0:
        path = checkpoints.scratch()
        torch.save({"step": step, **states, "optimizers": optimizer_states}, path)
        checkpoints.save(step, path)


def restore(path: Path | None, modules: Mapping[str, Any], optimizers: Sequence[Any]) -> int:
    """Load a checkpoint of :func:`save` into the modules and optimizers, and return the step to resume from.

    Args:
        path: The checkpoint file. None loads nothing and returns 0.
        modules: The modules by the names under which they were saved.
        optimizers: The optimizers in the order in which they were saved.

    Raises:
        ModelError: The file is damaged or belongs to another network.
    """
    if path is None:
        return 0
    try:
        # Load to the CPU: a non-fused AdamW keeps its step counts on the device they are loaded to. On a GPU, reading
        # them would synchronise at every step.
        state = torch.load(path, map_location="cpu", weights_only=True)
        step = state["step"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r}")
        for name, module in modules.items():
            current = module.state_dict()
            module.load_state_dict({key: shard_like(part, current.get(key, part)) for key, part in state[name].items()})
        for optimizer, state_dict in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(_shard_state(optimizer, state_dict))
    except torch.OutOfMemoryError:
        raise  # a RuntimeError too, but the file is valid
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError, UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = (
            f"checkpoint is damaged or belongs to another network: {path} ({reason}); delete its folder to train from "
            "scratch"
        )
        raise ModelError(message) from error
    return step


def _shard_state(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Shard an optimizer's unsharded state as its parameters are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        number: {
            name: shard_like(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        for number, state in state_dict["state"].items()
    }
    return {**state_dict, "state": sharded}
