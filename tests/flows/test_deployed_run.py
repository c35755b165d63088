"""Tests of the final state of a run that finds the lease on its domain taken."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.context import FlowRunContext

from flows.deployed_run import skip_if_leased
from infra.errors import LeaseHeldError, StageError
from infra.storage.lease import lease


@skip_if_leased
def write(folder: str) -> Any:
    with lease(folder, holder="second"):
        return "written"


def run_of(deployment: str | None) -> FlowRunContext:
    return FlowRunContext.model_construct(flow_run=SimpleNamespace(deployment_id=deployment))


def test_skip_if_leased_in_a_deployed_run_returns_skipped_with_the_holder(tmp_path: Path) -> None:
    with lease(str(tmp_path), holder="rebuild-index birds"), run_of("an-id"):
        state = write(str(tmp_path))
    assert (state.name, state.type.value) == ("Skipped", "COMPLETED")
    assert "is being written by rebuild-index birds (process" in state.message


@pytest.mark.parametrize("context", [None, run_of(None)], ids=["function", "direct-flow"])
def test_skip_if_leased_outside_a_deployed_run_raises(tmp_path: Path, context: FlowRunContext | None) -> None:
    with lease(str(tmp_path), holder="first"), pytest.raises(LeaseHeldError):
        if context is None:
            write(str(tmp_path))
        else:
            with context:
                write(str(tmp_path))


def test_skip_if_leased_without_a_conflict_returns_the_result(tmp_path: Path) -> None:
    with run_of("an-id"):
        assert write(str(tmp_path)) == "written"


def test_skip_if_leased_passes_other_errors(tmp_path: Path) -> None:
    @skip_if_leased
    def fail() -> None:
        raise StageError("the lease was lost")

    with run_of("an-id"), pytest.raises(StageError, match="lost"):
        fail()
