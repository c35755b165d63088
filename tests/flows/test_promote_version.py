"""Tests of promotion: gates refuse, force is recorded, rollbacks pin, and takedowns are never restored."""

from pathlib import Path

import pytest
from support.changing_domain import NAMES, Living
from support.fakes import WithoutRay

from flows.promote_version import PromoteVersionConfig, promote_version
from infra.errors import InputError, NotFoundError
from infra.promotions import Decision, Promotions
from infra.registry import Registry
from tasks.promote import rollback
from tasks.promotion.config import DatabaseGates

NAME = "knn-database.shapes"


def promoted(living: Living, **options: object) -> Decision:
    config = PromoteVersionConfig(name="shapes", root=str(living.root), **options)  # type: ignore[arg-type]
    return living.call(promote_version, config)


def test_promote_is_refused_by_lost_rows_and_forced_with_a_reason(living: Living, ray: WithoutRay) -> None:
    store = Promotions(living.settings)
    living.start(NAMES[:4])
    living.build(NAMES[:6])
    assert store.champion(NAME) == 2
    refused = promoted(living, version=1)
    assert (refused.outcome, refused.after) == ("refused", 2)
    assert {gate.gate: gate.value for gate in refused.gates if not gate.passed}["lost_rows"] == pytest.approx(2 / 6)
    assert store.champion(NAME) == 2
    with pytest.raises(InputError, match="reason for the forced promotion is missing"):
        promoted(living, version=1, force=True)
    assert promoted(living, version=1, approval=True, database=DatabaseGates(lost_rows=1.0, drift=2.0)).outcome == (
        "pending"
    )
    forced = promoted(living, version=1, force=True, reason="the new images are wrong")
    assert (forced.outcome, forced.before, forced.after) == ("promoted", 2, 1)
    history = store.history(NAME)
    assert [one["outcome"] for one in history] == ["promoted", "pending", "refused", "promoted", "promoted"]
    assert history[0]["reason"] == "the new images are wrong"
    assert history[0]["requester"]
    assert history[0]["gates"]

    (champion,) = (one for one in Registry(living.settings).versions("database") if one["version"] == 1)
    (Path(champion["uri"]) / "manifest.json").unlink()
    assert promoted(living, version=2).outcome == "promoted", "a champion whose files are lost is not compared"


def test_rebuild_is_promoted_by_the_gates_of_its_domain_and_a_takedown_in_any_case(
    living: Living, ray: WithoutRay
) -> None:
    store = Promotions(living.settings)
    living.start(NAMES[:4])
    strict = DatabaseGates(recall_image=None, recall_text=None, failed_downloads=0.1)
    rebuilt = living.rebuild(urls=living.listed(*NAMES[:5], "/absent.png"), gates=strict)
    assert rebuilt.registered.alias_uri == f"models:/{NAME}@candidate"
    assert store.champion(NAME) == 1
    (failed,) = (gate for gate in store.history(NAME)[0]["gates"] if not gate["passed"])
    assert (failed["gate"], failed["limit"]) == ("failed_downloads", 0.1)
    refused = promoted(living, version=2)
    assert refused.outcome == "refused", "the gates are recorded with the version"
    down = living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl")
    living.rebuild(takedown=down, compact_above=1, gates=strict)
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}
    assert promoted(living, version=2, database=DatabaseGates(drift=2.0)).moved


def test_rollback_restores_the_previous_champion_unless_it_shows_images_taken_down(
    living: Living, ray: WithoutRay
) -> None:
    store = Promotions(living.settings)
    living.start(NAMES[:4])
    with pytest.raises(NotFoundError, match="no recorded earlier champion"):
        rollback(NAME, None, living.settings)
    living.rebuild(urls=living.listed(*NAMES[:6]))
    restored = rollback(NAME, None, living.settings, reason="blurred")
    assert (restored.before, restored.after) == (2, 1)
    assert "rolled back from version 2" in (store.pin(NAME) or "")
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), compact_above=1)
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}, "a takedown takes effect although the champion is pinned"
    with pytest.raises(InputError, match="would restore images that were taken down"):
        rollback(NAME, 1, living.settings)
