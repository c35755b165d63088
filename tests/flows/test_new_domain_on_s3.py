"""Complete pipeline runs with the root in an object store; another machine loads the results."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes import LoopbackServer
from support.object_stores import Bucket
from support.tiny_domain import NEIGHBOURS, good_replies, small_config, write_urls

from infra.settings import Settings


@pytest.fixture
def other_machine(tmp_path: Path) -> Settings:
    """Settings of a machine without local files of the domain."""
    return Settings(root="s3://absent/root", cache=tmp_path / "elsewhere", tracking=f"sqlite:///{tmp_path}/mlflow.db")


def build_twice(bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch, *, train: bool) -> Any:
    """Build the small domain, check that a second run skips everything, and return the result."""
    from flows.new_domain import new_domain

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setenv("KNN_DIFFUSION_CACHE", str(folder / "cache"))
    replies = good_replies()
    with LoopbackServer(replies) as server:
        urls = write_urls(folder / "urls", [server.url(path) for path in replies])
        bucket.write("urls.jsonl", urls.read_bytes())
        config = small_config(f"{bucket.uri}/urls.jsonl", f"{bucket.uri}/line", server.host, train=train, images=128)
        built = new_domain(config)
        requests = len(server.requests)
        again = new_domain(config)
        assert len(server.requests) == requests
    assert all(again.skipped.values()), again.skipped
    return built


def assert_found(built: Any, settings: Settings) -> None:
    from tasks.serve.load import load_database, search_database

    for name in ("shapes", built.database.reference.uri):
        assert len(load_database(name, settings)) == len(good_replies())
    found = search_database("shapes", "red circle", 3, settings).rows
    assert [row["rank"] for row in found] == [1, 2, 3]
    assert all(row["url"].endswith(".png") for row in found)


def test_new_domain_in_object_store_builds_a_database(
    prefect_server: None, moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_machine: Settings
) -> None:
    assert_found(build_twice(moto_bucket, tmp_path, monkeypatch, train=False), other_machine)


@pytest.mark.slow
@pytest.mark.s3
def test_new_domain_in_real_object_store_builds_database_and_generator(
    prefect_server: None,
    radosgw_bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other_machine: Settings,
) -> None:
    import torch

    from tasks.serve.load import load_pipeline

    built = build_twice(radosgw_bucket, tmp_path, monkeypatch, train=True)
    keys = radosgw_bucket.keys()
    for kind in ("images", "embeddings", "database", "neighbours", "generator", "evaluation"):
        assert sum(key.startswith(f"line/shapes/{kind}/") and key.endswith("/manifest.json") for key in keys) == 1, kind
    assert any(key.startswith("line/mlflow/") and key.endswith(".safetensors") for key in keys)
    assert not [key for key in keys if "/ray/" in key or key.endswith((".partial", "progress.json"))]

    assert_found(built, other_machine)
    images = []
    for generator, database in (
        ("models:/knn-diffusion@champion", "shapes"),
        (built.trained.generator.reference.uri, built.database.reference.uri),
    ):
        pipeline = load_pipeline(generator, database, other_machine)
        output = pipeline("red circle", generator=torch.Generator().manual_seed(1), num_inference_steps=2)
        assert output.hits.ids.shape == (1, NEIGHBOURS)
        images.append(np.asarray(output.images[0]))
    assert np.array_equal(*images)
