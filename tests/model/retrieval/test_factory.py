from pathlib import Path

import faiss
import numpy as np
import pytest
import tiny

from model.errors import ModelError
from model.retrieval.factory import choose_index, fill_shard, train_index, training_rows


@pytest.mark.parametrize(
    ("rows", "dimension", "factory"),
    [
        (1, 512, "Flat"),
        (100_000, 512, "Flat"),
        (100_001, 512, "IVF1024,Flat"),
        (1_000_000, 512, "IVF4096,Flat"),
        (10_000_000, 512, "IVF16384,Flat"),
        (10_000_001, 512, "OPQ128_512,IVF16384_HNSW32,PQ128x8"),
        (400_000_000, 768, "OPQ192_768,IVF65536_HNSW32,PQ192x8"),
        (10_000_001, 510, "OPQ127_508,IVF16384_HNSW32,PQ127x8"),
    ],
)
def test_the_index_follows_the_size(rows: int, dimension: int, factory: str) -> None:
    assert choose_index(rows, dimension) == factory
    assert faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT).d == dimension


def test_a_trained_index_is_empty_and_compares_by_inner_product() -> None:
    sample = tiny.unit_rows(300).astype(np.float32)
    for factory in ("Flat", "IVF4,Flat"):
        index = train_index(factory, tiny.WIDTH, sample)
        assert (index.is_trained, index.ntotal, index.d) == (True, 0, tiny.WIDTH)
        assert index.metric_type == faiss.METRIC_INNER_PRODUCT


@pytest.mark.parametrize("factory", ["Flatt", "PQ3x8", ""])
def test_what_faiss_does_not_know_is_refused_by_name(factory: str) -> None:
    with pytest.raises(ModelError, match=f"'{factory}' is no FAISS factory string for 8 dimensions"):
        train_index(factory, 8, tiny.unit_rows(300).astype(np.float32))


def test_too_few_rows_to_train_on_are_refused_with_the_mend() -> None:
    with pytest.raises(ModelError, match=r"'IVF64,Flat' cannot be trained on 20 rows.*take a smaller one"):
        train_index("IVF64,Flat", 8, tiny.unit_rows(20).astype(np.float32))


@pytest.mark.parametrize(
    ("factory", "rows", "wanted"),
    [
        ("Flat", 1_000_000, 0),
        ("IVF4096,Flat", 1_000_000, 4096 * 40),
        ("IVF4096,Flat", 1_000, 1_000),
        ("OPQ128_512,IVF16384_HNSW32,PQ128x8", 20_000_000, 16384 * 40),
        ("IVF4,PQ4x8", 1_000_000, 256 * 40),  # the product quantizer has 256 centroids of its own
    ],
)
def test_the_quantizer_sees_forty_rows_a_cell(factory: str, rows: int, wanted: int) -> None:
    assert training_rows(factory, rows) == wanted


def test_a_shard_is_the_template_with_its_rows(tmp_path: Path) -> None:
    rows, template = tiny.unit_rows(70_000, 4), tmp_path / "template.faiss"
    faiss.write_index(train_index("Flat", 4, rows.astype(np.float32)), str(template))
    output = tmp_path / "index" / "00000.faiss"

    fill_shard(template, rows, output)

    index = faiss.read_index(str(output))
    assert index.ntotal == 70_000
    for row in (0, 65_535, 65_536, 69_999):  # on both sides of where the rows are converted in parts
        np.testing.assert_array_equal(index.reconstruct(row), rows[row].astype(np.float32))
    assert faiss.read_index(str(template)).ntotal == 0
