"""Replicas of the API on Ray Serve. Their processes import this module."""

import os
from typing import Any

from support.fake_engine import FakeEngine
from support.served_app import app_of


class Replica(FakeEngine):
    """An engine whose model is named after its process."""

    def info(self) -> Any:
        return super().info().model_copy(update={"model": f"replica {os.getpid()}"})


def service(count: int) -> Any:
    """Return a Ray Serve application of ``count`` replicas."""
    from ray import serve

    replica = serve.ingress(lambda: app_of(Replica(step_s=0)))()
    return serve.deployment(replica, num_replicas=count, ray_actor_options={"num_cpus": 0}).bind()
