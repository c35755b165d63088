"""Benchmark of the names with a fake generator and encoder."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("names")
    monkeypatch.setattr(module, "BENCH", tmp_path)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("run")


class FakePipeline:
    """Fake pipeline that records its arguments."""

    device = torch.device("cpu")
    config = types.SimpleNamespace(candidates=2)

    def __init__(self, database: Any) -> None:
        self.database, self.calls = database, list[dict[str, Any]]()

    def __call__(self, queries: torch.Tensor, **options: Any) -> Any:
        self.calls.append({"images": len(queries), **options})
        return types.SimpleNamespace(images=[np.full((8, 8, 3), number, np.uint8) for number in range(len(queries))])


def test_bench_names_also_scores_single_candidates(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiny_models.unit_rows(120)
    pipeline = FakePipeline(tiny_models.database(tmp_path, own))
    queries = torch.from_numpy(tiny_models.unit_rows(100, seed=1).astype(np.float32))
    settings = {"weights": "0" * 64, "defaults": {"candidates": 2}}
    scene = bench.Scene(
        encoder=types.SimpleNamespace(embed_pixels=lambda pixels: queries[: len(pixels)]),
        own=own.astype(np.float32),
        queries=queries,
        described=own[:100].astype(np.float32),
        reference=bench.ReferenceSet(real=own.astype(np.float32), threshold=0.9, resamples=10),
        nearest_real=0.5,
        groups=np.arange(100),
        studio=bench.Studio(pipeline, queries, settings),
    )
    monkeypatch.setattr(bench.Scene, "prepare", lambda samples, device, model: scene)
    monkeypatch.setattr(bench, "other_domains", list)
    result = bench.bench_names(100, "cpu")
    assert (result["samples"], result["samples_no_knn"], result["samples_knn_one_draw"]) == (100, 96, 96)
    assert result["clip_score_knn_one_draw_low"] <= result["clip_score_knn_one_draw"] == pytest.approx(1)
    calls = [call for call in pipeline.calls if "candidates" in call]
    counts = {(call["retrieve"], call["candidates"]): 0 for call in calls}
    for call in calls:
        counts[call["retrieve"], call["candidates"]] += call["images"]
    assert counts == {(True, None): 100, (False, None): 96, (True, 1): 96}


def test_real_distance_is_that_of_as_many_real_images_to_all(bench: Any) -> None:
    own = tiny_models.unit_rows(2_000).astype(np.float32)
    few, many = bench.real_distance(own, 50), bench.real_distance(own, 2_000)
    assert 0 < many < few / 10
    assert bench.real_distance(own, 50) == few


def test_groups_of_names_join_skin_tones(bench: Any) -> None:
    names = ["victory hand", "victory hand medium-dark skin tone", "couple dark skin tone light skin tone", "couple"]
    assert bench.groups_of_names([*names, "dark chocolate"]).tolist() == [0, 0, 1, 1, 2]


def test_counts_of_baselines_are_an_eighth(bench: Any) -> None:
    assert bench.counts_of(2_000) == {"knn": 2_000, "no_knn": 250, "knn_one_draw": 250}
    assert bench.counts_of(64) == {"knn": 64, "no_knn": 64, "knn_one_draw": 64}


@pytest.mark.parametrize("text", ["0", "3", "-1", "many"])
def test_main_with_too_few_samples_fails(
    text: str, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "generator", f"--samples={text}"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert f"number of samples is too small or not a number: '{text}'; give at least 4" in capsys.readouterr().err


@pytest.mark.parametrize(("samples", "named", "count"), [(None, True, 160), (None, False, 4), (7, True, 7)])
def test_benchmark_passes_the_number_of_samples(
    samples: int | None, named: bool, count: int, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = types.SimpleNamespace(bench_generator=lambda samples, device: {"samples": samples})
    monkeypatch.setitem(sys.modules, "generator", counted)  # type: ignore[arg-type]
    assert run.benchmark("generator", samples, named=named)() == {"samples": count}
