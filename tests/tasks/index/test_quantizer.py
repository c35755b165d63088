"""The quantizer of a version: choice of the index, and conditions for retraining."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models
from support.embedding_rows import CONFIG, build, stored

from model.errors import ModelError
from tasks.references.database import QUANTIZER

pytestmark = pytest.mark.usefixtures("alone")


def test_reusable_quantizer_drift_above_limit_retrains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    near = tiny_models.unit(
        np.eye(tiny_models.WIDTH)[0] + 0.2 * np.random.default_rng(0).normal(size=(600, tiny_models.WIDTH))
    )
    before = stored(tmp_path, np.split(near.astype(np.float16), 6))
    first = build(before, tmp_path)
    after = stored(tmp_path, [-near[:50].astype(np.float16)], first=6, previous=before)
    with caplog.at_level(logging.INFO):
        logging.getLogger("knn_diffusion").addHandler(caplog.handler)
        second = build(after, tmp_path, previous=first)
        logging.getLogger("knn_diffusion").removeHandler(caplog.handler)
    assert {shard.folder for shard in second.manifest().shards} == {None}
    assert "retraining the quantizer: its error on new rows grew by" in caplog.text
    tolerant = dataclasses.replace(CONFIG, max_drift=1e9)
    reused = build(after, tmp_path, tolerant, previous=first)
    assert reused.manifest().info["shards_taken_over"] == 3


def test_train_quantizer_on_hard_rows_retrains_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    near = tiny_models.unit(np.eye(tiny_models.WIDTH)[0] + 0.2 * random.normal(size=(600, tiny_models.WIDTH)))
    hard = random.normal(size=(400, tiny_models.WIDTH))
    hard[:, [0, -1]] = 0
    embeddings = stored(tmp_path, np.split(near.astype(np.float16), 6))
    version, trained = build(embeddings, tmp_path), []
    additions = [*np.split(tiny_models.unit(hard), 4), -near[:50]]  # the last addition has a still larger error
    for number, rows in enumerate(additions, start=6):
        embeddings = stored(tmp_path, [rows.astype(np.float16)], first=number, previous=embeddings)
        version = build(embeddings, tmp_path, previous=version)
        (quantizer,) = (shard for shard in version.manifest().shards if shard.name == QUANTIZER)
        trained.append(quantizer.folder is None)
    assert trained == [True, False, False, False, True]


def test_reusable_quantizer_auto_after_other_index_uses_own_choice(tmp_path: Path) -> None:
    embeddings = stored(tmp_path, np.split(tiny_models.unit_rows(600), 6))
    first = build(embeddings, tmp_path)
    auto = dataclasses.replace(CONFIG, index="auto")
    second = build(embeddings, tmp_path, auto, previous=first)
    assert second.manifest().info["factory"] == "Flat"
    flat = build(embeddings, tmp_path / "flat", dataclasses.replace(CONFIG, index="Flat"))
    same = build(embeddings, tmp_path / "flat", auto, previous=flat)
    assert same.manifest().info["shards_taken_over"] == 3, "an index equal to the choice of auto is reused"


def test_index_above_memory_limit_uses_fewer_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.retrieval.faiss_index.FLAT_ROWS", 100)
    monkeypatch.setattr("tasks.index.quantizer.FLAT_ROWS", 100)
    rows = tiny_models.unit_rows(1200)
    auto = dataclasses.replace(CONFIG, index="auto", memory_bytes=1200 * (tiny_models.WIDTH + 8))
    first = stored(tmp_path, np.split(rows[:600], 6))
    small = build(first, tmp_path, auto)
    assert small.manifest().info["factory"].endswith("SQfp16")
    more = stored(tmp_path, np.split(rows[600:], 6), first=6, previous=first)
    assert build(more, tmp_path, auto, previous=small).manifest().info["factory"].endswith("SQ8")
    with pytest.raises(ModelError, match=r"memory_bytes is too small: 0 MiB.*raise it \(--memory\)"):
        build(more, tmp_path, dataclasses.replace(auto, memory_bytes=1200 * 8), previous=small)


def test_index_with_larger_memory_limit_uses_more_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.retrieval.faiss_index.FLAT_ROWS", 100)
    monkeypatch.setattr("tasks.index.quantizer.FLAT_ROWS", 100)
    embeddings = stored(tmp_path, np.split(tiny_models.unit_rows(600), 6))
    tight = dataclasses.replace(CONFIG, index="auto", memory_bytes=600 * (tiny_models.WIDTH + 8))
    small = build(embeddings, tmp_path, tight)
    assert small.manifest().info["factory"].endswith("SQ8")
    wide = dataclasses.replace(tight, memory_bytes=600 * (2 * tiny_models.WIDTH + 8))
    assert build(embeddings, tmp_path, wide, previous=small).manifest().info["factory"].endswith("SQfp16")


@pytest.mark.parametrize("factory", ["IDMap,Flat", "NSG16", "LSH", "IVFoops", ""])
def test_index_unusable_factory_raises_before_writing(factory: str, tmp_path: Path) -> None:
    embeddings = stored(tmp_path, [tiny_models.unit_rows(50)])
    with pytest.raises(ModelError, match="use auto, or") as raised:
        build(embeddings, tmp_path, dataclasses.replace(CONFIG, index=factory))
    assert "faiss::" not in str(raised.value)
    assert not list(tmp_path.glob("database/*"))
