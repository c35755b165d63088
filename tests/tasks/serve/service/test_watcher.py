"""Following the registry: aliases that move, versions that do not open, and a registry that disappears."""

import threading
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models
from support.fakes import FakeClock
from support.tiny_service import TinyVersions

from infra.errors import EncoderMismatchError, InputError, IntegrityError, NotFoundError, StageError
from model.saved_generator import BUNDLED_GENERATOR
from tasks.serve.service.catalog import Catalog
from tasks.serve.service.config import ServiceConfig
from tasks.serve.service.errors import UnknownDatabaseError
from tasks.serve.service.metrics import Metrics
from tasks.serve.service.served import OpenDatabase
from tasks.serve.service.watcher import Watcher


def catalog_of(versions: TinyVersions, *databases: str, model: str | None = None) -> Catalog:
    return Catalog(versions, ServiceConfig(databases=databases, model=model), Metrics())


def watcher_of(catalog: Catalog, **options: Any) -> Watcher:
    return Watcher(catalog, 15, ended=threading.Event(), **options)


def served(catalog: Catalog) -> dict[str, tuple[int | None, int]]:
    return {name: (entry.opened.version, entry.opened.generation) for name, entry in catalog.entries.items()}


def test_catalog_serves_all_champions_or_the_named_databases(versions: TinyVersions) -> None:
    assert served(catalog_of(versions)) == {"birds": (2, 0), "cats": (1, 0)}
    named = catalog_of(versions, "cats", "models:/knn-database.birds/1")
    assert served(named) == {"cats": (1, 0), "birds": (1, 0)}
    assert named.get(None).name == "cats"


def test_moved_champion_is_served_at_the_next_look(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)
    before, watcher = catalog.get("birds"), watcher_of(catalog)
    versions.champions["birds"] = 1
    watcher.look()
    assert served(catalog) == {"birds": (1, 1), "cats": (1, 0)}
    assert before.version == 2, "requests keep the version that they were submitted with"
    assert watcher.problems() == []


def test_fixed_version_is_not_followed(versions: TinyVersions) -> None:
    catalog = catalog_of(versions, "models:/knn-database.birds/2")
    versions.champions["birds"] = 1
    watcher_of(catalog).look()
    assert served(catalog) == {"birds": (2, 0)}


def test_swap_by_hand_holds_until_the_alias_moves(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)
    watcher = watcher_of(catalog)
    catalog.swap("birds", 1)
    watcher.look()
    assert served(catalog)["birds"] == (1, 1)
    versions.databases["birds"].append(3)
    versions.champions["birds"] = 3
    watcher.look()
    assert served(catalog)["birds"] == (3, 2)
    assert catalog.swap("birds").served == catalog.get("birds").info, "the champion is served already"
    assert served(catalog)["birds"] == (3, 2)


def test_registry_that_was_read_before_a_swap_does_not_undo_it(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)

    def swap_meanwhile() -> None:
        versions.on_listing = lambda: None
        versions.databases["birds"].append(3)
        versions.champions["birds"] = 3
        catalog.swap("birds")

    versions.on_listing = swap_meanwhile
    watcher_of(catalog).look()
    assert served(catalog)["birds"] == (3, 1)


def test_version_that_does_not_open_leaves_the_old_one_and_is_not_tried_again(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)
    watcher = watcher_of(catalog)
    versions.broken.add(("birds", 1))
    versions.champions["birds"] = 1
    for _ in range(3):
        watcher.look()
    assert served(catalog)["birds"] == (2, 0)
    assert versions.opened.count(("birds", 1)) == 1
    line = "the new version of birds does not open: … differs from its committed digest; restore it"
    assert watcher.problems() == [line]
    assert next(one for one in catalog.databases() if one.name == "birds").problem == line
    with pytest.raises(IntegrityError):
        catalog.swap("birds", 1)
    versions.broken.clear()
    catalog.swap("birds", 1)
    assert served(catalog)["birds"] == (1, 1)
    assert watcher.problems() == []


def test_unexpected_error_of_a_version_leaves_the_others_followed(versions: TinyVersions) -> None:
    versions.databases["cats"].append(2)
    versions.generators.append(2)
    metrics = Metrics()
    catalog = Catalog(versions, ServiceConfig(), metrics)
    watcher = watcher_of(catalog)
    versions.odd.add(("birds", 1))
    versions.champions.update(birds=1, cats=2)
    versions.generator_champion = 2
    for _ in range(2):
        watcher.look()
    assert served(catalog) == {"birds": (2, 0), "cats": (2, 1)}
    assert catalog.model.name == "knn-diffusion/2"
    assert watcher.problems() == ["the new version of birds does not open: OSError; see the log of the service"]
    assert versions.opened.count(("birds", 1)) == 1
    assert 'knn_diffusion_swap_total{kind="database",outcome="failed"} 1.0' in metrics.expose().decode()
    with pytest.raises(StageError, match="OSError; see the log of the service"):
        catalog.swap("birds", 1)


def test_unexpected_error_of_a_database_leaves_the_others_served_at_the_start(versions: TinyVersions) -> None:
    versions.odd.add(("birds", 2))
    catalog = catalog_of(versions)
    assert served(catalog) == {"cats": (1, 0)}
    assert catalog.problems == {"birds": "birds is not served: OSError; see the log of the service"}


def test_unexpected_error_of_takedowns_leaves_those_of_other_databases_applied(
    versions: TinyVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, applied = catalog_of(versions), list[str]()

    def hide(opened: OpenDatabase) -> bool:
        applied.append(opened.name)
        if opened.name == "birds":
            raise PermissionError("/srv/secret/takedowns")
        return True

    monkeypatch.setattr(OpenDatabase, "hide_taken_down", hide)
    watcher = watcher_of(catalog)
    watcher.look()
    assert sorted(applied) == ["birds", "cats"]
    assert watcher.problems() == ["the takedowns of birds cannot be read: PermissionError; see the log of the service"]


def test_swap_to_a_named_version_that_fails_is_no_problem_of_the_service(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)
    versions.unusable.add(("birds", 1))
    with pytest.raises(NotFoundError, match="birds has no version 999"):
        catalog.swap("birds", 999)
    with pytest.raises(StageError, match="row 3 is not finite"):
        catalog.swap("birds", 1)
    assert catalog.problems == {}
    assert served(catalog)["birds"] == (2, 0)


def test_swap_of_a_folder_rejects_a_version(versions: TinyVersions) -> None:
    catalog = catalog_of(versions, "/srv/folder")
    with pytest.raises(InputError, match="database folder is a folder without versions: 99; omit"):
        catalog.swap("folder", 99)
    assert catalog.swap("folder").served is not None
    assert served(catalog) == {"folder": (None, 1)}


def test_version_is_tried_again_after_a_failure_that_may_pass(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)
    watcher = watcher_of(catalog)
    versions.temporary.add(("birds", 1))
    versions.champions["birds"] = 1
    watcher.look()
    assert len(watcher.problems()) == 1
    versions.temporary.clear()
    watcher.look()
    assert served(catalog)["birds"] == (1, 1)
    assert watcher.problems() == []


def test_registry_that_disappears_leaves_everything_served_until_it_returns(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)
    watcher = watcher_of(catalog)
    versions.is_away = True
    watcher.look()
    assert served(catalog) == {"birds": (2, 0), "cats": (1, 0)}
    assert watcher.problems() == ["the registry does not answer, what is served remains: MLflow at … does not answer"]
    assert [one.name for one in catalog.databases()] == ["birds", "cats"]
    versions.is_away = False
    versions.champions["birds"] = 1
    watcher.look()
    assert served(catalog)["birds"] == (1, 1)
    assert watcher.problems() == []


def test_registry_that_does_not_answer_in_time_is_a_problem(versions: TinyVersions) -> None:
    clock, seen = FakeClock(), list[list[str]]()
    catalog = catalog_of(versions)
    watcher = watcher_of(catalog, clock=clock)

    def wait() -> None:
        for seconds in (34, 2):
            clock.sleep(seconds)
            seen.append(watcher.problems())

    versions.on_listing = wait
    watcher.look()
    assert seen == [[], ["the registry: no answer for 36 s; what is served remains"]]
    assert watcher.problems() == []


def test_takedowns_are_applied_while_the_registry_hangs(
    versions: TinyVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, applied = catalog_of(versions), threading.Semaphore(0)
    hangs, free, ended = threading.Event(), threading.Event(), threading.Event()

    def hide(opened: OpenDatabase) -> bool:
        applied.release()
        return False

    def hang() -> None:
        hangs.set()
        assert free.wait(20)

    monkeypatch.setattr(OpenDatabase, "hide_taken_down", hide)
    versions.on_listing = hang
    Watcher(catalog, 0.01, ended=ended).start()
    assert hangs.wait(20)
    for _ in range(20):
        assert applied.acquire(timeout=20)
    ended.set()
    free.set()


def test_champion_alias_that_was_deleted_leaves_the_version_served(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)
    del versions.champions["birds"]
    watcher_of(catalog).look()
    assert served(catalog)["birds"] == (2, 0)
    with pytest.raises(NotFoundError, match="birds has no champion"):
        catalog.swap("birds")


def test_moved_champion_of_the_generator_is_served(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)
    versions.generators.append(2)
    versions.generator_champion = 2
    watcher_of(catalog).look()
    assert (catalog.model.name, catalog.model.generation) == ("knn-diffusion/2", 1)


def test_bundled_generator_is_replaced_once_there_is_a_champion(versions: TinyVersions) -> None:
    versions.generator_champion = None
    catalog, named = catalog_of(versions), catalog_of(versions, model=BUNDLED_GENERATOR)
    assert catalog.model.name == BUNDLED_GENERATOR
    versions.generator_champion = 1
    for one in (catalog, named):
        watcher_of(one).look()
    assert (catalog.model.name, named.model.name) == ("knn-diffusion/1", BUNDLED_GENERATOR)


def test_generator_of_another_encoder_is_not_served(versions: TinyVersions) -> None:
    catalog = catalog_of(versions)
    watcher = watcher_of(catalog)
    versions.generators.append(2)
    versions.generator_champion = 2
    versions.identities["model", 2] = tiny_models.identity(name="other-clip", weights="9" * 64)
    watcher.look()
    assert catalog.model.name == "knn-diffusion/1"
    assert (
        "database birds was made by tiny-clip, but the model knn-diffusion/2 needs other-clip" in watcher.problems()[0]
    )


def test_database_of_another_encoder_is_reported_or_rejected(versions: TinyVersions) -> None:
    versions.identities["cats", 1] = tiny_models.identity(name="other-clip", weights="9" * 64)
    catalog = catalog_of(versions)
    assert served(catalog) == {"birds": (2, 0)}
    assert "cats is not served: database cats was made by other-clip" in watcher_of(catalog).problems()[0]
    with pytest.raises(EncoderMismatchError):
        catalog_of(versions, "cats")


def test_registered_database_can_be_served_later(versions: TinyVersions) -> None:
    catalog = catalog_of(versions, "birds")
    listed = {one.name: one for one in catalog.databases()}
    assert listed["cats"].served is None
    assert listed["cats"].champion == 1
    with pytest.raises(UnknownDatabaseError):
        catalog.get("cats")
    assert catalog.swap("cats").served is not None
    assert catalog.get("cats").name == "cats"
    with pytest.raises(UnknownDatabaseError, match="no database is registered as 'dogs'"):
        catalog.swap("dogs")


def test_catalog_without_a_database_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="build one with new-domain"):
        catalog_of(TinyVersions(tmp_path))


def test_swaps_are_counted_by_outcome(versions: TinyVersions) -> None:
    metrics = Metrics()
    catalog = Catalog(versions, ServiceConfig(), metrics)
    versions.broken.add(("birds", 2))
    catalog.swap("birds", 1)
    with pytest.raises(IntegrityError):
        catalog.swap("birds", 2)
    text = metrics.expose().decode()
    for outcome in ("done", "failed"):
        assert f'knn_diffusion_swap_total{{kind="database",outcome="{outcome}"}} 1.0' in text
    assert 'knn_diffusion_last_swap_timestamp_seconds{kind="database"}' in text
