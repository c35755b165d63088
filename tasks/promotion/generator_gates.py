"""Gates of a generator: effect of the neighbours, encoder, and a paired comparison with the champion.

Legend: ``N`` samples, ``R`` resamples, ``D`` embedding width.

Both generators sample the same prompts from the same noise. The bootstrap resamples the prompts and
takes the difference of both scores in each resample. The difficulty of a prompt therefore cancels.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra.errors import EncoderMismatchError
from infra.promotions import GateResult
from model.metrics import embedding_metrics
from model.metrics.bootstrap import Score, Statistic, bootstrap_interval, groups_of, mean_of
from model.metrics.embedding_metrics import Embeddings, Values
from tasks.evaluate.config import EvaluateConfig
from tasks.evaluate.measure import EvaluationInputs, Evaluator
from tasks.promotion.config import GeneratorGates
from tasks.references.types import DatabaseVersion, Generator, domain_of, require_same_encoder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSamples:
    """Samples of one generator: embeddings (N, D) and, for each, the cosine to its nearest database image (N,)."""

    rows: Embeddings
    nearest: NDArray[np.floating]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Samples of the version and of the champion for the same queries.

    Attributes:
        queries: Embeddings (N, D) of the prompts.
        real: Embeddings (M, D) of real images.
        threshold: Cosine to the nearest database image above which a sample counts as a copy.
        version: Samples of the version.
        champion: Samples of the champion.
    """

    queries: Embeddings
    real: Embeddings
    threshold: float
    version: ScoredSamples
    champion: ScoredSamples


def neighbour_gate(scores: Mapping[str, float], limit: float) -> GateResult:
    """Compare the CLIP scores with and without neighbours, as recorded at registration."""
    knn, without = scores.get("clip_score_knn"), scores.get("clip_score_no_knn")
    if knn is None or without is None:
        detail = "CLIP scores with and without neighbours are not recorded; evaluate the generator"
        return GateResult(gate="neighbour_loss", passed=False, value=None, limit=limit, detail=detail)
    detail = f"CLIP score {knn:.4f} with neighbours, {without:.4f} without"
    loss = without - knn
    return GateResult(gate="neighbour_loss", passed=loss <= limit, value=loss, limit=limit, detail=detail)


def encoder_gate(generator: Generator, database: DatabaseVersion) -> GateResult:
    """Require that generator and database use the same encoder."""
    try:
        encoder = require_same_encoder(generator=generator.manifest(), database=database.manifest())
    except EncoderMismatchError as error:
        return GateResult(gate="encoder", passed=False, value=None, limit=None, detail=str(error))
    return GateResult(gate="encoder", passed=True, value=None, limit=None, detail=encoder.name)


def evaluation_config(gates: GeneratorGates, prompts: tuple[str, ...] = ()) -> EvaluateConfig:
    """Return the evaluation settings for a comparison with the champion."""
    return EvaluateConfig(samples=gates.samples, seed=gates.seed, bootstrap=0, prompts=prompts)


def compare(
    version: Generator, champion: Generator, database: DatabaseVersion, config: EvaluateConfig, cache: Path
) -> Comparison:
    """Sample both generators with the settings of ``config`` on the database."""
    samples = {}
    for name, generator in (("version", version), ("champion", champion)):
        inputs = EvaluationInputs(
            generator=generator, name=domain_of(database), database=database, others={}, config=config
        )
        evaluator = Evaluator(inputs, cache)
        rows, nearest = evaluator.scored_samples()
        samples[name] = ScoredSamples(rows=rows, nearest=nearest)
    queries, reference = evaluator.queries, evaluator.reference_set
    return Comparison(queries=queries, real=reference.real, threshold=reference.threshold, **samples)


def comparison_gates(found: Comparison, gates: GeneratorGates) -> tuple[GateResult, ...]:
    """Return the enabled gates that compare the version with the champion."""
    version, champion = found.version, found.champion
    compared = slice(len(found.real))  # as many samples as real images

    def clip(samples: ScoredSamples) -> Statistic:
        return mean_of(embedding_metrics.pair_cosines(samples.rows, found.queries))

    def distance(samples: ScoredSamples) -> Statistic:
        rows, weights = samples.rows[compared], np.ones(len(found.real))

        def statistic(counts: Values) -> Values:
            return np.array(
                [embedding_metrics.weighted_frechet(rows, one, found.real, weights) for one in counts[:, compared]]
            )

        return statistic

    def copies(samples: ScoredSamples) -> Statistic:
        return mean_of(samples.nearest > found.threshold)

    results = []
    for gate, limit, statistic, sign in (
        ("clip_score", gates.clip_score, clip, 1),
        ("distance", gates.distance, distance, -1),
        ("copy_rate", gates.copy_rate, copies, -1),
    ):
        if limit is not None:
            gain = paired_gain(statistic(version), statistic(champion), found.queries, gates, sign=sign)
            results.append(_not_worse(gate, gain, limit))
    return tuple(results)


def paired_gain(
    version: Statistic, champion: Statistic, queries: Embeddings, gates: GeneratorGates, *, sign: int
) -> Score:
    """Return the gain of the version over the champion and its interval. ``sign`` is -1 if smaller is better."""

    def gain(counts: Values) -> Values:
        return sign * (version(counts) - champion(counts))

    rng = np.random.default_rng(gates.seed)
    return bootstrap_interval(gain, groups_of(queries), resamples=gates.resamples, rng=rng)


def _not_worse(gate: str, gain: Score, limit: float) -> GateResult:
    """Return the result of a gate that passes if the lower bound of the gain is above ``-limit``."""
    low = gain.value if gain.low is None else gain.low
    detail = f"gain {gain.value:+.4f} over the champion, lower bound {low:+.4f}"
    return GateResult(gate=gate, passed=low > -limit, value=low, limit=-limit, detail=detail)
