"""Information for operators: versions, promotions, and the pages of Prefect and MLflow with the running flows."""

import os
from typing import TYPE_CHECKING, Any

import httpx
from pydantic import BaseModel, ConfigDict

from infra import logs, uris
from infra.errors import KNNDiffusionError
from infra.promotions import Promotions
from infra.registry_tags import DATABASE_PREFIX, GENERATOR_NAME
from infra.settings import Settings
from tasks.serve.service.errors import public_message
from tasks.serve.service.responses import ServedDatabase

if TYPE_CHECKING:
    from tasks.serve.service.engine import Engine

_TIMEOUT_S = 1.0
_MAX_DECISIONS = 50
_MAX_RUNS = 20


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Promotion(_Record):
    """A decision about a version: ``outcome`` is promoted, refused, pinned, pending or rolled-back."""

    name: str
    version: int
    outcome: str
    before: int | None = None
    after: int | None = None
    reason: str = ""
    at_ms: int


class RunningFlow(_Record):
    """A running flow. ``page`` is its address in Prefect."""

    name: str
    started_at: str | None = None
    page: str | None = None


class AdminView(_Record):
    """State of the service for an operator. Addresses are None without a server."""

    model: str
    databases: list[ServedDatabase]
    problems: list[str]
    promotions: list[Promotion] = []
    mlflow: str | None = None
    prefect: str | None = None
    flows: list[RunningFlow] = []


def admin_view(engine: "Engine", settings: Settings) -> AdminView:
    """Return the state of the service. Slow: it asks the registry and Prefect, which are left out if they fail."""
    databases, problems = engine.databases(), engine.problems()
    try:
        promotions = promotion_history([one.name for one in databases], settings)
    except KNNDiffusionError as error:
        promotions, problems = [], [*problems, f"the promotions cannot be read: {public_message(error)}"]
    prefect = prefect_address()
    return AdminView(
        model=engine.info().model,
        databases=databases,
        problems=problems,
        promotions=promotions,
        mlflow=mlflow_address(settings),
        prefect=prefect,
        flows=running_flows(prefect),
    )


def promotion_history(databases: list[str], settings: Settings) -> list[Promotion]:
    """Return the latest decisions about the generator and the databases, newest first. Raises ``TransientError``."""
    client = Promotions(settings)
    names = [GENERATOR_NAME, *(DATABASE_PREFIX + name for name in databases)]
    found = [entry for name in names for entry in client.history(name)[:_MAX_DECISIONS]]
    newest = sorted(found, key=lambda entry: -int(entry["at_ms"]))[:_MAX_DECISIONS]
    fields = Promotion.model_fields
    return [
        Promotion.model_validate(
            {name: value for name, value in entry.items() if name in fields}
            | {"name": str(entry["name"]).removeprefix(DATABASE_PREFIX)}
        )
        for entry in newest
    ]


def mlflow_address(settings: Settings) -> str | None:
    """Return the address of MLflow's pages, or None if the registry is a file or a bare database."""
    uri = settings.tracking_uri
    return _without_login(uri) if uri.startswith(("http://", "https://")) else None


def prefect_address() -> str | None:
    """Return the address of Prefect's pages, or None if this process knows no server."""
    address = os.environ.get("PREFECT_UI_URL") or os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    return _without_login(address) if address.startswith(("http://", "https://")) else None


def running_flows(address: str | None) -> list[RunningFlow]:
    """Return the running flows; none if Prefect does not answer within a second."""
    api = os.environ.get("PREFECT_API_URL")
    if address is None or not api:
        return []
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    query = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}, "limit": _MAX_RUNS}
    try:
        answer = httpx.post(
            f"{api.rstrip('/')}/flow_runs/filter",
            json=query,
            auth=(user, password) if password else None,
            timeout=_TIMEOUT_S,
        )
        found: list[dict[str, Any]] = answer.raise_for_status().json()
        return [
            RunningFlow(
                name=str(run["name"]), started_at=run.get("start_time"), page=f"{address}/runs/flow-run/{run['id']}"
            )
            for run in found
        ]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        logs.get("serve").info("Prefect does not list its running flows: %s", uris.masked(str(error)))
        return []


def _without_login(address: str) -> str:
    """Return an address without the user and password that it may contain."""
    parts = httpx.URL(address)
    return str(parts.copy_with(username=None, password=None, userinfo=b"")).rstrip("/")
