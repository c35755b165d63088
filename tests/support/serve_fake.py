"""Run ``knn-diffusion serve`` with an engine in memory: serve_fake.py STEP_S DRAIN_S [ARGUMENT]…"""

import dataclasses
import sys
from types import ModuleType
from typing import Any

from support.fake_engine import FakeEngine

from flows.cli import main
from tasks.serve.api import config

STEP_S, DRAIN_S, *ARGUMENTS = sys.argv[1:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiConfig(config.ApiConfig):
    drain_s: float = float(DRAIN_S)


class Engine:
    @staticmethod
    def open(served: Any, settings: Any) -> FakeEngine:
        return FakeEngine(*served.databases, step_s=float(STEP_S))


module = ModuleType("tasks.serve.service.engine")  # the real one imports torch, and loads a model
module.Engine = Engine  # type: ignore[attr-defined]
sys.modules[module.__name__] = module
sys.modules["nicegui"] = None  # type: ignore[assignment]  # as if the extra `web` was not installed
config.ApiConfig = ApiConfig  # type: ignore[misc]
sys.argv = ["knn-diffusion", "serve", *ARGUMENTS]
main()
