import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

from model.retrieval.database import Database
from model.retrieval.ranked_search import SearchEffort
from model.retrieval.recall import GroundTruth, exact_neighbours, recall
from model.retrieval.tuning import CANDIDATES, tune

WIDE = 32


def truths_of(rows: np.ndarray, count: int = 40) -> dict[str, GroundTruth]:
    own = np.arange(0, len(rows), len(rows) // count)[:count]
    return {
        "image": exact_neighbours([rows], rows[own].astype(np.float32), own=own, own_rows=rows[own]),
        "text": exact_neighbours([rows], tiny_models.unit_rows(count, rows.shape[1], seed=5).astype(np.float32)),
    }


def test_tune_exact_database_uses_least_effort(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(300)
    best, measured = tune(tiny_models.database(tmp_path, rows), truths_of(rows), 1.0)
    assert best.recalls == {"image": 1.0, "text": 1.0}
    assert (best.effort.nprobe, len(measured)) == (1, 1)
    assert best.latency_ms > 0


def test_tune_ivf_chooses_fewest_cells_for_both_kinds(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(2_000)
    database, truths = tiny_models.database(tmp_path, rows[:900], rows[900:], factory="IVF32,SQfp16"), truths_of(rows)
    best, measured = tune(database, truths, 0.9)
    assert min(best.recalls.values()) >= 0.9
    fewer = database.with_effort(SearchEffort(nprobe=best.effort.nprobe // 2, candidates=best.effort.candidates))
    assert min(recall(fewer, truth) for truth in truths.values()) < 0.9
    assert [point.effort.nprobe for point in measured] == [1 << power for power in range(len(measured))]
    assert best.effort.nprobe < measured[-1].effort.nprobe, "the curve must extend beyond the chosen point"


def test_tune_few_bits_increases_candidates(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(3_000)
    database = tiny_models.database(tmp_path, rows, factory="IVF4,PQ4x4")
    best, measured = tune(database, truths_of(rows), 0.9)
    assert min(best.recalls.values()) >= 0.9
    assert best.effort.candidates > CANDIDATES[0]
    shallow = [point for point in measured if point.effort.candidates == CANDIDATES[0]]
    assert max(min(point.recalls.values()) for point in shallow) < 0.9, "cells alone must not reach the target"


def test_tune_unreachable_target_returns_best_point(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(500)
    files = tiny_models.shard_files(tmp_path, rows)
    np.save(files[0].embeddings[0], np.roll(rows, 1, axis=0))  # the stored rows do not match the index
    database = Database(files, encoder=tiny_models.identity(), effort=SearchEffort(candidates=10))
    best, _ = tune(database, truths_of(rows), 0.95)
    assert min(best.recalls.values()) < 0.95


def test_tune_kind_without_queries_counts_as_reached(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(300)
    none = {"text": exact_neighbours([rows], np.zeros((0, tiny_models.WIDTH), np.float32))}
    best, _ = tune(tiny_models.database(tmp_path, rows), {**truths_of(rows), **none}, 0.95)
    assert best.recalls["text"] == 1.0


def test_exact_neighbours_grown_from_adds_new_and_drops_hidden_rows() -> None:
    rows = tiny_models.unit_rows(900)
    own = np.array([3, 400, 77])
    first = exact_neighbours([rows[:600]], rows[own].astype(np.float32), own=own, own_rows=rows[own])
    hidden = np.sort(np.array([int(first.ids[0, 0]), int(first.ids[1, 2]), 700]))
    grown = exact_neighbours(
        [rows[:500], rows[500:]], first.queries, own=own, own_rows=rows[own], hidden=hidden, grown_from=(first, 600)
    )
    whole = exact_neighbours([rows], first.queries, own=own, own_rows=rows[own], hidden=hidden)
    np.testing.assert_array_equal(grown.ids[:, :10], whole.ids[:, :10])
    assert not np.isin(grown.ids, hidden).any()
    assert (grown.ids[:, :10] >= 600).any(), "no new row is among the nearest"


@pytest.mark.parametrize("device", ["cpu"])
def test_search_on_device_equals_flat_search(tmp_path: Path, device: str) -> None:
    rows, queries = tiny_models.unit_rows(300), tiny_models.unit_rows(9, seed=1).astype(np.float32)
    database = tiny_models.database(tmp_path, rows[:120], rows[120:], factory="IVF8,SQ8", hidden=np.array([5, 130]))
    moved = database.to(device).search(queries, 7)
    flat = tiny_models.database(tmp_path / "flat", rows[:120], rows[120:], hidden=np.array([5, 130])).search(queries, 7)
    np.testing.assert_array_equal(moved.ids, flat.ids)
    np.testing.assert_allclose(moved.scores, flat.scores, atol=1e-6)


def test_tune_grown_database_starts_at_half_the_cells(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(2_000)
    database, truths = tiny_models.database(tmp_path, rows, factory="IVF32,SQfp16"), truths_of(rows)
    first, measured = tune(database, truths, 0.9)
    assert first.effort.nprobe >= 4, "too few cells for this test"
    again, fewer = tune(database, truths, 0.9, before=first.effort)
    assert (again.effort, fewer[0].effort.nprobe) == (first.effort, first.effort.nprobe // 2)
    assert len(fewer) < len(measured)


def test_tune_lossless_index_reads_no_rows(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(2_000, WIDE)  # no ties
    (files,) = tiny_models.shard_files(tmp_path, rows, factory="IVF32,SQfp16")

    def fetch() -> Path:
        raise AssertionError("a database of a billion rows would fetch thousands of files")

    remote = dataclasses.replace(files, embeddings=(fetch,), rows=(len(rows),))
    database = Database([remote], encoder=tiny_models.identity(WIDE), quantizer=tmp_path / "quantizer.faiss")
    truths = truths_of(rows)
    best, _ = tune(database, truths, 0.9)
    assert min(best.recalls.values()) >= 0.9
    with pytest.raises(AssertionError, match="fetch"):
        database.search(truths["text"].queries, 10)
