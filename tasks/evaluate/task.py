"""Evaluate: how well samples fit their prompts and the database's domain, with neighbours and without."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from infra import artifacts, compute, storage
from infra.errors import InputError
from tasks.evaluate.measure import SAMPLES, EvaluateConfig, EvaluationInputs, measure
from tasks.evaluate.sampler import ABLATIONS
from tasks.evaluate.tables import table, table_line
from tasks.references.types import (
    DatabaseVersion,
    Generator,
    Reference,
    StageResult,
    config_to_dict,
    domain_of,
    require_same_encoder,
)
from tasks.stage import run_stage, stage_task

__all__ = ["EvaluateConfig", "Evaluation", "evaluate", "table", "table_line"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Reference):
    """``scores.csv``, the samples, and the worst copies beside their sources. Rows are samples of each condition."""

    kind: ClassVar[str] = "evaluation"

    def scores(self) -> dict[str, float]:
        """METRIC_knn, METRIC_no_knn, each with _low and _high, and what real pictures score.

        METRIC is clip_score, fd, mmd, precision, recall, nearest (mean cosine to the nearest stored picture),
        copy_rate, diversity (with neighbours only), and fid where there were weights (without an interval). Real
        pictures have nearest_real, clip_score_real where the config names the picture of each prompt, and, from
        another set of as many, fd_real_split, mmd_real_split and copy_rate_real, if the database has 8 or more.

        fd, mmd, fid, precision and recall are of ``info["compared"]`` pictures on each side: as many as samples, at
        most half of the database, so that two sets of real pictures are compared at the same number.
        """
        return dict(self.manifest().info["scores"])

    def ablations(self) -> dict[str, dict[str, float]]:
        """The scores of each ablation by its name (no_neighbours, query_…, k_…); empty when none was asked for."""
        found = self.manifest().info["ablations"]
        return {name: found[name] for name in ABLATIONS if name in found}  # JSON has sorted them by name

    def swap(self) -> dict[str, float]:
        """Fréchet distance of the samples to each domain, its own among them; empty when no other was given."""
        return dict(self.manifest().info["swap"])


@stage_task(name="evaluate")
def evaluate(
    generator: Generator,
    database: DatabaseVersion,
    base: str,
    config: EvaluateConfig,
    *,
    cache: Path,
    others: Mapping[str, DatabaseVersion] | None = None,
) -> StageResult[Evaluation]:
    """Draw ``config.samples`` pictures with neighbours and as many without, and score both by every metric.

    Without prompts, pictures of the database stand in as queries; each finds itself, so the CLIP score is then one of
    reconstruction. ``others`` are further domains, by name, that the samples are held against: a row of
    the swap matrix.

    Raises:
        EncoderMismatchError: two of the databases were made by different encoders; both are named.
        InputError: there are no Inception weights where the config says.
    """
    others = dict(sorted((others or {}).items()))
    name = domain_of(database)
    require_same_encoder(**{label: version.manifest() for label, version in {name: database, **others}.items()})
    inputs = {"generator": generator.as_input(), "database": database.as_input()}
    inputs |= {f"other.{name}": other.as_input() for name, other in others.items()} | _weights_input(config)
    asked = config_to_dict(config, without=("use_gpu", "inception_weights"))
    stage = artifacts.ArtifactBuilder(base, Evaluation.kind, inputs=inputs, config=asked)
    subject = EvaluationInputs(generator=generator, name=name, database=database, others=others, config=config)

    def make() -> artifacts.Manifest:
        done = stage.done().get(SAMPLES) or compute.run(
            measure, subject, stage.uri, cache, cpus=compute.cpus(), gpus=int(config.use_gpu), watch=stage.uri
        )
        return stage.commit([done], info=done.info)

    return run_stage(stage, Evaluation, make, note=lambda manifest: table_line(manifest.info["scores"]))


def _weights_input(config: EvaluateConfig) -> dict[str, dict[str, str]]:
    """The Inception weights by what they hold, not by where they lie."""
    uri = config.inception_weights
    if uri is None:
        return {}
    if not storage.exists(uri):
        raise InputError(
            f"there are no Inception weights at {uri}; give the path of torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth, or leave it out"
        )
    return {"inception": {"uri": uri, "digest": storage.sha256(uri)}}
