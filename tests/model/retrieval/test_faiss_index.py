import os
from pathlib import Path

import faiss
import numpy as np
import pytest
from support import tiny_models

from model.errors import ModelError
from model.retrieval.faiss_index import (
    choose_index,
    is_lossless,
    is_stackable,
    quantization_error,
    train_index,
    training_rows,
)
from model.retrieval.index_files import fill_shard, merge_shards

GIB = 1 << 30


@pytest.mark.parametrize(
    ("rows", "dimension", "memory_bytes", "factory"),
    [
        (1, 512, GIB, "Flat"),
        (32_768, 512, GIB, "Flat"),
        (32_769, 512, GIB, "IVF1024,SQfp16"),
        (1_000_000, 512, 8 * GIB, "IVF4096,SQfp16"),
        (1_000_000, 512, 3 * GIB // 4, "IVF4096,SQ8"),
        (10_000_000, 256, 8 * GIB, "IVF16384_HNSW32,SQfp16"),
        (10_000_000, 256, 4 * GIB, "IVF16384_HNSW32,SQ8"),
        (10_000_000, 256, 2 * GIB, "OPQ128_256,IVF16384_HNSW32,PQ128x8"),
        (400_000_000, 768, 64 * GIB, "OPQ96_768,IVF65536_HNSW32,PQ96x8"),
        (1_000_000, 509, GIB // 4, "OPQ254_508,IVF4096,PQ254x8"),
    ],
)
def test_choose_index_size_and_memory_returns_factory(
    rows: int, dimension: int, memory_bytes: int, factory: str
) -> None:
    assert choose_index(rows, dimension, memory_bytes) == factory
    assert faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT).d == dimension


def test_choose_index_memory_too_small_raises() -> None:
    with pytest.raises(
        ModelError,
        match=r"16 MiB, but an index of 1000000 rows of 256 values needs at least 38 MiB; raise it \(--memory\)",
    ):
        choose_index(1_000_000, 256, 16 << 20)


def test_is_lossless_only_for_codes_equal_to_stored_rows() -> None:
    sample = tiny_models.unit_rows(400).astype(np.float32)
    exact = {
        name: is_lossless(train_index(name, tiny_models.WIDTH, sample)) for name in ("Flat", "IVF4,Flat", "IVF4,SQfp16")
    }
    rounded = {
        name: is_lossless(train_index(name, tiny_models.WIDTH, sample))
        for name in ("IVF4,SQ8", "IVF4,PQ4x4", "OPQ4,IVF4,SQfp16")
    }
    assert set(exact.values()) == {True}
    assert set(rounded.values()) == {False}


@pytest.mark.parametrize(
    ("factory", "stacked"),
    [("Flat", False), ("HNSW8", False), ("IVF4,PQ4x4fs", False), ("IVF4,SQ8", True), ("OPQ4,IVF4,PQ4x4", True)],
)
def test_is_stackable_only_for_plain_inverted_lists(factory: str, stacked: bool) -> None:
    assert (
        is_stackable(train_index(factory, tiny_models.WIDTH, tiny_models.unit_rows(400).astype(np.float32))) == stacked
    )


def test_train_index_many_cells_clusters_in_two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.retrieval.faiss_index.GRAPH_CELLS", 16)
    sample = tiny_models.unit_rows(4_000).astype(np.float32)
    index = train_index("IVF64_HNSW32,SQ8", tiny_models.WIDTH, sample)
    assert (index.is_trained, index.ntotal, index.quantizer.ntotal) == (True, 0, 64)
    one_level = train_index("IVF16,SQ8", tiny_models.WIDTH, sample)
    assert quantization_error(index, sample) < 0.75 * quantization_error(one_level, sample)


def test_train_index_returns_empty_inner_product_index() -> None:
    sample = tiny_models.unit_rows(300).astype(np.float32)
    for factory in ("Flat", "IVF4,Flat"):
        index = train_index(factory, tiny_models.WIDTH, sample)
        assert (index.is_trained, index.ntotal, index.d) == (True, 0, tiny_models.WIDTH)
        assert index.metric_type == faiss.METRIC_INNER_PRODUCT


@pytest.mark.parametrize("factory", ["Flatt", "PQ3x8", ""])
def test_train_index_unknown_factory_raises(factory: str) -> None:
    with pytest.raises(ModelError, match=f"invalid FAISS factory string for 8 dimensions: '{factory}'"):
        train_index(factory, 8, tiny_models.unit_rows(300).astype(np.float32))


def test_train_index_too_few_rows_raises() -> None:
    with pytest.raises(ModelError, match=r"'IVF64,Flat' cannot be trained on 20 rows.*use a smaller index"):
        train_index("IVF64,Flat", 8, tiny_models.unit_rows(20).astype(np.float32))


@pytest.mark.parametrize(
    ("factory", "rows", "wanted"),
    [
        ("Flat", 1_000_000, 0),
        ("IVF4096,Flat", 1_000_000, 4096 * 40),
        ("IVF4096,Flat", 1_000, 1_000),
        ("OPQ128_512,IVF16384_HNSW32,PQ128x8", 20_000_000, 16384 * 40),
        ("IVF4,PQ4x8", 1_000_000, 16_384),  # the product quantizer has 256 centroids of its own
    ],
)
def test_training_rows_is_forty_per_cell(factory: str, rows: int, wanted: int) -> None:
    assert training_rows(factory, rows) == wanted


def test_fill_shard_flat_writes_template_with_rows(tmp_path: Path) -> None:
    rows, template = tiny_models.unit_rows(70_000, 4), tmp_path / "template.faiss"
    faiss.write_index(train_index("Flat", 4, rows.astype(np.float32)), str(template))
    output = tmp_path / "index" / "00000.faiss"

    fill_shard(template, [rows[:100], rows[100:]], output)

    index = faiss.read_index(str(output))
    assert index.ntotal == 70_000
    for row in (0, 65_535, 65_536, 69_999):  # on both sides of the block boundary
        np.testing.assert_array_equal(index.reconstruct(row), rows[row].astype(np.float32))
    assert faiss.read_index(str(template)).ntotal == 0


def test_fill_shard_stackable_omits_quantizer(tmp_path: Path) -> None:
    rows, template = tiny_models.unit_rows(2_000), tmp_path / "template.faiss"
    trained = train_index("IVF64,SQ8", tiny_models.WIDTH, rows.astype(np.float32))
    faiss.write_index(trained, str(template))

    error = fill_shard(template, [rows], tmp_path / "00007.faiss", ordinal=7)

    index = faiss.read_index(str(tmp_path / "00007.faiss"))
    assert (index.ntotal, index.quantizer.ntotal) == (2_000, 0)
    ids = np.concatenate(
        [faiss.rev_swig_ptr(index.invlists.get_ids(cell), index.invlists.list_size(cell)) for cell in range(64)]
    )
    assert sorted(ids.tolist()) == [(7 << 32) + row for row in range(2_000)]
    assert error == pytest.approx(quantization_error(trained, rows[::16].astype(np.float32)), abs=1e-6)
    assert 0 < error < 1


def test_fill_shard_repeated_does_not_leak_quantizer(tmp_path: Path) -> None:
    centroids = np.random.default_rng(0).standard_normal((8192, 256), dtype=np.float32)  # 8 MB
    quantizer = faiss.IndexFlatIP(256)
    quantizer.add(centroids)
    template = faiss.IndexIVFScalarQuantizer(
        quantizer, 256, 8192, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    template.train(centroids[:10])
    faiss.write_index(template, str(tmp_path / "quantizer.faiss"))
    resident = []
    for _ in range(12):
        fill_shard(tmp_path / "quantizer.faiss", [tiny_models.unit_rows(20, 256)], tmp_path / "0.faiss")
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert resident[-1] - resident[2] < 16 << 20  # nine quantizers are 72 MB


@pytest.mark.parametrize("count", [900, 404], ids=["most cells filled", "few cells filled"])
@pytest.mark.parametrize("factory", ["IVF16,SQfp16", "IVF16,SQ8", "OPQ4_8,IVF16,PQ4x4"])
def test_merge_shards_equals_one_filled_shard(tmp_path: Path, factory: str, count: int) -> None:
    rows, template = tiny_models.unit_rows(900), tmp_path / "template.faiss"
    faiss.write_index(train_index(factory, tiny_models.WIDTH, rows.astype(np.float32)), str(template))
    rows = rows[:count] if count == 900 else np.repeat(rows[:4], 101, axis=0)
    fill_shard(template, [rows], tmp_path / "whole.faiss", ordinal=7)
    parts, first = [], 0
    for number, part in enumerate((rows[:400], rows[400:401], rows[401:])):
        fill_shard(template, [part], tmp_path / f"{number}.faiss", ordinal=number)
        parts.append((tmp_path / f"{number}.faiss", ((7 - number) << 32) + first))
        first += len(part)

    merge_shards(parts, tmp_path / "merged.faiss")

    assert (tmp_path / "merged.faiss").read_bytes() == (tmp_path / "whole.faiss").read_bytes()


def test_fill_shard_graph_quantizer_assigns_nearest_cell(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = tiny_models.unit(
        rng.normal(size=(100, 1, 32)).repeat(200, 1).reshape(-1, 32) + 0.4 * rng.normal(size=(20_000, 32))
    )
    template = tmp_path / "template.faiss"
    faiss.write_index(train_index("IVF1024_HNSW32,SQfp16", 32, rows.astype(np.float32)), str(template))
    fill_shard(template, [rows[:4000].astype(np.float16)], tmp_path / "shard.faiss")
    trained, shard = (faiss.read_index(str(tmp_path / f"{name}.faiss")) for name in ("template", "shard"))
    graph = faiss.downcast_index(trained.quantizer)
    assert graph.hnsw.efSearch == 64, (
        "FAISS's default of 16 works in a small graph but misses an eighth with 16,384 cells"
    )
    centroids = faiss.downcast_index(graph.storage).reconstruct_n(0, 1024)
    nearest = (rows[:4000] @ centroids.T).argmax(axis=1)
    assigned = np.empty(4000, np.int64)
    for cell in range(1024):
        if size := shard.invlists.list_size(cell):
            assigned[faiss.rev_swig_ptr(shard.invlists.get_ids(cell), size)] = cell
    assert (assigned == nearest).mean() > 0.99
