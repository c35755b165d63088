"""A cluster of several machines, played by several Ray nodes on this one, of which one dies in the middle."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import compute
from infra.compute import ray_cluster
from infra.compute.actor_pool import FailedShard

SECONDS = 0.4


@pytest.fixture
def machines() -> Iterator[Callable[[int], Any]]:
    """Makes a head without cores, and so many machines of one core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})

    def added(count: int) -> Any:
        for _ in range(count):
            cluster.add_node(num_cpus=1)
        return cluster

    yield added
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.on_ray
def test_a_dead_node_costs_at_most_the_shards_in_hand(
    machines: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both "machines" would unpack the checkout into one folder, the later one under the other's first worker, which
    # then dies before it is known, and Ray waits a minute for it. Here they see this one's files.
    shared = {"env_vars": {"PYTHONPATH": str(ray_cluster._CHECKOUT)}}
    monkeypatch.setattr(ray_cluster, "_shipped_checkout", lambda: shared)
    nodes, folder = machines(2), str(tmp_path)

    class Worker:
        """Notes each shard that it begins. Defined here, it travels by value: the tests are not shipped."""

        def __call__(self, shard: int) -> tuple[int, str]:
            import ray

            node = ray.get_runtime_context().get_node_id()
            (Path(folder) / f"{shard}-{node}-{time.monotonic_ns()}").touch()
            time.sleep(SECONDS)
            return shard, node

    results: list[Any] = []
    with compute.cluster(nodes.address):
        for result in compute.map_shards(Worker, (), range(16), actors=2, description="shards"):
            results.append(result)
            if len(results) == 4:
                assert len({node for _, node in results}) == 2, "both machines work"
                dead = nodes.list_all_nodes()[1]
                nodes.remove_node(dead, allow_graceful=False)

    assert not [result for result in results if isinstance(result, FailedShard)]
    assert sorted(shard for shard, _ in results) == list(range(16))
    begun = [path.name.split("-")[0] for path in tmp_path.iterdir()]
    assert len(begun) - len(set(begun)) <= 2, "an actor holds two shards at most"


@pytest.mark.slow
@pytest.mark.on_ray
def test_a_checkout_travels_to_the_machines_of_a_cluster(machines: Callable[[int], Any]) -> None:
    class Worker:
        def __call__(self, shard: int) -> str:
            import infra

            return str(infra.__file__)

    with compute.cluster(machines(1).address):
        (found,) = compute.map_shards(Worker, (), [0], actors=1, description="shards")
    assert found.endswith("infra/__init__.py")
    assert not Path(found).is_relative_to(ray_cluster._CHECKOUT)
