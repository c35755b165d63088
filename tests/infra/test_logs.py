"""Tests of the level of the project's logger in the process of a deployed run."""

import os
import subprocess
import sys

import pytest

LEVEL = """
import logging
from infra import logs
print(logging.getLevelName(logs.get("stage").getEffectiveLevel()))
logging.getLogger("knn_diffusion").setLevel(logging.ERROR)
logs.show_progress()
print(logging.getLevelName(logs.get("stage").getEffectiveLevel()))
"""


@pytest.mark.parametrize(("run", "level"), [({"PREFECT__FLOW_RUN_ID": "0"}, "INFO"), ({}, "WARNING")])
def test_logger_shows_stage_lines_only_in_the_process_of_a_run(run: dict[str, str], level: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT__FLOW_RUN_ID"} | run
    done = subprocess.run([sys.executable, "-c", LEVEL], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [level, "ERROR"]
