"""FAISS's limits on index files."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest

from model.errors import ModelError
from model.retrieval import limits
from model.retrieval.faiss_index import require_factory

NLIST_OFFSET = 4 + 33  # after the index type and its header


def test_limits_import_of_retrieval_sets_them() -> None:
    code = (
        "import model.retrieval.arguments, faiss; "
        "print(faiss.get_deserialization_loop_limit(), faiss.get_deserialization_vector_byte_limit(), "
        "faiss.get_deserialization_lattice_r2_limit())"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split() == [str(limits.MAX_CELLS), str(limits.MAX_VECTOR_BYTES), str(limits.MAX_LATTICE_R2)]


def test_read_index_too_many_cells_raises(tmp_path: Path) -> None:
    path = tmp_path / "forged.faiss"
    index = faiss.index_factory(4, "IVF2,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(np.eye(100, 4, dtype=np.float32))
    faiss.write_index(index, str(path))
    data = bytearray(path.read_bytes())
    assert int.from_bytes(data[NLIST_OFFSET : NLIST_OFFSET + 8], "little") == 2
    data[NLIST_OFFSET : NLIST_OFFSET + 8] = (limits.MAX_CELLS + 1).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match="exceeds deserialization_loop_limit"):
        faiss.read_index(str(path))


def test_apply_limits_older_faiss_skips_missing_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[int] = []
    monkeypatch.setattr(limits, "faiss", SimpleNamespace(set_deserialization_loop_limit=values.append))
    limits.apply_limits()
    assert values == [limits.MAX_CELLS]


def test_require_factory_too_many_cells_raises() -> None:
    with pytest.raises(ModelError, match="too many cells: 1048577; use at most 1048576"):
        require_factory(f"IVF{limits.MAX_CELLS + 1},Flat", 4)
