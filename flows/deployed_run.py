"""Final states of the runs of deployments: Skipped and Cancelled."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Completed

from infra import logs
from infra.errors import LeaseHeldError

SKIPPED = "Skipped"
"""Name of the state of a run that ends because another writer holds its lease. Its type is ``COMPLETED``."""

TAG = "knn-diffusion"
"""Tag of the deployments and their runs. The heartbeat automation watches the runs with this tag.

Tasks have no tags, because Prefect acquires a concurrency slot for each tag of a task.
"""

P = ParamSpec("P")
R = TypeVar("R")


def deployable(function: Callable[P, R]) -> Callable[P, R]:
    """Let the deployed runs of ``function`` end in the states Skipped and Cancelled.

    Skipped: another writer holds the lease; the message names it. This is not a failure, because a scheduled run may
    start while a longer one is running. Calls from Python and from the command line still raise ``LeaseHeldError``.

    Cancelled: the run was cancelled and its work has stopped. Prefect's worker would set this state too, but later: to
    look for hooks, it first imports the flow in another process.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except LeaseHeldError as error:
            if _deployed_run() is None:
                raise
            logs.get("flow").warning("skipped: %s", error)
            return Completed(name=SKIPPED, message=str(error))  # type: ignore[return-value]  # Prefect takes a state
        except TerminationSignal:
            if (run_id := _deployed_run()) is not None:
                _report_cancelled(run_id)
            raise

    return run


def _deployed_run() -> UUID | None:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        return None
    return context.flow_run.id


def _report_cancelled(run_id: UUID) -> None:
    """Set the state Cancelled if the run is being cancelled. Prefect handles any other SIGTERM."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run_id).state
            if state is not None and state.is_cancelling():
                cancelled: State[Any] = Cancelled(
                    message="Cancelled. Committed shards and checkpoints remain; run again to resume."
                )
                client.set_flow_run_state(run_id, cancelled, force=True)
    except httpx.HTTPError as error:
        logs.get("flow").warning("the state Cancelled could not be set (%s); Prefect's worker will set it", error)
