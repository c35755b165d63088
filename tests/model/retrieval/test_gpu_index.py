"""Search with faiss-gpu: simulated by a CPU index, and on a real GPU if there is one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from support import tiny_models

from model.errors import ModelError
from model.retrieval import gpu_index
from model.retrieval.brute_force import TorchBruteForce
from model.retrieval.gpu_index import GpuIVF
from model.retrieval.ranked_search import SearchEffort

FACTORIES = ["IVF8,SQfp16", "IVF8_HNSW8,Flat", "OPQ4_8,IVF8,PQ4x4"]


class FakeGpu:
    """A fake of faiss-gpu on the CPU that records its searches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.searches: list[tuple[int, int]] = []
        self.copied: list[tuple[int, Any]] = []
        parts = {
            "get_num_gpus": lambda: 2,
            "StandardGpuResources": object,
            "GpuClonerOptions": SimpleNamespace,
            "INDICES_64_BIT": 3,
            "index_cpu_to_gpu": self.copy,
        }
        for name, part in parts.items():
            monkeypatch.setattr(faiss, name, part, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def copy(self, resources: object, device: int, index: Any, options: SimpleNamespace) -> Any:
        self.copied.append((device, options))
        self.index = index
        return self

    def search(self, queries: Any, k: int, params: Any) -> Any:
        self.searches.append((k, getattr(params, "nprobe", 0)))  # SearchParametersPreTransform has no nprobe of its own
        return self.index.search(queries, k, params=params)


@pytest.mark.parametrize("factory", FACTORIES)
def test_gpu_ivf_search_equals_cpu_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    rows, queries = tiny_models.unit_rows(400), tiny_models.unit_rows(9, seed=1).astype(np.float32)
    database = tiny_models.database(tmp_path, rows[:150], rows[150:], factory=factory, nprobe=4, candidates=50)
    gpu = FakeGpu(monkeypatch)
    moved = database.to("cuda:1")
    assert isinstance(moved.candidate_search, GpuIVF)
    assert [(device, vars(options)) for device, options in gpu.copied] == [
        (1, {"allowCpuCoarseQuantizer": True, "indicesOptions": 3, "useFloat16": True})
    ]
    for exclude in (None, np.arange(9, dtype=np.int64)):
        ours, theirs = (each.search(queries, 10, exclude=exclude) for each in (moved, database))
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    assert set(gpu.searches) == {(50, 0 if factory.startswith("OPQ") else 4)}


def test_gpu_ivf_k_and_nprobe_over_limit_finds_all_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_index, "MAX_RESULTS", 5)
    rows, queries = tiny_models.unit_rows(60), tiny_models.unit_rows(2, seed=1).astype(np.float32)
    database = tiny_models.database(tmp_path, rows, factory="IVF8,SQfp16", nprobe=8)
    gpu = FakeGpu(monkeypatch)
    found = database.to("cuda").search(queries, 12)
    np.testing.assert_array_equal(found.ids, database.search(queries, 12).ids)
    assert max(k for k, _ in gpu.searches) == max(nprobe for _, nprobe in gpu.searches) == 5


def test_to_cuda_without_cells_compares_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(
        "model.retrieval.brute_force.TorchBruteForce",
        lambda parts, device: moved.append(str(device)) or TorchBruteForce(parts, torch.device("cpu")),
    )
    rows = tiny_models.unit_rows(40)
    database, gpu = tiny_models.database(tmp_path, rows), FakeGpu(monkeypatch)
    np.testing.assert_array_equal(database.to("cuda").search(rows[:3], 5).ids, database.search(rows[:3], 5).ids)
    assert (moved, gpu.copied) == (["cuda"], [])


def test_to_cuda_index_out_of_memory_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("Error in virtual void faiss::gpu\nout of memory")

    database = tiny_models.database(tmp_path, tiny_models.unit_rows(60), factory="IVF8,SQfp16")
    FakeGpu(monkeypatch)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", full)
    with pytest.raises(
        ModelError, match="the index does not fit into the memory of GPU 0: out of memory; search on the CPU"
    ) as caught:
        database.to("cuda")
    assert "\n" not in str(caught.value)


def test_to_cuda_unsupported_index_compares_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError(
            "Error in void faiss::gpu::GpuIndexIVFPQ::verifyPQSettings_() const\n"
            "Device 0 has 49152 bytes of shared memory, while 8 bits per code and 128 sub-quantizers requires 65536"
        )

    monkeypatch.setattr(
        "model.retrieval.brute_force.TorchBruteForce", lambda parts, device: TorchBruteForce(parts, torch.device("cpu"))
    )
    rows = tiny_models.unit_rows(60)
    database = tiny_models.database(tmp_path, rows, factory="IVF8,SQfp16", nprobe=8)
    FakeGpu(monkeypatch)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refused)
    moved = database.to("cuda")
    assert isinstance(moved.candidate_search, TorchBruteForce)
    np.testing.assert_array_equal(moved.search(rows[:3], 5).ids, database.search(rows[:3], 5).ids)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("GPU 0 cannot search this index: Device 0 has 49152 bytes of shared memory, while 8 bits")
    assert message.endswith("requires 65536; comparing all rows there instead")


def test_to_cuda_rows_out_of_memory_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    database = tiny_models.database(tmp_path, tiny_models.unit_rows(60))
    FakeGpu(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(ModelError, match="the rows do not fit into the memory of cuda: 60 rows; search on the CPU"):
        database.to("cuda")


@pytest.mark.skipif(not faiss.get_num_gpus(), reason="needs faiss-gpu and a GPU")
@pytest.mark.parametrize("factory", FACTORIES)
def test_gpu_ivf_on_gpu_finds_cpu_neighbours(tmp_path: Path, factory: str) -> None:
    rows, queries = tiny_models.unit_rows(4_000), tiny_models.unit_rows(50, seed=1).astype(np.float32)
    database = tiny_models.database(tmp_path, rows[:1500], rows[1500:], factory=factory, nprobe=8, candidates=200)
    same = database.with_effort(SearchEffort(nprobe=8, candidates=200)).to("cuda").search(queries, 10).ids
    assert (same == database.search(queries, 10).ids).mean() > 0.98
