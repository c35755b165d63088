"""Runs of deployments: start, follow, list and cancel."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
import yaml
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterExpectedStartTime
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from prefect.states import Cancelling

from infra.errors import InputError, NotFoundError, StageError
from infra.text import printable

POLL_S = 1.0
OUTAGE_S = 120.0
"""Seconds for which Prefect's server may be unreachable while a run is followed, e.g. during a restart."""


@contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """Provide a client of Prefect's server within the block. Raises ``StageError`` if the server does not answer."""
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.TransportError as error:
        raise StageError(
            f"Prefect's server does not answer: {PREFECT_API_URL.value()} ({error}); start it with make up, or set "
            "PREFECT_API_URL"
        ) from error


def start_run(deployment: str, parameters: Sequence[str]) -> FlowRun:
    """Start a run of a deployment and return it.

    Args:
        deployment: FLOW/NAME, or NAME if both are equal.
        parameters: Parameters to override as ``name=value``, e.g. ``domain=birds`` or ``config.domain=birds``. Values
            are YAML.
    """
    name = deployment if "/" in deployment else f"{deployment}/{deployment}"
    with connected() as client:
        try:
            found = client.read_deployment_by_name(name)
        except ObjectNotFound:
            raise NotFoundError(f"deployment does not exist: {name}; run make deploy, or see prefect.yaml") from None
        changed = merge_parameters(found.parameters, parameters)
        return client.create_flow_run_from_deployment(found.id, parameters=changed)


def merge_parameters(parameters: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of a deployment with ``changes`` of the form ``name=value``.

    Names refer to fields of the parameter ``config``. The prefix ``config.`` is optional.
    """
    merged = {"config": {**parameters.get("config", {})}}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name:
            raise InputError(f"parameter is malformed: {change}; write NAME=VALUE")
        *groups, field = name.removeprefix("config.").split(".")
        target = merged["config"]
        for group in groups:
            before = target.get(group) or {}
            if not isinstance(before, Mapping):
                raise InputError(f"parameter has no fields: {group}, in {change}; set {group}=VALUE instead")
            target[group] = {**before}
            target = target[group]
        try:
            target[field] = yaml.safe_load(text)
        except yaml.YAMLError:
            target[field] = text
    return merged


def follow(run_id: UUID, show: Callable[[str], None]) -> int:
    """Pass each state of a run to ``show`` until it ends, and return the exit code.

    Returns:
        0 if the run completed or was skipped, 1 if it failed or crashed, 130 if it was cancelled.
    """
    shown, last_answer = "", time.monotonic()
    while True:
        try:
            with connected() as client:
                state = client.read_flow_run(run_id).state
        except ObjectNotFound:
            raise NotFoundError(f"run was deleted: {run_id}; see knn-diffusion runs") from None
        except StageError:
            if time.monotonic() - last_answer > OUTAGE_S:
                raise
            state = None
        else:
            last_answer = time.monotonic()
        if state is not None:
            line = (state.name or "") + (f": {state.message}" if state.message and state.is_final() else "")
            if line != shown:
                show(printable(line))
                shown = line
            if state.is_final():
                return 0 if state.is_completed() else 130 if state.is_cancelled() else 1
        time.sleep(POLL_S)


def list_runs(limit: int) -> list[dict[str, Any]]:
    """Return id, name, state, start and duration of the newest runs, without those scheduled for later."""
    due = FlowRunFilter(expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)))
    with connected() as client:
        runs = client.read_flow_runs(flow_run_filter=due, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=limit)
    return [
        {
            "id": str(run.id),
            "name": run.name,
            "state": run.state_name or "–",
            "start": run.start_time.isoformat(timespec="seconds") if run.start_time else "–",
            "seconds": round(run.total_run_time.total_seconds(), 1),
        }
        for run in runs
    ]


def cancel(run: str) -> FlowRun:
    """Cancel the run with the id ``run`` and return it.

    Raises:
        InputError: ``run`` is not an id, or the run has already ended.
        NotFoundError: The run does not exist.
    """
    try:
        run_id = UUID(run)
    except ValueError:
        raise InputError(f"not the id of a run: {run}; see knn-diffusion runs") from None
    with connected() as client:
        try:
            found = client.read_flow_run(run_id)
        except ObjectNotFound:
            raise NotFoundError(f"run does not exist: {run}; see knn-diffusion runs") from None
        if found.state is not None and found.state.is_final():
            raise InputError(f"run has already ended: {run} is {found.state.name}")
        client.set_flow_run_state(run_id, Cancelling())
    return found


def link(run_id: UUID) -> str:
    """Return the address of a run in Prefect's UI."""
    ui = PREFECT_UI_URL.value() or (PREFECT_API_URL.value() or "").removesuffix("/api")
    return f"{ui}/runs/flow-run/{run_id}"
