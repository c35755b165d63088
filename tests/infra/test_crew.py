"""Actors that die of a shard: what it costs the others."""

import os
import time
from typing import Any

import pytest

from infra import compute
from infra.crew import SHARD_TRIES, Lost


@pytest.mark.slow
@pytest.mark.on_ray
@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_shard_that_kills_its_worker_costs_no_other(concurrency: int, tmp_path: Any) -> None:
    folder = str(tmp_path)

    class Worker:
        """Defined here, it travels by value: the tests are not shipped."""

        def __call__(self, shard: str) -> str:
            with open(f"{folder}/{shard}", "a") as begun:
                begun.write(".")
            time.sleep(0.1)
            if shard == "poison":
                os._exit(1)  # as for a lack of memory, or a decoder's fault
            time.sleep(0.1)
            return shard

    with compute.cluster(cores=1):
        shards = ["a", "b", "poison", "c", "d", "e"]
        results = list(compute.map_shards(Worker, (), shards, actors=1, concurrency=concurrency, description="shards"))

    lost = [result.item for result in results if isinstance(result, Lost)]
    assert lost == ["poison"]
    assert sorted(result for result in results if not isinstance(result, Lost)) == ["a", "b", "c", "d", "e"]
    tries = {path.name: len(path.read_text()) for path in tmp_path.iterdir()}
    assert tries["poison"] <= SHARD_TRIES + 1, "one in company, the others alone"
    assert all(count <= 2 for name, count in tries.items() if name != "poison")
