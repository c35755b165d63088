"""Tests of the deployments made from prefect.yaml and domains.yaml, and of the parameters of a run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.deploy import expand
from flows.deployment_runs import merge_parameters
from flows.domains import Domain, read_domains
from flows.promote_version import promote_version
from flows.rebuild_index import rebuild_index
from infra.errors import InputError
from tasks.promotion.config import DatabaseGates

PROJECT = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text())


def test_expand_adds_one_rebuild_deployment_per_domain_with_valid_parameters() -> None:
    domain = Domain(name="birds", urls="birds.csv", schedule="0 4 * * *", encoder="a/b", gates={"target_recall": 0.9})
    added = expand(PROJECT, (domain,))["deployments"][len(PROJECT["deployments"]) :]
    assert [(one["name"], one["entrypoint"]) for one in added] == [("birds", "flows/rebuild_index.py:rebuild_index")]
    assert added[0]["schedules"] == [{"slug": "rebuild", "cron": "0 4 * * *", "timezone": "UTC", "active": True}]
    config = rebuild_index.validate_parameters(added[0]["parameters"])["config"]
    assert (config.domain, config.embed.encoder, config.index_changes.target_recall) == ("birds", "a/b", 0.9)


def test_expand_gives_the_gates_of_a_domain_to_its_rebuild_and_its_promotion() -> None:
    domain = Domain(name="birds", gates={"target_recall": 0.9, "lost_rows": 0.2, "drift": None})
    rebuild, promotion = expand(PROJECT, (domain,))["deployments"][len(PROJECT["deployments"]) :]
    gates = DatabaseGates(lost_rows=0.2, drift=None)
    config = rebuild_index.validate_parameters(rebuild["parameters"])["config"]
    assert (config.gates, config.index_changes.target_recall) == (gates, 0.9)
    assert promotion["entrypoint"] == "flows/promote_version.py:promote_version"
    config = promote_version.validate_parameters(promotion["parameters"])["config"]
    assert (config.name, config.database) == ("birds", gates)


def test_expand_tags_every_deployment() -> None:
    assert all("knn-diffusion" in one["tags"] for one in expand(PROJECT, ())["deployments"])


@pytest.mark.parametrize("schedule", [{"cron": "* * * * *", "active": True}, {"cron": "* * * * *", "slug": "a"}])
def test_expand_with_an_incomplete_schedule_fails(schedule: dict[str, Any]) -> None:
    entry = {"name": "a", "entrypoint": "flows/a.py:a", "schedules": [schedule]}
    with pytest.raises(InputError, match="schedule of a is incomplete; give it a slug and active"):
        expand({"name": "p", "deployments": [entry]}, ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("domains: [{name: A B}]", "must be lower-case"),
        ("domains: [{name: a, typo: 1}]", "typo"),
        ("domains: [{name: a, gates: {speed: 1}}]", "gate is unknown: speed"),
        ("domains: [{name: a, gates: {drift: 3}}]", "drift is out of range: 3"),
        ("domains: [{name: a, gates: {lost_rows: few}}]", "lost_rows is out of range: few"),
        ("domains: [{name: a, gates: {target_recall: 2}}]", "target_recall is out of range: 2"),
        ("domains: [{name: a}, {name: a}]", "has a domain twice"),
    ],
)
def test_read_domains_with_an_invalid_file_fails_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "domains.yaml").write_text(text)
    with pytest.raises(InputError, match=reason):
        read_domains(tmp_path / "domains.yaml")


def test_merge_parameters_changes_nested_fields_and_keeps_the_others() -> None:
    stored = {"config": {"domain": "my-domain", "index": {"dedup": True}}}
    changed = merge_parameters(stored, ["domain=birds", "config.index.target_recall=0.9"])
    assert changed == {"config": {"domain": "birds", "index": {"dedup": True, "target_recall": 0.9}}}
    assert stored["config"]["domain"] == "my-domain"


def test_merge_parameters_without_a_value_fails() -> None:
    with pytest.raises(InputError, match="parameter is malformed: domain; write NAME=VALUE"):
        merge_parameters({}, ["domain"])
