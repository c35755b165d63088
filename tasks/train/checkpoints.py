"""Checkpoints of a training run, in the folder of its stage."""

from pathlib import Path

import torch.distributed as dist

from infra import artifacts, logs, storage
from infra.errors import IntegrityError, NotFoundError
from tasks.train.metrics import Metrics

CHECKPOINTS_KEPT = 2
"""Number of checkpoints kept: the newest, and the one before in case the newest is damaged."""


class Checkpoints:
    """Checkpoints of the training loop in the folder of its stage. The newest few are kept.

    Each is a file, and a marker that is written after it. The marker also holds the metrics logged last. A run that was
    killed after its last step reads them from there.
    """

    def __init__(self, folder_uri: str, scratch: Path, cache: Path, metrics: Metrics, world: int) -> None:
        """Use ``scratch`` for unsaved states; ``world`` is the number of workers."""
        self._uri, self._scratch, self._cache = storage.join(folder_uri, "checkpoints"), scratch, cache
        self._metrics, self._world = metrics, world

    def latest(self) -> Path | None:
        """Return the newest checkpoint that all workers can read. Raises ``IntegrityError`` if all are damaged."""
        markers = [name for name in storage.list_names(storage.join(self._uri, "shards")) if name.endswith(".json")]
        for name in sorted((marker.removesuffix(".json") for marker in markers), reverse=True):
            path = None
            try:
                shard = artifacts.read_shard(self._uri, name)
                path = artifacts.fetch_file(self._uri, shard.files[0], self._cache)
            except (IntegrityError, NotFoundError) as error:
                logs.get("train").warning("checkpoint %s is damaged; using the previous one: %s", name, error)
            if _all_workers(path is not None, self._world):
                self._metrics.last = shard.info.get("values", {})
                return path
        if markers:
            raise IntegrityError(
                f"all checkpoints are damaged: {self._uri}; delete that folder to train from the start"
            )
        return None

    def scratch(self) -> Path:
        """Return the local path that a state is written to before it is saved."""
        return self._scratch / "state.pt"

    def save(self, step: int, state: Path) -> None:
        """Move the file ``state`` to the stage's folder and delete checkpoints beyond the newest few."""
        name = f"{step:09d}"
        folder = self._scratch / name
        folder.mkdir()
        state.rename(folder / f"{name}.pt")
        artifacts.commit_shard(self._uri, name, folder, rows=0, info={"step": step, "values": self._metrics.last})
        (folder / f"{name}.pt").unlink()
        for marker in storage.list_names(storage.join(self._uri, "shards"))[:-CHECKPOINTS_KEPT]:
            storage.discard(storage.join(self._uri, "shards", marker))
            storage.discard(storage.join(self._uri, f"{marker.removesuffix('.json')}.pt"))


def _all_workers(found: bool, world: int) -> bool:
    """Return True if ``found`` is True on all of ``world`` workers, which must resume from the same step."""
    found_by_rank = [found] * world
    if world > 1:
        dist.all_gather_object(found_by_rank, found)
    return all(found_by_rank)
