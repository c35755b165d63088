"""What all stages share: skip, count what was lost, retry only what may pass."""

from pathlib import Path
from typing import Any

import pytest

from infra import artifacts, compute
from infra.errors import InputError, StageError, TransientError
from tasks.references.types import ImageShards
from tasks.stage import map_stage, skip_or_make, stage_task


def counting() -> Any:
    """A worker that commits a shard of as many rows as its item says; an item of 0 is beyond it.

    Made in here so that it travels to Ray by value: its workers cannot import the tests.
    """

    class Counting:
        def __init__(self, uri: str, folder: str) -> None:
            self.uri, self.folder = uri, Path(folder)

        def __call__(self, item: tuple[str, int]) -> artifacts.Shard:
            name, rows = item
            if rows == 0:
                raise InputError(f"{name} cannot be read")
            local = self.folder / name
            local.mkdir()
            (local / f"{name}.txt").write_text("x" * rows)
            return artifacts.commit_shard(self.uri, name, local, rows=rows, info={})

    return Counting


def stage_at(folder: Path) -> artifacts.Stage:
    return artifacts.Stage(str(folder / "base"), "images", inputs={}, config={"a": 1})


def unreachable() -> Any:
    """A worker whose store is down, save for items of more than 0."""

    class Unreachable:
        def __init__(self, uri: str, folder: str) -> None:
            self.uri, self.folder = uri, Path(folder)

        def __call__(self, item: tuple[str, int]) -> artifacts.Shard:
            name, rows = item
            (self.folder / f"tried-{name}").touch()
            if rows == 0:
                raise TransientError("the store could not be reached")
            (self.folder / name).mkdir()
            return artifacts.commit_shard(self.uri, name, self.folder / name, rows=rows, info={})

    return Unreachable


def test_a_store_that_is_down_ends_the_stage_early_and_may_pass(tmp_path: Path) -> None:
    stage = stage_at(tmp_path)
    items = [(f"{number:05d}", int(number == 0)) for number in range(30)]
    with compute.cluster(cores=1), pytest.raises(TransientError) as caught:
        map_stage(stage, items, unreachable(), (stage.uri, str(tmp_path)), actors=1, max_lost_fraction=1.0)
    assert str(caught.value) == (
        "images: 29 of 30 shards have to wait (the store could not be reached); the other 1 are committed"
    )
    assert list(stage.done()) == ["00000"]
    assert len(list(tmp_path.glob("tried-*"))) < 10


def test_committed_output_is_not_made_again(tmp_path: Path) -> None:
    stage, made = stage_at(tmp_path), []

    def make() -> artifacts.Manifest:
        made.append(1)
        return stage.commit([], info={})

    first, second = (skip_or_make(stage, ImageShards, make) for _ in range(2))
    assert (first.skipped, second.skipped, len(made)) == (False, True, 1)
    assert first.reference == second.reference


def test_lost_shards_are_named_and_only_those_are_tried_again(tmp_path: Path) -> None:
    stage = stage_at(tmp_path)
    settings = (stage.uri, str(tmp_path))
    items = [("00000", 3), ("00001", 0), ("00002", 2)]
    with compute.cluster(cores=2):
        with pytest.raises(StageError, match=r"1 of 3 shards failed \(InputError: 00001 cannot be read\).*other 2 are"):
            map_stage(stage, items, counting(), settings, actors=1)
        assert sorted(stage.done()) == ["00000", "00002"]
        done, lost = map_stage(stage, items, counting(), settings, actors=1, max_lost_fraction=0.4)
        assert [shard.rows for shard in done] == [3, 2]  # a second making of these would fail: their folders are there
        assert lost == {"00001": "InputError: 00001 cannot be read"}
        with pytest.raises(InputError, match="alone cannot be read"):
            map_stage(stage, [("alone", 0)], counting(), settings, actors=1)


def test_more_workers_than_cores_wait_for_nobody(tmp_path: Path) -> None:
    stage = stage_at(tmp_path)
    items = [(f"{number:05d}", number + 1) for number in range(6)]
    with compute.cluster(cores=1):
        settings = (stage.uri, str(tmp_path))
        done, lost = map_stage(stage, items, counting(), settings, actors=3, cpus_per_actor=2)
        assert compute.run(abs, -3, cpus=4) == 3
        with pytest.raises(StageError, match="1 GPUs are asked for each worker, the largest machine has 0"):
            map_stage(stage, [("x", 1)], counting(), settings, gpus_per_actor=1)
        with pytest.raises(StageError, match="1 GPUs are asked for each worker, the largest machine has 0; ask for no"):
            compute.run(abs, -1, gpus=1)
    assert ([shard.rows for shard in done], lost) == ([1, 2, 3, 4, 5, 6], {})


def test_without_a_cluster_a_stage_says_so() -> None:
    with pytest.raises(StageError, match="run stages inside compute"):
        compute.run(abs, -1)


@pytest.mark.parametrize("address", ["10.0.0.5", "10.0.0.5:ray"])
def test_an_address_without_a_port_is_told_in_one_line(address: str) -> None:
    with compute.cluster(address), pytest.raises(InputError) as caught:
        compute.start()
    assert str(caught.value).startswith(f"{address} is no address of a Ray cluster (")
    assert str(caught.value).endswith("); write HOST:PORT, ray://HOST:PORT or auto")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("error", "tries"), [(TransientError, 3), (InputError, 1), (ZeroDivisionError, 1)])
def test_only_transient_errors_are_retried(prefect_server: None, error: type[Exception], tries: int) -> None:
    tried: list[int] = []

    @stage_task("fails twice")
    def fails() -> str:
        tried.append(1)
        if len(tried) < 3:
            raise error("no")
        return "made"

    impatient: Any = fails.with_options(retry_delay_seconds=0)  # type: ignore[attr-defined]
    if tries == 1:
        with pytest.raises(error):
            impatient()
    else:
        assert impatient() == "made"
    assert len(tried) == tries
