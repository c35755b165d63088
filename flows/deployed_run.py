"""Final states of a run that a deployment started."""

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
"""Name of the state of a run that found the lease on its domain taken. Its type is ``COMPLETED``."""

TAG = "knn-diffusion"
"""Tag of the deployments and their runs, which the automation on heartbeats watches.

Tasks have no tags, because Prefect acquires a concurrency slot for each tag of a task.
"""

P = ParamSpec("P")
R = TypeVar("R")


def deployable(function: Callable[P, R]) -> Callable[P, R]:
    """Give a deployed run of ``function`` the states Skipped and Cancelled.

    Skipped: another writer holds the lease; the message names it. A scheduled run that meets a longer one is expected,
    and is no failure. Calls from Python and from the command still raise ``LeaseHeldError``.

    Cancelled: the run was cancelled and its work has stopped. Prefect's worker would report that too, but only after it
    has imported the flow in another process, to look for hooks, which takes longer than the stop itself.
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
    """Set the state Cancelled if the run is being cancelled. SIGTERM alone, as at a shutdown, is left to Prefect."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run_id).state
            if state is not None and state.is_cancelling():
                stopped: State[Any] = Cancelled(
                    message="Cancelled. Committed shards and checkpoints remain; run again to resume."
                )
                client.set_flow_run_state(run_id, stopped, force=True)
    except httpx.HTTPError as error:
        logs.get("flow").warning("cancelled, but not reported to Prefect (%s); the worker will do so", error)
