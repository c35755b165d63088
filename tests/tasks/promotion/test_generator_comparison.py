"""The paired comparison of two real generators: each samples the same prompts from the same noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import stirred

from model.pipeline import KNNDiffusionPipeline
from tasks.promotion.config import GeneratorGates
from tasks.promotion.generator_gates import compare, comparison_gates, evaluation_config
from tasks.references.domain_folder import DomainFolder
from tasks.references.generator import generator_folder
from tasks.references.types import Generator
from tasks.train.adopt import adopt

GATES = GeneratorGates(samples=8, resamples=100)


@pytest.fixture
def generators(domain: Any, tmp_path: Path) -> tuple[Generator, Generator]:
    """The generator that the domain trained, and a copy with perturbed weights."""
    trained: Generator = domain.result.trained.generator.reference
    pipeline = KNNDiffusionPipeline.open(generator_folder(trained, tmp_path / "cache"))
    stirred(pipeline.transformer)
    pipeline.save_pretrained(tmp_path / "stirred")
    worse = adopt(str(tmp_path / "stirred"), DomainFolder(uri=str(tmp_path / "root" / "shapes")))
    return trained, worse.reference


def test_compare_of_two_generators_is_paired_and_antisymmetric(
    domain: Any, generators: tuple[Generator, Generator], tmp_path: Path
) -> None:
    trained, worse = generators
    database, config = domain.result.database.reference, evaluation_config(GATES)
    found = compare(worse, trained, database, config, tmp_path / "cache")
    turned = compare(trained, worse, database, config, tmp_path / "cache")
    np.testing.assert_array_equal(found.version.rows, turned.champion.rows)
    np.testing.assert_array_equal(found.queries, turned.queries)
    assert not np.array_equal(found.version.rows, found.champion.rows)
    loss, gain = (comparison_gates(one, GATES) for one in (found, turned))
    assert [gate.gate for gate in loss] == ["clip_score", "distance", "copy_rate"]
    values = [float(gate.detail.split()[1]) for gate in loss]
    assert values == pytest.approx([-float(gate.detail.split()[1]) for gate in gain], abs=2e-4)
    assert any(values)

    assert not list(Path(database.uri).rglob("progress.json")), "a database is not written to"

    same = compare(trained, trained, database, config, tmp_path / "cache")
    assert all(gate.passed and gate.value == 0 for gate in comparison_gates(same, GATES)), "the noise is not the same"
