"""A cluster of several machines, played by several Ray nodes on this one, of which one dies in the middle."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import compute
from infra.crew import Lost

SECONDS = 0.4


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head without cores, and two machines of one core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.on_ray
def test_a_dead_node_costs_at_most_the_shards_in_hand(nodes: Any, tmp_path: Path) -> None:
    folder = str(tmp_path)

    class Worker:
        """Notes each shard that it begins. Defined here, it travels by value: the tests are not shipped."""

        def __call__(self, shard: int) -> tuple[int, str]:
            import ray

            node = ray.get_runtime_context().get_node_id()
            (Path(folder) / f"{shard}-{node}-{time.monotonic_ns()}").touch()
            deadline = time.monotonic() + 10  # one machine may begin seconds after the other
            while len({path.name.split("-")[1] for path in Path(folder).iterdir()}) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(SECONDS)
            return shard, node

    results: list[Any] = []
    dead = None
    with compute.cluster(nodes.address):
        for result in compute.map_shards(Worker, (), range(16), actors=2, description="shards"):
            results.append(result)
            if dead is None and len({node for _, node in results}) == 2:
                dead = nodes.list_all_nodes()[1]
                nodes.remove_node(dead, allow_graceful=False)

    if dead is None:
        pytest.skip("Ray started no worker on the second machine while there was work: nothing could die")
    assert not [result for result in results if isinstance(result, Lost)]
    assert sorted(shard for shard, _ in results) == list(range(16))
    begun = [path.name.split("-")[0] for path in tmp_path.iterdir()]
    assert len(begun) - len(set(begun)) <= 2, "an actor holds two shards at most"
