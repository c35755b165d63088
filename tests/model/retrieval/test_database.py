import dataclasses
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import tiny_models

from model.errors import ModelError
from model.retrieval import ranked_search
from model.retrieval.database import Database, ShardFiles
from model.retrieval.faiss_index import ivf_of
from model.retrieval.ranked_search import SearchEffort
from model.retrieval.searchable import Hits


def ranked(queries: NDArray[Any], rows: NDArray[np.float16]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the ids and cosines of all rows for each query, best first, computed in float64."""
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")
    return order, np.take_along_axis(scores, order, axis=1)


def require_exact(hits: Hits, queries: NDArray[Any], rows: NDArray[np.float16], k: int) -> None:
    ids, scores = ranked(queries, rows)
    np.testing.assert_array_equal(hits.ids, ids[:, :k])
    np.testing.assert_allclose(hits.scores, scores[:, :k], atol=1e-6)
    np.testing.assert_array_equal(hits.embeddings, rows[ids[:, :k]].astype(np.float32))
    assert (hits.scores.dtype, hits.ids.dtype, hits.embeddings.dtype) == (np.float32, np.int64, np.float32)


@pytest.mark.parametrize(
    "splits", [[], [70], [0, 10, 10, 90]], ids=["one shard", "two shards", "uneven shards, some empty"]
)
def test_search_flat_index_equals_brute_force(tmp_path: Path, splits: list[int]) -> None:
    rows, queries = tiny_models.unit_rows(100), tiny_models.unit_rows(7, seed=1).astype(np.float32)
    database = tiny_models.database(tmp_path, *np.split(rows, splits))
    assert len(database) == 100
    assert database.exact
    require_exact(database.search(queries, 12), queries, rows, 12)


def test_search_accepts_float16_and_strided_queries(tmp_path: Path) -> None:
    rows, queries = tiny_models.unit_rows(40), tiny_models.unit_rows(8, seed=1)[::2]
    require_exact(tiny_models.database(tmp_path, rows).search(queries, 3), queries, rows, 3)


@pytest.mark.parametrize("factory", ["IVF4,PQ4x4", "OPQ4_8,IVF4,PQ4x4"])
def test_search_approximate_index_ranks_by_stored_rows(tmp_path: Path, factory: str) -> None:
    rows, queries = tiny_models.unit_rows(300), tiny_models.unit_rows(6, seed=1).astype(np.float32)
    database = tiny_models.database(tmp_path, rows[:140], rows[140:], factory=factory, nprobe=4, candidates=300)
    assert not database.exact

    # All 300 rows are candidates, so the result must not depend on the order of the index.
    require_exact(database.search(queries, 20), queries, rows, 20)
    proposed, _ = database.candidate_search.propose(queries, 20, 4)
    assert (proposed != ranked(queries, rows)[0][:, :20]).any(), "the index alone is exact, so the test shows nothing"

    few = database.search(queries, 3)
    cosines = np.einsum("qd,qkd->qk", queries, rows[few.ids].astype(np.float32))
    np.testing.assert_allclose(few.scores, cosines, atol=1e-6)
    assert (np.diff(few.scores, axis=1) <= 0).all()


def test_search_nprobe_limits_visited_cells(tmp_path: Path) -> None:
    rows, queries = tiny_models.unit_rows(400), tiny_models.unit_rows(20, seed=1).astype(np.float32)
    exact, _ = ranked(queries, rows)
    missed = {}
    for nprobe in (1, 8):
        found = tiny_models.database(tmp_path / str(nprobe), rows, factory="IVF8,Flat", nprobe=nprobe).search(
            queries, 10
        )
        missed[nprobe] = (found.ids != exact[:, : found.ids.shape[1]]).any()
    assert missed == {1: True, 8: False}


def test_search_ties_across_shards_prefer_lower_id(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(30)
    rows[[4, 17, 29]] = rows[11]
    hits = tiny_models.database(tmp_path, rows[:15], rows[15:20], rows[20:]).search(rows[11:12], 4)
    assert hits.ids[0, :4].tolist() == [4, 11, 17, 29]


def test_search_exclude_hides_row_and_exact_copies_only(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(30)
    rows[22] = rows[3]
    rows[9] = rows[3]
    rows[9, 0] = np.nextafter(rows[3, 0], np.float16(0))  # the closest float16 row that is not a copy
    database = tiny_models.database(tmp_path, rows[:20], rows[20:])
    queries, own = rows[[3, 5]], np.array([3, 5])

    hits = database.search(queries, 6, exclude=own)

    expected, _ = ranked(queries, rows)
    for found, order, hidden in zip(hits.ids, expected, ({3, 22}, {5}), strict=True):
        assert found.tolist() == [row for row in order if row not in hidden][:6]
    assert hits.ids[0, 0] == 9
    assert database.search(queries, 1).ids.tolist() == [[3], [5]], "without exclude the row itself is nearest"


def test_search_many_copies_excluded_finds_next_neighbours(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(160)
    rows[:100] = rows[0]
    hits = tiny_models.database(tmp_path, rows).search(rows[:1], 5, exclude=np.array([0]))
    order, _ = ranked(rows[:1], rows)
    assert hits.ids[0].tolist() == [row for row in order[0] if row >= 100][:5]


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQfp16", "OPQ4_8,IVF4,PQ4x4"])
def test_search_candidates_over_memory_limit_are_ranked_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    rows = tiny_models.unit_rows(300)
    rows[40:90] = rows[3]
    database = tiny_models.database(tmp_path, rows[:100], rows[100:], factory=factory, nprobe=4, candidates=20)
    own = np.arange(120)
    whole = database.search(rows[own], 10, exclude=own)
    sizes = []
    propose = database.candidate_search.propose

    def counted(queries: NDArray[np.float32], count: int, nprobe: int) -> Any:
        sizes.append(len(queries) * count * tiny_models.WIDTH)
        return propose(queries, count, nprobe)

    monkeypatch.setattr(database.candidate_search, "propose", counted)
    monkeypatch.setattr(ranked_search, "_GATHERED_VALUES", 4000)
    batched = database.search(rows[own], 10, exclude=own)
    assert max(sizes) <= 4000
    np.testing.assert_array_equal(batched.ids, whole.ids)
    np.testing.assert_array_equal(batched.scores, whole.scores)


def test_search_independent_shards_ranks_best_candidates(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(400)
    database = tiny_models.database(tmp_path, rows[:150], rows[150:155], rows[155:], factory="IVF4,PQ4x4fs", nprobe=4)
    proposed, _ = database.candidate_search.propose(rows[:7].astype(np.float32), 60, 4)
    assert proposed.shape == (7, 60)
    best = database.search(rows[:7], 1)
    np.testing.assert_array_equal(best.ids[:, 0], np.arange(7))


def test_search_independent_shards_with_l2_metric_ranks_best_candidates(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(700, 16)
    database = tiny_models.database(tmp_path, rows[:500], rows[500:], factory="HNSW8,PQ8x4", candidates=100)
    near, _ = ranked(rows[:20], rows)
    found = database.search(rows[:20], 10).ids
    shares = [len(set(one) & set(true)) / 10 for one, true in zip(found.tolist(), near[:, :10].tolist(), strict=True)]
    assert np.mean(shares) > 0.8


def test_search_k_above_rows_returns_all_rows(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(5)
    database = tiny_models.database(tmp_path, rows[:2], rows[2:])
    require_exact(database.search(rows[:3], 10), rows[:3], rows, 5)
    others = database.search(rows[:3], 10, exclude=np.arange(3))
    assert [sorted(found) for found in others.ids.tolist()] == [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4]]


def test_database_without_shards_raises() -> None:
    with pytest.raises(ModelError, match=r"database has no shard: birds; build it from at least one image"):
        Database([], encoder=tiny_models.identity(), name="birds")


@pytest.mark.parametrize("stored", [0, 3])
def test_search_without_returnable_rows_returns_nothing(tmp_path: Path, stored: int) -> None:
    files = tiny_models.shard_files(tmp_path, tiny_models.unit_rows(stored), tiny_models.unit_rows(0))
    database = Database(files, encoder=tiny_models.identity(), name="birds", hidden=np.arange(stored))
    hits = database.search(tiny_models.unit_rows(2), 5)
    assert (len(database), hits.ids.shape, hits.scores.shape) == (0, (2, 0), (2, 0))
    assert hits.embeddings.shape == (2, 0, tiny_models.WIDTH)


@pytest.mark.parametrize("shape", [(3, tiny_models.WIDTH + 1), (3, tiny_models.WIDTH - 1), (tiny_models.WIDTH,)])
def test_search_query_width_mismatch_raises(tmp_path: Path, shape: tuple[int, ...]) -> None:
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(5), name="birds")
    with pytest.raises(ModelError) as caught:
        database.search(np.ones(shape, np.float32), 1)
    assert str(shape) in str(caught.value)
    assert "birds of tiny-clip (8-d" in str(caught.value)


@pytest.mark.parametrize("k", [0, -1])
def test_search_k_below_one_raises(tmp_path: Path, k: int) -> None:
    with pytest.raises(ModelError, match=f"k is below 1: {k}; request at least one"):
        tiny_models.database(tmp_path, tiny_models.unit_rows(5)).search(tiny_models.unit_rows(1), k)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (tiny_models.unit_rows(9), "1.faiss indexes 10 rows, its embeddings have 9"),
        (tiny_models.unit_rows(11), "1.faiss indexes 10 rows, its embeddings have 11"),
        (tiny_models.unit_rows(10, 4), "1.npy is (10, 4), expected float16 (n, 8)"),
    ],
)
def test_database_index_and_rows_mismatch_raises(tmp_path: Path, stored: NDArray[np.float16], message: str) -> None:
    good, bad = tiny_models.shard_files(tmp_path, tiny_models.unit_rows(5), tiny_models.unit_rows(10))
    np.save(bad.embeddings[0], stored)
    with pytest.raises(ModelError, match=re.escape(message) + ".*rebuild the database"):
        Database([good, bad], encoder=tiny_models.identity())


def test_database_files_with_known_rows_are_mapped_on_first_use(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(15)
    one, other = tiny_models.shard_files(tmp_path, rows[:5], rows[5:])
    one, other = dataclasses.replace(one, rows=(5,)), dataclasses.replace(other, rows=(10,))
    other.embeddings[0].rename(tmp_path / "away.npy")
    database = Database([one, other], encoder=tiny_models.identity())
    np.testing.assert_array_equal(database.rows(np.array([4, 0])), rows[[4, 0]])
    np.save(other.embeddings[0], rows[:9])
    with pytest.raises(ModelError, match=r"shape or dtype: .* is \(9, 8\), expected float16 \(10, 8\); rebuild"):
        database.rows(np.array([7]))
    (tmp_path / "away.npy").rename(other.embeddings[0])
    np.testing.assert_array_equal(database.rows(np.array([7])), rows[[7]])


def test_database_rows_of_another_encoder_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="rebuild the database"):
        Database(tiny_models.shard_files(tmp_path, tiny_models.unit_rows(10)), encoder=tiny_models.identity(16))


def test_database_ids_follow_shard_order(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(20)
    first, second = tiny_models.shard_files(tmp_path, rows[:5], rows[5:])
    assert Database([second, first], encoder=tiny_models.identity()).search(rows[[0, 5]], 1).ids.tolist() == [[15], [0]]


def test_rows_returns_stored_rows_in_shape_of_ids(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(20)
    database = tiny_models.database(tmp_path, rows[:5], rows[5:5], rows[5:])
    ids = np.array([[19, 0, 5], [4, 4, 12]])
    found = database.rows(ids)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, rows[ids])


def test_describe_adds_metadata_to_ids(tmp_path: Path) -> None:
    files: list[ShardFiles] = tiny_models.shard_files(tmp_path, tiny_models.unit_rows(5))
    bare = Database(files, encoder=tiny_models.identity())
    assert bare.describe(np.array([3, 1])) == [{"id": 3}, {"id": 1}]
    described = Database(
        files, encoder=tiny_models.identity(), describe=lambda ids: [{"key": f"{row:09d}"} for row in ids]
    )
    assert described.describe([3, 1]) == [{"id": 3, "key": "000000003"}, {"id": 1, "key": "000000001"}]


def test_search_many_copies_in_one_shard_finds_all_neighbours(tmp_path: Path) -> None:
    """One shard has the copies and the true neighbours, the other has only worse rows."""
    near = tiny_models.unit_rows(12)
    first = np.concatenate([near[:1]] * 5 + [near])
    far = -np.concatenate([near] * 2)
    database = tiny_models.database(tmp_path, first, far)
    rows = np.concatenate([first, far])
    query = rows[:1].astype(np.float32)
    found = database.search(query, 8, exclude=np.array([0]))
    scores = rows.astype(np.float32) @ query[0]
    scores[(rows.astype(np.float16) == rows[:1].astype(np.float16)).all(axis=1)] = -np.inf
    assert found.scores[0] == pytest.approx(np.sort(scores)[::-1][:8], abs=2e-3)
    assert not set(found.ids[0].tolist()) & set(range(6))


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQfp16", "IVF8,SQ8", "OPQ4,IVF8,PQ4x4"])
def test_search_stacked_shards_equals_one_shard(tmp_path: Path, factory: str) -> None:
    rows, queries = tiny_models.unit_rows(900), tiny_models.unit_rows(20, seed=1).astype(np.float32)
    whole = tiny_models.database(tmp_path / "one", rows, factory=factory, nprobe=2, candidates=60)
    parts = tiny_models.database(
        tmp_path / "many", *np.split(rows, [50, 50, 600]), factory=factory, nprobe=2, candidates=60
    )
    assert type(parts.candidate_search).__name__ == "StackedIVF"
    np.testing.assert_array_equal(parts.search(queries, 10).ids, whole.search(queries, 10).ids)


def test_database_open_maps_lists_without_prefetch_threads(tmp_path: Path) -> None:
    database = tiny_models.database(
        tmp_path, tiny_models.unit_rows(60), tiny_models.unit_rows(0), factory="IVF8,SQfp16"
    )
    shards = [part for part in database.candidate_search._references if isinstance(part, faiss.Index)]  # type: ignore[attr-defined]
    mapped = [faiss.downcast_InvertedLists(ivf_of(shard).invlists) for shard in shards]
    assert [(type(lists), lists.prefetch_nthread) for lists in mapped] == [(faiss.OnDiskInvertedLists, 0)] * 2


def test_database_shards_with_gaps_in_ordinals_are_searched(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(300)
    files = tiny_models.shard_files(tmp_path, rows[:100], rows[100:180], rows[180:], factory="IVF4,SQfp16")
    quantizer, effort = tmp_path / "quantizer.faiss", SearchEffort(nprobe=4)
    without = Database([files[0], files[2]], encoder=tiny_models.identity(), quantizer=quantizer, effort=effort)
    remaining = np.concatenate([rows[:100], rows[180:]])
    require_exact(without.search(remaining[:50], 5), remaining[:50], remaining, 5)


def test_database_without_or_with_wrong_quantizer_raises(tmp_path: Path) -> None:
    files = tiny_models.shard_files(tmp_path, tiny_models.unit_rows(200), factory="IVF4,SQ8")
    with pytest.raises(ModelError, match=r"the quantizer of an index is missing: .*0\.faiss; rebuild"):
        Database(files, encoder=tiny_models.identity())
    other = tiny_models.shard_files(tmp_path / "other", tiny_models.unit_rows(200), factory="IVF8,SQ8")
    with pytest.raises(ModelError, match=r"an index does not match its quantizer: .*0\.faiss, .*rebuild"):
        Database(other, encoder=tiny_models.identity(), quantizer=tmp_path / "quantizer.faiss")


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQfp16", "IVF4,SQ8"])
def test_search_hidden_rows_are_never_returned(tmp_path: Path, factory: str) -> None:
    rows = tiny_models.unit_rows(400)
    queries = rows[:5].astype(np.float32)
    near = np.unique(ranked(queries, rows)[0][:, :60])
    visible = np.setdiff1d(np.arange(400), near)
    database = tiny_models.database(
        tmp_path, rows[:250], rows[250:], factory=factory, hidden=near, nprobe=4, candidates=20
    )
    assert (len(database), database.stored) == (len(visible), 400)
    np.testing.assert_array_equal(database.ids(), visible)
    found = database.search(queries, 10)
    order, _ = ranked(queries, rows)
    for ids, best in zip(found.ids.tolist(), order.tolist(), strict=True):
        assert ids == [row for row in best if row not in near][:10]


def test_search_with_too_few_rows_in_cells_visits_more_cells(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(64)
    hits = tiny_models.database(tmp_path, rows, factory="IVF16,SQfp16", nprobe=1).search(rows[:8], 30)
    assert hits.ids.shape == (8, 30)
    assert (hits.ids >= 0).all()
    assert hits.ids[:, 0].tolist() == list(range(8))
    require_exact(tiny_models.database(tmp_path, rows, factory="IVF16,SQfp16").search(rows[:8], 64), rows[:8], rows, 64)


@pytest.mark.parametrize("factory", ["IVF32,SQfp16", "OPQ4_8,IVF16,PQ4x4"])
def test_nearest_concurrent_efforts_are_independent(tmp_path: Path, factory: str) -> None:
    rows = tiny_models.unit_rows(3_000)
    usual = tiny_models.database(tmp_path, rows[:1000], rows[1000:], factory=factory, candidates=20)
    queries = tiny_models.unit_rows(20, seed=3).astype(np.float32)
    alone = {count: usual.nearest(queries[:count], 10).ids for count in (1, 20)}
    ended = threading.Event()

    def search_harder() -> None:
        harder = usual.with_effort(SearchEffort(nprobe=16, candidates=200))
        while not ended.is_set():
            harder.nearest(queries[:1], 10)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(search_harder)
        try:
            for count in [1, 20] * 100:
                assert (usual.nearest(queries[:count], 10).ids == alone[count]).all()
        finally:
            ended.set()
        other.result()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": np.array([["a red cat"]])}, "not numeric: <U9; embed texts"),
        (
            {"queries": 2 * tiny_models.unit_rows(3)},
            "query 0 to database database is not a unit vector: length 2; divide",
        ),
        ({"k": 2.5}, "k is not an integer: 2.5"),
        ({"exclude": np.array([0, 1])}, r"exclude has the wrong shape: \(2,\) for 3 queries; pass one row id"),
        ({"exclude": np.array([0, 1, 40])}, "has no row 40; use ids from 0 to 39"),
        ({"exclude": np.array([0, 1, -1])}, "has no row -1"),
        ({"exclude": np.array([0.5, 1, 2])}, "are not integers: float64"),
    ],
)
def test_search_invalid_arguments_raise(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(40))
    with pytest.raises(ModelError, match=message):
        database.search(**{"queries": tiny_models.unit_rows(3), "k": 2, **arguments})


@pytest.mark.parametrize(("row", "message"), [(40, "has no row 40"), (-1, "has no row -1")])
def test_describe_unknown_row_raises(tmp_path: Path, row: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tiny_models.database(tmp_path, tiny_models.unit_rows(40)).describe([row])


def test_search_part_with_all_rows_hidden_returns_nothing(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(40)
    part = Database(
        tiny_models.shard_files(tmp_path, rows),
        encoder=tiny_models.identity(),
        hidden=np.arange(40, dtype=np.int64),
    )
    hits = part.search_without(rows[:3].astype(np.float32), 5, rows[:3])
    assert hits.ids.shape == hits.scores.shape == (3, 0)
    assert hits.embeddings.shape == (3, 0, tiny_models.WIDTH)
    np.testing.assert_array_equal(part.rows(np.array([7])), rows[[7]])


def test_to_unavailable_device_raises(tmp_path: Path) -> None:
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(40))
    with pytest.raises(ModelError, match="unknown device: 'gpu'"):
        database.to("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="torch finds no GPU for device: cuda"):
            database.to("cuda")


def test_brute_force_with_rounded_products_finds_true_neighbours(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(5_000)
    whole = tiny_models.database(tmp_path, rows)
    rounded = whole.to("cpu")
    for part in rounded.candidate_search._parts:  # type: ignore[attr-defined]
        part.copy_((part * 512).round() / 512)
    queries = tiny_models.unit_rows(200, seed=1)
    np.testing.assert_array_equal(rounded.search(queries, 10).ids, whole.search(queries, 10).ids)
