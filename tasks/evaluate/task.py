"""Evaluate stage: measure how well samples fit their prompts and the domain, with and without neighbours."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from infra import artifacts, compute, storage
from infra.errors import InputError
from tasks.evaluate.config import SAMPLES, EvaluateConfig
from tasks.evaluate.tables import table, table_line
from tasks.references.domain_folder import DomainFolder
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
    """Evaluation artifact: ``scores.csv``, samples, and the worst copies with their sources.

    ``rows`` is the number of samples per condition.
    """

    kind: ClassVar[str] = "evaluation"

    def scores(self) -> dict[str, float]:
        """Return METRIC_knn and METRIC_no_knn, each with _low and _high, and the scores of real images.

        METRIC is clip_score, fd, mmd, precision, recall, coverage, nearest (mean cosine to the nearest stored image),
        copy_rate, authenticity, diversity (with neighbours only), and fid if Inception weights were given (without an
        interval). Real images have nearest_real, and clip_score_real if the config names the image of each prompt. If
        the database has 8 or more images, a second set of the same size gives fd_real_split, mmd_real_split,
        coverage_real_split, copy_rate_real and authenticity_real. Earlier evaluations have no coverage and no
        authenticity.

        fd, mmd, fid, precision, recall and coverage use ``info["compared"]`` images on each side: the number of
        samples, at most half of the database. Two sets of real images are compared at the same size.
        """
        return dict(self.manifest().info["scores"])

    def sheet(self, cache: Path) -> Path:
        """Return a local image of samples with neighbours."""
        (shard,) = (shard for shard in self.manifest().shards if shard.name == SAMPLES)
        (file,) = (file for file in shard.files if file.name == "knn.png")
        return artifacts.fetch_file(shard.folder or self.uri, file, cache)

    def ablations(self) -> dict[str, dict[str, float]]:
        """Return the scores by ablation (no_neighbours, query_…, k_…); empty if no ablations were measured."""
        from tasks.evaluate.sampler import ABLATIONS

        found = self.manifest().info["ablations"]
        return {name: found[name] for name in ABLATIONS if name in found}  # the manifest's JSON is sorted by name

    def swap(self) -> dict[str, float]:
        """Return the Fréchet distance of the samples to each domain, its own included; empty without other domains."""
        return dict(self.manifest().info["swap"])


@stage_task(name="evaluate")
def evaluate(
    generator: Generator,
    database: DatabaseVersion,
    folder: DomainFolder,
    config: EvaluateConfig,
    *,
    others: Mapping[str, DatabaseVersion] | None = None,
) -> StageResult[Evaluation]:
    """Generate ``config.samples`` images with neighbours and as many without, and score both with every metric.

    Without prompts, images of the database are the queries. Each retrieves itself, so the CLIP score then measures
    reconstruction.

    Args:
        generator: Generator to evaluate.
        database: Database to retrieve from.
        folder: Folder of the domain.
        config: Settings.
        others: Further domains to compare the samples with, by name: a row of the swap matrix. Default: none.

    Raises:
        EncoderMismatchError: Two databases use different encoders; the message names both.
        InputError: There are no Inception weights at the location in the config.
    """
    from tasks.evaluate.measure import EvaluationInputs, measure

    others = dict(sorted((others or {}).items()))
    name = domain_of(database)
    require_same_encoder(**{label: version.manifest() for label, version in {name: database, **others}.items()})
    inputs = {"generator": generator.as_input(), "database": database.as_input()}
    inputs |= {f"other.{name}": other.as_input() for name, other in others.items()} | _weights_input(config)
    settings = config_to_dict(config, without=("use_gpu", "inception_weights"))
    stage = artifacts.ArtifactBuilder(folder.uri, Evaluation.kind, inputs=inputs, config=settings)
    subject = EvaluationInputs(generator=generator, name=name, database=database, others=others, config=config)

    def make() -> artifacts.Manifest:
        done = stage.committed_shards().get(SAMPLES) or compute.run(
            measure, subject, stage.uri, folder.cache, cpus=compute.cpus(), gpus=int(config.use_gpu), watch=stage.uri
        )
        return stage.commit([done], info=done.info)

    return run_stage(stage, Evaluation, make, note=lambda manifest: table_line(manifest.info["scores"]))


def _weights_input(config: EvaluateConfig) -> dict[str, dict[str, str]]:
    """Return the Inception weights as a manifest input; the key depends on their content, not on their location."""
    uri = config.inception_weights
    if uri is None:
        return {}
    if not storage.exists(uri):
        raise InputError(
            f"Inception weights not found: {uri}; give the path of torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth, or omit it"
        )
    return {"inception": {"uri": uri, "digest": storage.sha256(uri)}}
