"""Deployments of ``prefect.yaml`` and ``domains.yaml``: create, update, and delete those that the files no longer have.

``prefect deploy`` deletes neither deployments nor schedules with a slug. Every deployment made here has the project's
name as a tag; only deployments with this tag are deleted.
"""

import contextlib
import copy
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.client.schemas import StateType
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists

from flows.deployed_run import TAG
from flows.deployment_runs import connected
from flows.domains import Domain, read_domains
from infra.deploy.services import HEARTBEAT_S, POOL
from infra.errors import InputError, StageError

AUTOMATION = "knn-diffusion: crash runs without heartbeats"
_PER_DOMAIN = ("rebuild-index", "promote-version")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Deployed:
    """Result of a deploy: names as FLOW/DEPLOYMENT, schedules as FLOW/DEPLOYMENT SLUG."""

    deployments: tuple[str, ...]
    deleted_deployments: tuple[str, ...]
    deleted_schedules: tuple[str, ...]


def deploy(checkout: Path) -> Deployed:
    """Deploy the files of ``checkout`` to the server of ``PREFECT_API_URL``, and delete what they no longer contain.

    Raises:
        InputError: A file is invalid; nothing has been changed.
        StageError: Prefect refuses a deployment; its last line of output is in the message.
    """
    project = expand(yaml.safe_load((checkout / "prefect.yaml").read_text()), read_domains(checkout / "domains.yaml"))
    _create_pool()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(project, sort_keys=False))
        _prefect(["--no-prompt", "deploy", "--all", "--prefect-file", str(file)], checkout)
    create_automation()
    return _delete_removed(project)


def expand(project: Mapping[str, Any], domains: tuple[Domain, ...]) -> dict[str, Any]:
    """Return the content of ``prefect.yaml`` with our tag, and the deployments of each domain.

    A domain has ``rebuild-index/NAME``, and ``promote-version/NAME`` if it has gates.

    Raises ``InputError`` if a schedule has no slug or no explicit ``active``, or two deployments have one name.
    """
    expanded = copy.deepcopy(dict(project))
    templates = {entry["name"]: entry for entry in expanded["deployments"] if entry["name"] in _PER_DOMAIN}
    if rebuild := templates.get("rebuild-index"):
        expanded["deployments"] += [_rebuild_of(rebuild, domain) for domain in domains]
    if promote := templates.get("promote-version"):
        expanded["deployments"] += [_promotion_of(promote, domain) for domain in domains if domain.promotion_gates]
    names = [(entry["entrypoint"], entry["name"]) for entry in expanded["deployments"]]
    for entry in expanded["deployments"]:
        if names.count((entry["entrypoint"], entry["name"])) > 1:
            raise InputError(f"deployment exists twice: {entry['name']}; rename one of them")
        entry["tags"] = sorted({*entry.get("tags", ()), expanded["name"]})
        for schedule in entry.get("schedules") or ():
            if "slug" not in schedule or "active" not in schedule:
                raise InputError(f"schedule of {entry['name']} is incomplete; give it a slug and active: true or false")
    return expanded


def _rebuild_of(template: Mapping[str, Any], domain: Domain) -> dict[str, Any]:
    schedules = []
    if domain.schedule is not None:
        schedules = [{"slug": "rebuild", "cron": domain.schedule, "timezone": domain.timezone, "active": domain.active}]
    return {
        **copy.deepcopy(dict(template)),
        "name": domain.name,
        "description": f"Add new URLs of the list of {domain.name}, and hide images that were taken down.",
        "parameters": {"config": domain.rebuild_parameters()},
        "schedules": schedules,
    }


def _promotion_of(template: Mapping[str, Any], domain: Domain) -> dict[str, Any]:
    return {
        **copy.deepcopy(dict(template)),
        "name": domain.name,
        "description": f"Make the candidate of {domain.name} the champion if the gates in domains.yaml pass.",
        "parameters": {"config": domain.promotion_parameters()},
    }


def create_automation() -> None:
    """Create the automation that marks runs as crashed after three missed heartbeats, or update it if it differs.

    Prefect's server marks nothing by itself: a run whose worker and process die would remain Running. Runs of other
    projects are left alone, because their heartbeats may be less frequent. An update makes Prefect forget the
    heartbeats so far, and a run that has died already would remain Running.
    """
    automation = AutomationCore(
        name=AUTOMATION,
        description="A run whose process died sends no heartbeats. The lease of its domain expires by itself.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification({"prefect.resource.id": [f"prefect.tag.{TAG}"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=3 * HEARTBEAT_S),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message="No heartbeat for 90 s: the process or its machine ended. Run again."
            )
        ],
    )
    with connected() as client:
        found = client.read_automations_by_name(AUTOMATION)
        for one in found[1:]:
            client.delete_automation(one.id)
        if not found:
            client.create_automation(automation)
        elif (found[0].trigger, found[0].actions) != (automation.trigger, automation.actions):
            client.update_automation(found[0].id, automation)


def _create_pool() -> None:
    """Create the work pool unless it exists. A worker that starts now may create it at the same moment."""
    with connected() as client, contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))


def _delete_removed(project: Mapping[str, Any]) -> Deployed:
    wanted = {
        f"{_flow_name(entry)}/{entry['name']}": {one["slug"] for one in entry.get("schedules") or ()}
        for entry in project["deployments"]
    }
    deployments, schedules = [], []
    with connected() as client:
        tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[project["name"]]))
        for deployment in _all(lambda offset: client.read_deployments(deployment_filter=tagged, offset=offset)):
            name = f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"
            if name not in wanted:
                client.delete_deployment(deployment.id)
                deployments.append(name)
                continue
            for schedule in deployment.schedules:
                if schedule.slug not in wanted[name]:
                    client.delete_deployment_schedule(deployment.id, schedule.id)
                    schedules.append(f"{name} {schedule.slug or schedule.id}")
    return Deployed(
        deployments=tuple(wanted), deleted_deployments=tuple(deployments), deleted_schedules=tuple(schedules)
    )


def _all(read: Callable[[int], list[Any]]) -> list[Any]:
    """Return the items of every page; ``read`` returns the page at an offset, empty after the last one."""
    items: list[Any] = []
    while page := read(len(items)):
        items += page
    return items


def _flow_name(entry: Mapping[str, Any]) -> str:
    """Return the name of an entry's flow: that of its function, with hyphens."""
    return str(entry["entrypoint"]).rpartition(":")[2].replace("_", "-")


def _prefect(words: list[str], folder: Path) -> None:
    environment = {"KNN_DIFFUSION_CHECKOUT": str(folder), **os.environ, "COLUMNS": "200"}
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-m", "prefect", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.strip()]
        raise StageError(f"prefect {' '.join(words[:3])} failed: {lines[-1].strip() if lines else done.returncode}")
