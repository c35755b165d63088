"""Tests of the final states of a run: it finds the lease on its domain taken, or is cancelled."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import httpx
import pytest
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelling, Completed, Running

from flows import deployed_run
from flows.deployed_run import deployable
from infra.errors import LeaseHeldError, StageError
from infra.storage.lease import lease


@deployable
def write(folder: str) -> Any:
    with lease(folder, holder="second"):
        return "written"


def run_of(deployment: str | None) -> FlowRunContext:
    return FlowRunContext.model_construct(flow_run=SimpleNamespace(id="run", deployment_id=deployment))


def test_deployable_in_a_deployed_run_returns_skipped_with_the_holder(tmp_path: Path) -> None:
    with lease(str(tmp_path), holder="rebuild-index birds"), run_of("an-id"):
        state = write(str(tmp_path))
    assert (state.name, state.type.value) == ("Skipped", "COMPLETED")
    assert "is being written by rebuild-index birds (process" in state.message


@pytest.mark.parametrize("context", [None, run_of(None)], ids=["function", "direct-flow"])
def test_deployable_outside_a_deployed_run_raises(tmp_path: Path, context: FlowRunContext | None) -> None:
    with lease(str(tmp_path), holder="first"), pytest.raises(LeaseHeldError):
        if context is None:
            write(str(tmp_path))
        else:
            with context:
                write(str(tmp_path))


def test_deployable_without_a_conflict_returns_the_result(tmp_path: Path) -> None:
    with run_of("an-id"):
        assert write(str(tmp_path)) == "written"


def test_deployable_passes_other_errors(tmp_path: Path) -> None:
    @deployable
    def fail() -> None:
        raise StageError("the lease was lost")

    with run_of("an-id"), pytest.raises(StageError, match="lost"):
        fail()


class Server:
    """Prefect's API with one run, as the client of a flow sees it."""

    def __init__(self, state: State[Any]) -> None:
        self.state = state

    def __call__(self, **_: Any) -> "Server":
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_flow_run(self, run_id: str) -> Any:
        if self.state.is_final():
            raise httpx.ConnectError("refused")
        return SimpleNamespace(state=self.state)

    def set_flow_run_state(self, run_id: str, state: State[Any], force: bool) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("before", "after"), [(Cancelling(), "Cancelled"), (Running(), "Running"), (Completed(), "Completed")]
)
def test_deployable_on_sigterm_reports_only_a_run_that_is_being_cancelled(
    before: State[Any], after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(before)
    monkeypatch.setattr(deployed_run, "get_client", server)

    @deployable
    def interrupted() -> None:
        raise TerminationSignal(signal.SIGTERM)

    with run_of("an-id"), pytest.raises(TerminationSignal):
        interrupted()
    assert server.state.name == after
