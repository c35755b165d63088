"""Database on Ray actors."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny_models
from support.embedding_rows import build, stored
from support.fakes import WithoutRay

from model.errors import ModelError
from tasks.references.database import open_database
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries
from tasks.serve.distributed import distributed_database
from tasks.upkeep.takedown import commit_takedown

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.on_ray
def test_distributed_database_returns_results_of_local_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny_models.unit_rows(600)
    rows[500] = rows[3]
    takedown = commit_takedown(
        Entries(url=frozenset({"http://00004/9"})), DomainFolder(uri=str(tmp_path)), info={}
    ).reference
    version = build(stored(tmp_path, np.split(rows, 6)), tmp_path, takedown=takedown)
    local = open_database(version, tmp_path / "cache")
    queries, own = rows[[3, 5, 409]], np.array([3, 5, 409])
    with distributed_database(version, tmp_path / "cache", actors=2, cpus_each=0.5) as distributed:
        assert len(distributed) == len(local) == 599
        for options in ({}, {"exclude": own}):
            actual, expected = distributed.search(queries, 7, **options), local.search(queries, 7, **options)
            np.testing.assert_array_equal(actual.ids, expected.ids)
            np.testing.assert_array_equal(actual.embeddings, expected.embeddings)
        pipeline = tiny_models.pipeline(None)
        pipeline.swap_database(distributed)
        query = torch.from_numpy(queries).float()
        conditioned = pipeline.condition(query, 3)
        assert torch.equal(conditioned.tokens, pipeline.condition(query, 3, database=local).tokens)
        np.testing.assert_array_equal(distributed.rows(np.array([[0, 599], [300, 1]])), rows[[[0, 599], [300, 1]]])
        assert not distributed.has_images
        assert distributed.describe([407])[0]["url"] == "http://00004/7"
        with pytest.raises(ModelError, match="k is below 1: 0"):
            distributed.search(queries, 0)
        with pytest.raises(ModelError, match="has no row 600; use ids from 0 to 599"):
            distributed.describe([600])
    whole_part = commit_takedown(
        Entries(url=frozenset(f"http://{shard:05d}/{n}" for shard in (4, 5) for n in range(100))),
        DomainFolder(uri=str(tmp_path)),
        info={},
    ).reference
    version = build(stored(tmp_path, np.split(rows, 6)), tmp_path, takedown=whole_part)
    local = open_database(version, tmp_path / "cache")
    version = dataclasses.replace(version, uri=f"{version.uri}/")  # with a trailing slash, as a user may type it
    WithoutRay().install(monkeypatch)
    with distributed_database(version, tmp_path / "cache", actors=3, cpus_each=0.5) as distributed:
        assert distributed.name == local.name == tmp_path.name
        for options in ({}, {"exclude": own}):
            actual, expected = distributed.nearest(queries, 7, **options), local.nearest(queries, 7, **options)
            np.testing.assert_array_equal(actual.ids, expected.ids)
