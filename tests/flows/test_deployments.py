"""Every deployment of prefect.yaml loads for real, and takes the parameters that stand there."""

from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).parent.parent.parent
DEPLOYMENTS = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda entry: entry["name"])
def test_entrypoint_loads_and_takes_its_parameters(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.flows import load_flow_from_entrypoint

    monkeypatch.chdir(CHECKOUT)
    flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
    assert flow.name == deployment["name"]
    config = flow.validate_parameters(deployment["parameters"])["config"]
    assert "my-domain" in (*getattr(config, "databases", ()), getattr(config, "domain", None))
    assert set(flow.parameters.properties) == {"config"}


def test_every_flow_has_a_deployment() -> None:
    found = {path.name for path in (CHECKOUT / "flows").glob("*.py") if "\n@flow(" in path.read_text()}
    assert {entry["entrypoint"].split("/")[1].split(":")[0] for entry in DEPLOYMENTS} == found


def test_parameters_that_cannot_be_right_are_refused_with_the_mend() -> None:
    from prefect.exceptions import ParameterTypeError

    from flows.new_domain import new_domain

    with pytest.raises((ParameterTypeError, ValueError), match="domain 'A B' must be lower-case letters"):
        new_domain.validate_parameters({"config": {"domain": "A B", "urls": "x.csv"}})
