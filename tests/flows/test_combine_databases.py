"""Databases made of others by the flows, and what they may not replace or bring back."""

import dataclasses
from typing import Any

import pytest
from support.changing_domain import BODY, NAMES, Living
from support.fakes import Reply, WithoutRay

from infra.errors import InputError, StageError
from infra.registry import Registry
from tasks.references.lineage import embeddings_of


def test_databases_are_merged_by_the_flow(living: Living, ray: WithoutRay) -> None:
    from flows.combine_databases import MergeDatabasesConfig, merge_databases
    from tasks.serve.load import load_database

    living.build(NAMES[:6])
    living.build(NAMES[6:10], domain="others")
    ray.items.clear()
    merged = merge_databases(MergeDatabasesConfig(domain="both", databases=("shapes", "others"), root=str(living.root)))
    assert {description for description, _ in ray.items} & {"images", "embeddings"} == set()
    assert living.found(merged.database.reference) == set(NAMES[:10])
    assert len(load_database("both", living.settings)) == 10
    from flows.rebuild_index import RebuildIndexConfig, rebuild_index

    living.server.requests.clear()
    listed = living.listed(*NAMES[:11])
    grown = rebuild_index(RebuildIndexConfig(domain="both", root=str(living.root), urls=listed))
    assert living.server.requests == [NAMES[10]]
    assert living.found(grown.after.database) == set(NAMES[:11])
    assert dataclasses.replace(embeddings_of(grown.after.database)).rows == 11


def test_what_was_taken_down_stays_so_when_databases_are_combined_again(living: Living, ray: WithoutRay) -> None:
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


def test_copies_of_what_a_part_has_taken_down_are_hidden_in_the_union(living: Living, ray: WithoutRay) -> None:
    from flows.combine_databases import MergeDatabasesConfig, merge_databases

    living.build(NAMES[:4], domain="a")
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), domain="a")
    living.server.replies[NAMES[1]] = Reply(body=BODY[NAMES[5]])
    living.build([NAMES[1], *NAMES[5:7]], domain="b")
    merge_databases(MergeDatabasesConfig(domain="shapes", databases=("a", "b"), root=str(living.root)))
    assert living.champion() == {NAMES[0], *NAMES[2:4], NAMES[6]}


def test_what_was_ever_taken_down_stays_so_in_what_is_made_of_a_domain(living: Living, ray: WithoutRay) -> None:
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


def test_a_union_that_cannot_be_made_hides_nothing_of_the_domain(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.combine_databases import MergeDatabasesConfig, merge_databases
    from tasks.upkeep.takedown import list_takedowns

    for number, domain in enumerate("ab"):
        living.build(NAMES[4 * number : 4 + 4 * number], domain=domain)
    living.build(NAMES[:2])
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), domain="a")

    def fails(*_: Any) -> Any:
        raise StageError("recall is too low")

    monkeypatch.setattr("flows.combine_databases.index", fails)
    with pytest.raises(StageError, match="recall"):
        merge_databases(
            MergeDatabasesConfig(databases=("a", "b"), domain="shapes", root=str(living.root), replace=True)
        )
    assert list_takedowns(f"{living.root}/shapes") == []
    living.rebuild(urls=living.listed(*NAMES[:3]))
    assert living.champion() == set(NAMES[:3])


def test_images_of_a_domain_s_own_are_not_put_out_of_sight_by_a_merge_or_a_subset(
    living: Living, ray: WithoutRay
) -> None:
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
    told = "the champion of shapes is built from 4 images of its own .* choose another domain, or pass --replace"
    with pytest.raises(InputError, match=told) as caught:
        merge_databases(MergeDatabasesConfig(databases=("a", "b"), **into))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=told):
        subset_database(part)
    assert living.champion() == set(NAMES[:4])
    merge_databases(MergeDatabasesConfig(databases=("shapes", "a"), **into))  # nothing of it is lost
    assert living.champion() == set(NAMES[:6])
    living.rebuild(urls=living.listed(*NAMES[:8]))
    with pytest.raises(InputError, match="the champion of shapes is built from 8 images of its own"):
        subset_database(part)
    subset_database(dataclasses.replace(part, replace=True))
    assert living.champion() == set(NAMES[4:6])


def test_a_subset_that_is_rebuilt_holds_what_its_filter_takes_and_what_was_added(
    living: Living, ray: WithoutRay
) -> None:
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
