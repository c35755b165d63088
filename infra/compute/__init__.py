"""Work on a Ray cluster."""

from infra.compute.ray_cluster import (
    Placed,
    Worker,
    cluster,
    cpus,
    fitting,
    gpus,
    map_shards,
    placed,
    room,
    run,
    start,
)

__all__ = [
    "Placed",
    "Worker",
    "cluster",
    "cpus",
    "fitting",
    "gpus",
    "map_shards",
    "placed",
    "room",
    "run",
    "start",
]
