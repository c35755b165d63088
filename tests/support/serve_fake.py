"""Run ``knn-diffusion serve`` with an engine in memory, in a process of its own: serve_fake.py STEP_S [ARGUMENT]…"""

import sys
from types import ModuleType
from typing import Any

from support.fake_engine import FakeEngine

from flows.cli import main

STEP_S, *ARGUMENTS = sys.argv[1:]


class Engine:
    @staticmethod
    def open(config: Any, settings: Any) -> FakeEngine:
        return FakeEngine(*config.databases, step_s=float(STEP_S))


module = ModuleType("tasks.serve.service.engine")  # the real one imports torch, and loads a model
module.Engine = Engine  # type: ignore[attr-defined]
sys.modules[module.__name__] = module
sys.modules["nicegui"] = None  # type: ignore[assignment]  # as if the extra `web` was not installed
sys.argv = ["knn-diffusion", "serve", *ARGUMENTS]
main()
