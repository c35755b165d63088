"""Tests of a simulated cluster: several Ray nodes on this machine, one of which dies during a run."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import compute
from infra.compute import ray_cluster
from infra.compute.actor_pool import FailedShard

SECONDS = 0.4


@pytest.fixture(scope="module")
def machines() -> Iterator[Callable[[int], Any]]:
    """Function that returns a cluster of a head without cores and the given number of nodes with one core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})

    def start(count: int) -> Any:
        while len(cluster.worker_nodes) < count:
            cluster.add_node(num_cpus=1)
        return cluster

    yield start
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.on_ray
def test_map_shards_ships_the_checkout_to_the_machines(machines: Callable[[int], Any]) -> None:
    class Worker:
        def __call__(self, shard: int) -> str:
            import infra

            return str(infra.__file__)

    with compute.cluster(machines(1).address):
        (found,) = compute.map_shards(Worker, (), [0], actors=1, description="shards")
    assert found.endswith("infra/__init__.py")
    assert not Path(found).is_relative_to(ray_cluster._CHECKOUT)


@pytest.mark.slow
@pytest.mark.on_ray
def test_map_shards_with_a_dead_node_repeats_at_most_its_shards(
    machines: Callable[[int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both simulated machines would unpack the checkout into the same folder. The second one would replace the files
    # of the first worker, which would die before it registers, and Ray waits a minute for it. So share the checkout.
    shared = {"env_vars": {"PYTHONPATH": str(ray_cluster._CHECKOUT)}}
    monkeypatch.setattr(ray_cluster, "_shipped_checkout", lambda: shared)
    nodes, folder = machines(2), str(tmp_path)

    class Worker:
        """Record each shard that is started. Local, so that Ray pickles it by value: tests are not shipped."""

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
                assert len({node for _, node in results}) == 2, "one machine got no shards"
                dead = nodes.list_all_nodes()[1]
                nodes.remove_node(dead, allow_graceful=False)

    assert not [result for result in results if isinstance(result, FailedShard)]
    assert sorted(shard for shard, _ in results) == list(range(16))
    started = [path.name.split("-")[0] for path in tmp_path.iterdir()]
    assert len(started) - len(set(started)) <= 2, "more shards repeated than an actor holds"
