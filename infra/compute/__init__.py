"""Execution on a Ray cluster."""

from infra.compute.ray_cluster import (
    ActorGroup,
    Worker,
    actor_group,
    capacity,
    clamp_cpus,
    cluster,
    cpus,
    gpus,
    map_shards,
    run,
    start,
)

__all__ = [
    "ActorGroup",
    "Worker",
    "actor_group",
    "capacity",
    "clamp_cpus",
    "cluster",
    "cpus",
    "gpus",
    "map_shards",
    "run",
    "start",
]
