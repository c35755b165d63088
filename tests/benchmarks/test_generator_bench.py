"""What the benchmarks of the generator draw and write, with stand-ins for the generator and the encoder."""

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
    module = importlib.import_module("generator")
    monkeypatch.setattr(module, "BENCH", tmp_path)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("run")


class Drawn:
    """Takes the pipeline's place; remembers how it was asked."""

    device = torch.device("cpu")
    config = types.SimpleNamespace(candidates=2)

    def __init__(self, database: Any) -> None:
        self.database, self.calls = database, list[dict[str, Any]]()

    def __call__(self, queries: torch.Tensor, **options: Any) -> Any:
        self.calls.append({"pictures": len(queries), **options})
        return types.SimpleNamespace(images=[np.full((8, 8, 3), number, np.uint8) for number in range(len(queries))])


def test_one_draw_without_a_choice_is_scored_beside_the_default(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiny_models.unit_rows(120)
    pipeline = Drawn(tiny_models.database(tmp_path, own))
    queries = torch.from_numpy(tiny_models.unit_rows(100, seed=1).astype(np.float32))
    settings = {"weights": "0" * 64, "defaults": {"candidates": 2}}
    scene = bench.Scene(
        encoder=types.SimpleNamespace(embed_pixels=lambda pixels: queries[: len(pixels)]),
        own=own.astype(np.float32),
        queries=queries,
        described=own[:100].astype(np.float32),
        yardstick=bench.ReferenceSet(real=own.astype(np.float32), threshold=0.9, resamples=10),
        nearest_real=0.5,
        studio=bench.Studio(pipeline, queries, settings),
    )
    monkeypatch.setattr(bench.Scene, "prepare", lambda samples, device, model: scene)
    monkeypatch.setattr(bench, "other_domains", list)
    result = bench.bench_generator(100, "cpu")
    assert (result["samples"], result["samples_no_knn"], result["samples_knn_one_draw"]) == (100, 96, 96)
    assert result["clip_score_knn_one_draw_low"] <= result["clip_score_knn_one_draw"] == pytest.approx(1)
    drawn = [call for call in pipeline.calls if "candidates" in call]
    asked = {(call["retrieve"], call["candidates"]): 0 for call in drawn}
    for call in drawn:
        asked[call["retrieve"], call["candidates"]] += call["pictures"]
    assert asked == {(True, None): 100, (False, None): 96, (True, 1): 96}


def test_an_eighth_is_drawn_without_neighbours_and_without_a_choice(bench: Any) -> None:
    assert bench.counts_of(2_000) == {"knn": 2_000, "no_knn": 250, "knn_one_draw": 250}
    assert bench.counts_of(64) == {"knn": 64, "no_knn": 64, "knn_one_draw": 64}


@pytest.mark.parametrize("told", ["0", "3", "-1", "many"])
def test_too_few_samples_are_refused(
    told: str, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "generator", f"--samples={told}"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert f"'{told}' is no number of samples; give at least 4" in capsys.readouterr().err


@pytest.mark.parametrize(("told", "named", "count"), [(None, True, 2_000), (None, False, 64), (4, True, 4)])
def test_as_many_samples_as_told(
    told: int | None, named: bool, count: int, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = types.SimpleNamespace(bench_generator=lambda samples, device: {"samples": samples})
    monkeypatch.setitem(sys.modules, "generator", counted)  # type: ignore[arg-type]
    assert run.benchmark("generator", told, named=named)() == {"samples": count}
