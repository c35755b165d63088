"""Flows that merge and subset databases: results, takedowns, and protection of existing databases."""

from typing import Any

import pytest
from support.changing_domain import BODY, NAMES, Living
from support.fakes import Reply, WithoutRay

from infra.errors import InputError, StageError
from infra.registry import Registry
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import embeddings_of

PARTS = {"a": NAMES[:4], "b": NAMES[4:8]}
"""Two domains to merge."""


def test_merge_databases_builds_a_union_that_can_be_rebuilt(living_on_prefect: Living, ray: WithoutRay) -> None:
    from tasks.serve.load import load_database

    living = living_on_prefect
    living.start({"shapes": NAMES[:6], "others": NAMES[6:10]})
    ray.items.clear()
    merged = living.merge("both", "shapes", "others")
    assert {description for description, _ in ray.items} & {"images", "embeddings"} == set()
    assert living.found(merged.database.reference) == set(NAMES[:10])
    assert len(load_database("both", living.settings)) == 10
    grown = living.rebuild(domain="both", urls=living.listed(*NAMES[:11]))
    assert living.server.requests == [NAMES[10]]
    assert living.found(grown.after.database) == set(NAMES[:11])
    assert embeddings_of(grown.after.database).rows == 11


def test_combine_again_keeps_takedowns_of_the_domain(living: Living, ray: WithoutRay) -> None:
    living.start(PARTS)
    living.merge("shapes", "a", "b")
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"))
    living.merge("shapes", "a", "b")
    assert living.champion() == set(NAMES[:8]) - {NAMES[1]}
    living.subset("shapes", "a", "width > 0")
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}


def test_merge_hides_copies_of_images_that_a_part_has_taken_down(living: Living, ray: WithoutRay) -> None:
    living.start({"a": NAMES[:4]})
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), domain="a")
    living.server.replies[NAMES[1]] = Reply(body=BODY[NAMES[5]])
    living.build([NAMES[1], *NAMES[5:7]], domain="b")
    living.merge("shapes", "a", "b")
    assert living.champion() == {NAMES[0], *NAMES[2:4], NAMES[6]}


def test_combine_after_rollback_keeps_all_takedowns_of_the_source(living: Living, ray: WithoutRay) -> None:
    living.start(PARTS)
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), domain="a")
    Registry(living.settings)._client.set_registered_model_alias("knn-database.a", "champion", "1")
    living.subset("shapes", "a", "width > 0")
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}
    living.merge("shapes", "a", "b")
    assert living.champion() == set(NAMES[:8]) - {NAMES[1]}


def test_failed_merge_rolls_back_its_takedowns(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.references.takedown import list_takedowns

    living.start(PARTS)
    living.build(NAMES[:2])
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), domain="a")

    def fails(*_: Any, **__: Any) -> Any:
        raise StageError("recall is too low")

    monkeypatch.setattr("flows.combine_databases.index", fails)
    with pytest.raises(StageError, match="recall"):
        living.merge("shapes", "a", "b", replace=True)
    assert list_takedowns(DomainFolder(uri=f"{living.root}/shapes")) == []
    living.rebuild(urls=living.listed(*NAMES[:3]))
    assert living.champion() == set(NAMES[:3])


def test_combine_without_replace_keeps_a_domain_with_its_own_images(living: Living, ray: WithoutRay) -> None:
    living.start({"shapes": NAMES[:4], "a": NAMES[4:6], "b": NAMES[5:7]})
    message = "the champion of shapes is built from 4 images of its own .* choose another domain, or pass --replace"
    with pytest.raises(InputError, match=message) as caught:
        living.merge("shapes", "a", "b")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        living.subset("shapes", "a", "width > 0")
    assert living.champion() == set(NAMES[:4])
    living.merge("shapes", "shapes", "a")  # keeps all of its images
    assert living.champion() == set(NAMES[:6])
    living.rebuild(urls=living.listed(*NAMES[:8]))
    with pytest.raises(InputError, match="the champion of shapes is built from 8 images of its own"):
        living.subset("shapes", "a", "width > 0")
    living.subset("shapes", "a", "width > 0", replace=True)
    assert living.champion() == set(NAMES[4:6])


def test_rebuild_of_subset_contains_filtered_and_added_images(living: Living, ray: WithoutRay) -> None:
    from tasks.embed.task import EmbedConfig

    living.start({"a": NAMES[:8]})
    added = living.listed(*NAMES[8:10])
    for shape in ("circle", "square"):
        wanted = {name for name in NAMES[:8] if shape in name}
        assert 0 < len(wanted) < 8
        living.subset("shapes", "a", f'url like "%{shape}%"', replace=True)
        living.rebuild(urls=added)
        assert living.champion() == wanted | set(NAMES[8:10])
        embedded = living.rebuild(embed=EmbedConfig(workers=1, batch_size=2))
        assert not embedded.skipped["embed"]
        assert living.champion() == wanted | set(NAMES[8:10])
