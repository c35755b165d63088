"""Final state of a run that a deployment started."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from prefect.context import FlowRunContext
from prefect.states import Completed

from infra import logs
from infra.errors import LeaseHeldError

SKIPPED = "Skipped"
"""Name of the state of a run that found the lease on its domain taken. Its type is ``COMPLETED``."""

P = ParamSpec("P")
R = TypeVar("R")


def skip_if_leased(function: Callable[P, R]) -> Callable[P, R]:
    """End a deployed run as Skipped if another writer holds the lease; its message names the holder.

    A scheduled run that meets a longer one is expected, and is no failure. Calls from Python and from the command still
    raise ``LeaseHeldError``.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except LeaseHeldError as error:
            if not _is_deployed():
                raise
            logs.get("flow").warning("skipped: %s", error)
            return Completed(name=SKIPPED, message=str(error))  # type: ignore[return-value]  # Prefect takes a state

    return run


def _is_deployed() -> bool:
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None
