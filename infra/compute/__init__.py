"""Execution on a Ray cluster."""

from infra.compute.ray_cluster import capacity, clamp_cpus, cluster, cpus, gpus, start
from infra.compute.workers import ActorGroup, Worker, actor_group, map_shards, run

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
