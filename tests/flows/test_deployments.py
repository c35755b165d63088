"""Every deployment of prefect.yaml loads, and its parameters are valid."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).parent.parent.parent
DEPLOYMENTS = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda entry: entry["name"])
def test_deployment_entrypoint_loads_and_accepts_its_parameters(
    deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.flows import load_flow_from_entrypoint

    monkeypatch.chdir(CHECKOUT)
    flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
    assert flow.name == deployment["name"]
    config = flow.validate_parameters(deployment["parameters"])["config"]
    named = (getattr(config, field, None) for field in ("domain", "name"))
    if "triggers" not in deployment:  # an event names the model
        assert "my-domain" in (*getattr(config, "databases", ()), *named)
    assert set(flow.parameters.properties) == {"config"}


def test_prefect_yaml_has_a_deployment_for_every_flow() -> None:
    found = {path.name for path in (CHECKOUT / "flows").glob("*.py") if "\n@flow(" in path.read_text()}
    assert {entry["entrypoint"].split("/")[1].split(":")[0] for entry in DEPLOYMENTS} == found


def test_validate_parameters_with_invalid_domain_fails_with_the_rule() -> None:
    from prefect.exceptions import ParameterTypeError

    from flows.new_domain import new_domain

    with pytest.raises((ParameterTypeError, ValueError), match="domain 'A B' must be lower-case letters"):
        new_domain.validate_parameters({"config": {"domain": "A B", "urls": "x.csv"}})


@pytest.mark.slow
def test_deploy_all_creates_every_deployment(prefect_server: None) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    environment = {**os.environ, "KNN_DIFFUSION_CHECKOUT": str(CHECKOUT)}
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="knn-diffusion", type="process"))
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=CHECKOUT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        created = {deployment.name for deployment in client.read_deployments()}
    assert created == {deployment["name"] for deployment in DEPLOYMENTS}
