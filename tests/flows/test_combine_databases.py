"""Flows that merge and subset databases: results, takedowns, and protection of existing databases."""

import dataclasses
from typing import Any

import pytest
from support.changing_domain import BODY, NAMES, Living
from support.fakes import Reply, WithoutRay

from infra.errors import InputError, StageError
from infra.registry import Registry
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import embeddings_of


def test_merge_databases_builds_a_union_that_can_be_rebuilt(living: Living, ray: WithoutRay) -> None:
    from flows.combine_databases import MergeDatabasesConfig, merge_databases
    from tasks.serve.load import load_database

    living.build(NAMES[:6])
    living.build(NAMES[6:10], domain="others")
    ray.items.clear()
    merged = merge_databases(MergeDatabasesConfig(domain="both", databases=("shapes", "others"), root=str(living.root)))
    assert {description for description, _ in ray.items} & {"images", "embeddings"} == set()
    assert living.found(merged.database.reference) == set(NAMES[:10])
    assert len(load_database("both", living.settings)) == 10
    from flows.rebuild_config import RebuildIndexConfig
    from flows.rebuild_index import rebuild_index

    living.server.requests.clear()
    listed = living.listed(*NAMES[:11])
    grown = rebuild_index(RebuildIndexConfig(domain="both", root=str(living.root), urls=listed))
    assert living.server.requests == [NAMES[10]]
    assert living.found(grown.after.database) == set(NAMES[:11])
    assert dataclasses.replace(embeddings_of(grown.after.database)).rows == 11


def test_combine_again_keeps_takedowns_of_the_domain(living: Living, ray: WithoutRay) -> None:
    from flows.combine_databases import (
        MergeDatabasesConfig,
        SubsetDatabaseConfig,
        merge_databases,
        subset_database,
    )

    living.build(NAMES[:4], domain="a")
    living.build(NAMES[4:8], domain="b")
    union = MergeDatabasesConfig(domain="shapes", databases=("a", "b"), root=str(living.root))
    merge_databases(union)
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"))
    merge_databases(union)
    assert living.champion() == set(NAMES[:8]) - {NAMES[1]}
    subset_database(SubsetDatabaseConfig(domain="shapes", database="a", where="width > 0", root=str(living.root)))
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}


def test_merge_hides_copies_of_images_that_a_part_has_taken_down(living: Living, ray: WithoutRay) -> None:
    from flows.combine_databases import MergeDatabasesConfig, merge_databases

    living.build(NAMES[:4], domain="a")
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), domain="a")
    living.server.replies[NAMES[1]] = Reply(body=BODY[NAMES[5]])
    living.build([NAMES[1], *NAMES[5:7]], domain="b")
    merge_databases(MergeDatabasesConfig(domain="shapes", databases=("a", "b"), root=str(living.root)))
    assert living.champion() == {NAMES[0], *NAMES[2:4], NAMES[6]}


def test_combine_after_rollback_keeps_all_takedowns_of_the_source(living: Living, ray: WithoutRay) -> None:
    from flows.combine_databases import (
        MergeDatabasesConfig,
        SubsetDatabaseConfig,
        merge_databases,
        subset_database,
    )

    for number, domain in enumerate("ab"):
        living.build(NAMES[4 * number : 4 + 4 * number], domain=domain)
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), domain="a")
    Registry(living.settings)._client.set_registered_model_alias("knn-database.a", "champion", "1")
    into: dict[str, Any] = {"domain": "shapes", "root": str(living.root)}
    subset_database(SubsetDatabaseConfig(database="a", where="width > 0", **into))
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}
    merge_databases(MergeDatabasesConfig(databases=("a", "b"), **into))
    assert living.champion() == set(NAMES[:8]) - {NAMES[1]}


def test_failed_merge_rolls_back_its_takedowns(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.combine_databases import MergeDatabasesConfig, merge_databases
    from tasks.references.takedown import list_takedowns

    for number, domain in enumerate("ab"):
        living.build(NAMES[4 * number : 4 + 4 * number], domain=domain)
    living.build(NAMES[:2])
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), domain="a")

    def fails(*_: Any, **__: Any) -> Any:
        raise StageError("recall is too low")

    monkeypatch.setattr("flows.combine_databases.index", fails)
    with pytest.raises(StageError, match="recall"):
        merge_databases(
            MergeDatabasesConfig(databases=("a", "b"), domain="shapes", root=str(living.root), replace=True)
        )
    assert list_takedowns(DomainFolder(uri=f"{living.root}/shapes")) == []
    living.rebuild(urls=living.listed(*NAMES[:3]))
    assert living.champion() == set(NAMES[:3])


def test_combine_without_replace_keeps_a_domain_with_its_own_images(living: Living, ray: WithoutRay) -> None:
    from flows.combine_databases import (
        MergeDatabasesConfig,
        SubsetDatabaseConfig,
        merge_databases,
        subset_database,
    )

    living.build(NAMES[:4])
    for number, domain in enumerate("ab"):
        living.build(NAMES[4 + number : 6 + number], domain=domain)
    into: dict[str, Any] = {"domain": "shapes", "root": str(living.root)}
    part = SubsetDatabaseConfig(database="a", where="width > 0", **into)
    message = "the champion of shapes is built from 4 images of its own .* choose another domain, or pass --replace"
    with pytest.raises(InputError, match=message) as caught:
        merge_databases(MergeDatabasesConfig(databases=("a", "b"), **into))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        subset_database(part)
    assert living.champion() == set(NAMES[:4])
    merge_databases(MergeDatabasesConfig(databases=("shapes", "a"), **into))  # keeps all of its images
    assert living.champion() == set(NAMES[:6])
    living.rebuild(urls=living.listed(*NAMES[:8]))
    with pytest.raises(InputError, match="the champion of shapes is built from 8 images of its own"):
        subset_database(part)
    subset_database(dataclasses.replace(part, replace=True))
    assert living.champion() == set(NAMES[4:6])


def test_rebuild_of_subset_contains_filtered_and_added_images(living: Living, ray: WithoutRay) -> None:
    from flows.combine_databases import SubsetDatabaseConfig, subset_database
    from tasks.embed.task import EmbedConfig

    living.build(NAMES[:8], domain="a")
    added = living.listed(*NAMES[8:10])
    for shape in ("circle", "square"):
        wanted = {name for name in NAMES[:8] if shape in name}
        assert 0 < len(wanted) < 8
        where = f'url like "%{shape}%"'
        subset_database(
            SubsetDatabaseConfig(domain="shapes", database="a", where=where, root=str(living.root), replace=True)
        )
        living.rebuild(urls=added)
        assert living.champion() == wanted | set(NAMES[8:10])
        embedded = living.rebuild(embed=EmbedConfig(workers=1, batch_size=2))
        assert not embedded.skipped["embed"]
        assert living.champion() == wanted | set(NAMES[8:10])
