"""Tests of actors that die: retries, isolation, and the cost for other shards."""

import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError, RuntimeEnvSetupError

from infra import compute
from infra.compute import actor_pool, interruptible, workers
from infra.compute.actor_pool import SHARD_TRIES, ActorPool, FailedShard
from infra.errors import StageError, TransientError


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with one core, for all tests of the module that need real actors."""
    with compute.cluster(cores=1):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 2])
def test_map_shards_with_a_poisonous_shard_fails_that_shard_only(
    cluster: None, concurrency: int, tmp_path: Path
) -> None:
    folder = str(tmp_path)

    class Worker:
        """Local, so that Ray pickles it by value: tests are not shipped."""

        def __call__(self, shard: str) -> str:
            with open(f"{folder}/{shard}", "a") as attempts:
                attempts.write(".")
            time.sleep(0.1)
            if shard == "poison":
                os._exit(1)  # like the out-of-memory killer or a crash of a decoder
            time.sleep(0.1)
            return shard

    shards = ["a", "b", "poison", "c", "d", "e"]
    results = list(compute.map_shards(Worker, (), shards, actors=1, concurrency=concurrency, description="shards"))

    failed = [result.item for result in results if isinstance(result, FailedShard)]
    assert failed == ["poison"]
    assert sorted(result for result in results if not isinstance(result, FailedShard)) == ["a", "b", "c", "d", "e"]
    attempts = {path.name: len(path.read_text()) for path in tmp_path.iterdir()}
    assert attempts["poison"] <= SHARD_TRIES + 1, "more than one attempt shared its actor with another shard"
    assert all(count <= 2 for name, count in attempts.items() if name != "poison")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["map_shards", "run"])
def test_signal_while_waiting_for_ray_raises_the_error_of_its_handler(call: str, cluster: None, tmp_path: Path) -> None:
    running, stop, ended = (tmp_path / name for name in ("running", "stop", "ended"))

    class Terminated(BaseException):
        pass

    class Worker:
        """Local, so that Ray pickles it by value: tests are not shipped."""

        def __call__(self, shard: str) -> None:
            running.touch()
            while running.exists() and not stop.exists():  # files are deleted after the test
                time.sleep(0.05)
            if stop.exists():
                ended.touch()

    def wait() -> None:
        if call == "run":
            compute.run(Worker(), "a")
        list(compute.map_shards(Worker, (), ["a"], actors=1, description="shards"))

    def handle(number: int, frame: object) -> None:
        raise Terminated

    def send() -> None:
        while not running.exists():
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, handle)
    try:
        threading.Thread(target=send, daemon=True).start()
        with pytest.raises(Terminated):
            wait()
        assert not ended.exists(), "the signal took effect only after the worker's result"
    finally:
        stop.touch()  # an interrupted call runs on until the cluster ends
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_map_shards_isolates_a_shard_that_kills_workers(cluster: None) -> None:
    class Worker:
        """Local, so that Ray pickles it by value: tests are not shipped."""

        def __call__(self, shard: str) -> str:
            if shard == "poison":
                os._exit(1)
            return shard

        def isolated(self, shard: str) -> str:
            return f"{shard} in isolation"

    results = compute.map_shards(Worker, (), ["a", "poison", "b"], actors=1, concurrency=2, description="shards")
    assert sorted(results) == ["a", "b", "poison in isolation"]


class Actor:
    """Fake Ray actor: a method call is a function that runs when its result is requested."""

    def __init__(self, ready: Callable[[], None], run: Callable[[str, bool], str]) -> None:
        self.ready = SimpleNamespace(remote=lambda: ready)
        self.run = SimpleNamespace(remote=lambda item, isolate: lambda: run(item, isolate))


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """Actors that the pool killed, through a fake of Ray."""
    killed: list[Actor] = []
    waits = itertools.count()

    def wait(calls: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        count = num_returns if next(waits) % 2 else 0  # every first slice ends without a result
        return calls[:count], calls[count:]

    fake = SimpleNamespace(
        wait=wait,
        get=lambda calls: [call() for call in calls],
        kill=killed.append,
    )
    for module in (actor_pool, interruptible):
        monkeypatch.setattr(module, "ray", fake)
    return killed


def test_actor_pool_with_a_shard_out_of_memory_fails_that_shard_only(killed: list[Actor]) -> None:
    error = OutOfMemoryError("Task was killed due to the node running low on memory.")
    attempts: Counter[str] = Counter()

    def run(item: str, isolate: bool) -> str:
        attempts[item] += 1
        if item == "big" or (item == "unlucky" and attempts[item] == 1):
            raise error
        return item

    results = list(ActorPool(lambda: Actor(lambda: None, run), ["a", "big", "unlucky", "b"], 2).results())
    assert sorted(one for one in results if not isinstance(one, FailedShard)) == ["a", "b", "unlucky"]
    (failed,) = (one for one in results if isinstance(one, FailedShard))
    assert (failed.item, failed.error) == ("big", error)
    assert len(killed) == attempts["big"] + 1


def test_actor_pool_isolates_a_shard_after_the_second_death(killed: list[Actor]) -> None:
    calls: list[tuple[str, bool]] = []

    def run(item: str, isolate: bool) -> str:
        calls.append((item, isolate))
        if item == "poison" and not isolate:
            raise OutOfMemoryError("it died")
        return item

    results = list(ActorPool(lambda: Actor(lambda: None, run), ["a", "poison", "b"], 1).results())
    assert sorted(results) == ["a", "b", "poison"]
    assert [isolate for item, isolate in calls if item == "poison"] == [False, False, True]
    assert not any(isolate for item, isolate in calls if item != "poison")


def test_actor_run_isolates_only_if_the_worker_supports_it() -> None:
    class Plain:
        def __call__(self, item: str) -> str:
            return item

    class Isolating(Plain):
        def isolated(self, item: str) -> str:
            return f"{item} in isolation"

    plain, isolating = (workers._Actor(kind, (), {}) for kind in (Plain, Isolating))
    assert [plain.run("a", True), plain.run("a")] == ["a", "a"]
    assert [isolating.run("a", True), isolating.run("a")] == ["a in isolation", "a"]


def test_actor_pool_without_an_environment_raises_stage_error_of_one_line(killed: list[Actor]) -> None:
    def ready() -> None:
        raise RuntimeEnvSetupError("no such\nworking_dir")

    with pytest.raises(StageError) as caught:
        list(ActorPool(lambda: Actor(ready, lambda item, _: item), ["a"], 1).results())
    assert str(caught.value) == (
        "no worker could be started (Failed to set up runtime environment. no such working_dir); see Ray's logs"
    )
    assert len(killed) == SHARD_TRIES + 1


@pytest.mark.slow
def test_lost_worker_raises_error_of_one_line(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SHARD_TRIES", 0)

    class Worker:
        """Local, so that Ray pickles it by value: tests are not shipped."""

        def __call__(self, status: int) -> None:
            os._exit(status)

    with pytest.raises(StageError) as caught:
        compute.run(os._exit, 1)
    with compute.actor_group(Worker, [()]) as group, pytest.raises(TransientError) as caught_in_group:
        group.call(1)
    assert str(caught.value).startswith("the worker of _exit was lost (")
    assert str(caught.value).endswith("); give it more memory, or see Ray's logs, and run again")
    assert str(caught_in_group.value).endswith("); try again")
    assert "\n" not in str(caught.value) + str(caught_in_group.value)


@pytest.mark.slow
def test_actor_group_without_room_raises_error_within_the_time_limit(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_CHECK_S", 0.2)

    class Worker:
        """Local, so that Ray pickles it by value: tests are not shipped."""

        def __call__(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    with compute.actor_group(Worker, [(), ()], cpus_each=0.5) as group:
        monkeypatch.setattr(workers, "_START_S", 0.5)
        with (
            pytest.raises(StageError, match=r"^1 of 1 workers of 1 cores did not start in 0\.5 s; .* for 1,"),
            compute.actor_group(Worker, [()]),
        ):
            pass
        assert group.call(0.5) == [0.5, 0.5], "slow workers must not be given up"
        monkeypatch.setattr(workers, "capacity", lambda *_: 1)
        with pytest.raises(TransientError, match=r"^a machine was lost: 2 workers .* room for 1; try again once"):
            group.call(30)


@pytest.mark.parametrize(
    ("each", "room"),
    [((1, 0), 7), ((0.2, 0), 35), ((0.1, 0), 70), ((2, 0), 3), ((3, 0), 2), ((4, 0), 1), ((1, 1), 2), ((2, 0.5), 2)],
)
def test_capacity_counts_workers_that_fit_each_machine(
    each: tuple[float, float], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 3.0, "memory": 1.0}]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*({"Alive": True, "Resources": one} for one in machines), dead])
    assert compute.capacity(*each) == room
    assert (compute.clamp_cpus(8), compute.clamp_cpus(3.5, 1), compute.clamp_cpus(8, 9)) == (4, 3.5, 8)
    machines[0]["CPU"], machines[1]["CPU"] = 2.0, 6.0
    assert (compute.clamp_cpus(8), compute.clamp_cpus(8, 1)) == (6, 2), "the machine with GPUs has fewer cores"
    assert compute.capacity(0, 0) > 100, "workers without cores fit a head node without cores"
    with pytest.raises(StageError, match="3 GPUs per worker requested, but the largest machine has 2; request no more"):
        compute.capacity(1, 3)
