"""Commands for registered versions: promote, rollback, history, lineage, pull and push, on one small registry."""

import json
from pathlib import Path

import pytest
from support.changing_domain import NAMES, Living
from support.fakes import WithoutRay
from typer.testing import CliRunner, Result

from flows.cli.app import app
from infra.promotions import CANDIDATE, Promotions

CHAMPION = "models:/knn-database.shapes@champion"
pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def registry(living: Living, ray: WithoutRay) -> Living:
    """A domain with two versions. The second has more rows and is the champion."""
    living.start(NAMES[:4])
    living.build(NAMES[:6])
    return living


def run(living: Living, *arguments: str, root: str | None = None) -> Result:
    return CliRunner().invoke(app, [*arguments, "--root", root or str(living.root)])


def done(living: Living, *arguments: str, root: str | None = None) -> str:
    """Run a command that must succeed, and return its standard output."""
    result = run(living, *arguments, root=root)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def refused(result: Result, reason: str) -> None:
    assert result.exit_code == 1
    assert reason in result.stderr
    assert "Traceback" not in result.output


def test_promote_rollback_and_history_report_what_they_decide(registry: Living) -> None:
    store, name = Promotions(registry.settings), "knn-database.shapes"
    result = run(registry, "promote", "shapes", "--version", "1")
    refused(result, "version 1 of knn-database.shapes was not promoted because gates failed")
    assert "lost_rows: failed, 0.3333, limit 0.0100 (2 of 6)" in result.stderr
    refused(run(registry, "promote", "shapes", "--version", "1", "--force"), "reason for the forced promotion")
    refused(run(registry, "promote", "shapes"), "has no candidate; give the version to promote (--version N)")
    assert store.champion(name) == 2
    assert done(registry, "promote", "shapes", "--version", "1", "--force", "--reason", "wrong images") == CHAMPION
    assert store.champion(name) == 1
    result = run(registry, "promote", "shapes", "--version", "2", "--approval")
    refused(result, "version 2 of knn-database.shapes is not approved; set the tag approval=approved")
    assert done(registry, "rollback", "shapes", "--reason", "right after all") == CHAMPION
    assert store.champion(name) == 2
    refused(run(registry, "rollback", "shapes", "--to", "7"), "7")

    decisions = json.loads(done(registry, "history", "shapes", "--json"))
    outcomes = ["rolled-back", "pending", "promoted", "refused", "promoted", "promoted"]
    assert [one["outcome"] for one in decisions] == outcomes
    assert decisions[2] | {"force": True, "reason": "wrong images", "before": 2, "after": 1} == decisions[2]
    listed = done(registry, "history", "shapes")
    assert all(word in listed for word in ("rolled-back", "right after all", "requester"))
    result = run(registry, "history", "absent")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no decisions are recorded for knn-database.absent" in result.stderr


def test_lineage_pull_and_push_follow_a_version(registry: Living, tmp_path: Path) -> None:
    text = done(registry, "lineage", "shapes")
    kinds = ("database", "embeddings", "images", "sticker-clip")
    assert all(kind in text for kind in kinds)
    nested = json.loads(done(registry, "lineage", "shapes", "--json"))
    assert nested["kind"] == "database"
    graph = done(registry, "lineage", "shapes", "--graph")
    assert graph.startswith("flowchart")
    assert all(kind in graph for kind in kinds)

    folder, other = str(tmp_path / "copy"), str(tmp_path / "other")
    assert done(registry, "pull", "shapes", "--to", folder) == folder
    refused(run(registry, "push", folder, "--name", "knn-diffusion", root=other), "cannot be pushed as knn-diffusion")
    refused(run(registry, "push", str(tmp_path), "--name", "a", root=other), "has no manifest.json")
    uri = done(registry, "push", folder, "--name", "shapes-copy", "--trust", root=other)
    assert uri == "models:/knn-database.shapes-copy/1"
    query = ("search", "shapes", NAMES[0][1:-4].replace("-", " "), "--json")
    found = json.loads(done(registry, *query))
    assert json.loads(done(registry, "search", uri, *query[2:], root=other)) == found
    (entry,) = json.loads(done(registry, "databases", "--json", root=other))
    assert entry["aliases"] == [CANDIDATE]
    assert done(registry, "promote", "shapes-copy", root=other).endswith("knn-database.shapes-copy@champion")
