"""Tests of the gates of a generator, on synthetic samples."""

import dataclasses

import numpy as np
import pytest
from support.tiny_models import unit

from tasks.promotion.config import GeneratorGates
from tasks.promotion.generator_gates import Comparison, ScoredSamples, comparison_gates, neighbour_gate

N, D = 64, 16
GATES = GeneratorGates(resamples=200)


def comparison(*, noise: float = 0.0, copied: int = 0) -> Comparison:
    """Return samples of a champion, and of a version with ``noise`` added and ``copied`` more copies."""
    rng = np.random.default_rng(0)
    queries = unit(rng.normal(size=(N, D)))
    rows = unit(queries + rng.normal(size=(N, D)) / 4)
    worse = unit(rows + noise * rng.normal(size=(N, D)))
    champion = ScoredSamples(rows=rows, nearest=np.full(N, 0.5))
    version = ScoredSamples(rows=worse, nearest=np.where(np.arange(N) < copied, 0.99, 0.5))
    real = unit(rng.normal(size=(N, D)))
    return Comparison(queries=queries, real=real, threshold=0.9, version=version, champion=champion)


def failed(found: Comparison, gates: GeneratorGates = GATES) -> set[str]:
    return {gate.gate for gate in comparison_gates(found, gates) if not gate.passed}


def test_comparison_with_equal_samples_passes_every_gate() -> None:
    assert [gate.gate for gate in comparison_gates(comparison(), GATES)] == ["clip_score", "distance", "copy_rate"]
    assert failed(comparison()) == set()


def test_comparison_with_noisier_samples_fails_the_clip_score() -> None:
    assert "clip_score" in failed(comparison(noise=1.0))
    allowed = dataclasses.replace(GATES, clip_score=1.0, distance=8.0)
    assert failed(comparison(noise=1.0), allowed) == set()


def test_comparison_with_more_copies_fails_the_copy_rate_only() -> None:
    assert failed(comparison(copied=16)) == {"copy_rate"}


def test_comparison_pairs_the_prompts() -> None:
    """Between prompts the scores vary far more than between generators; only paired differences have a small bound."""
    (clip, *_) = comparison_gates(comparison(noise=0.02), GATES)
    assert clip.value is not None
    assert clip.value > -0.01
    assert clip.passed


@pytest.mark.parametrize(
    ("scores", "passed"),
    [
        ({"clip_score_knn": 0.3, "clip_score_no_knn": 0.2}, True),
        ({"clip_score_knn": 0.2, "clip_score_no_knn": 0.3}, False),
        ({}, False),
    ],
)
def test_neighbour_gate_refuses_neighbours_that_lower_the_clip_score(scores: dict[str, float], passed: bool) -> None:
    assert neighbour_gate(scores, 0.0).passed is passed


def test_generator_gates_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="copy_rate is out of range"):
        GeneratorGates(copy_rate=1.5)
