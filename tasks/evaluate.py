"""Evaluate: how well samples fit their prompts and the database's domain, with neighbours and without."""

import csv
import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from infra import artifacts, compute, storage
from model import metrics
from model.pipeline import KNNDiffusionPipeline
from tasks.contracts import DatabaseVersion, Generator, Outcome, Reference, config_of, encoder_of
from tasks.index import open_database
from tasks.stage import skip_or_make, stage_task
from tasks.train import generator_folder

SAMPLES = "samples"
_CONDITIONS = {"knn": True, "no_knn": False}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is drawn for the measurement."""

    prompts: tuple[str, ...] = ()
    samples: int = 256
    steps: int = 12
    guidance: float = 2.0
    seed: int = 0
    use_gpu: bool = False

    def __post_init__(self) -> None:
        """Refuse a sample too small for a covariance."""
        if self.samples < 2:
            raise ValueError("samples must be at least 2: a Fréchet distance needs a covariance")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Reference):
    """``scores.csv`` and the samples. Rows are samples of each condition."""

    kind: ClassVar[str] = "evaluation"

    def scores(self) -> dict[str, float]:
        """clip_score_… and fd_… of each condition, and what real pictures score."""
        return dict(self.manifest().info["scores"])


def evaluate_generator(
    generator: Generator, database: DatabaseVersion, base: str, config: EvaluateConfig, *, cache: Path
) -> Outcome[Evaluation]:
    """Draw ``config.samples`` pictures with neighbours and as many without, and score both in one table.

    Without prompts, pictures of the database stand in as queries; each finds itself, so the CLIP score is then one of
    reconstruction.
    """
    inputs = {"generator": generator.as_input(), "database": database.as_input()}
    stage = artifacts.Stage(base, Evaluation.kind, inputs=inputs, config=config_of(config, without=("use_gpu",)))

    def make() -> artifacts.Manifest:
        done = stage.done().get(SAMPLES) or compute.run(
            _evaluate, generator, database, stage.uri, config, cache, cpus=compute.cpus(), gpus=int(config.use_gpu)
        )
        return stage.commit([done], info=done.info)

    return skip_or_make(stage, Evaluation, make, note=lambda manifest: table_line(manifest.info["scores"]))


def table(scores: dict[str, float]) -> str:
    """The scores as the one table: a row a condition."""
    lines = ["                    CLIP score ↑   Fréchet distance ↓"]
    for label, name in (("with neighbours", "knn"), ("without neighbours", "no_knn")):
        lines.append(f"{label:18}  {scores[f'clip_score_{name}']:12.3f}   {scores[f'fd_{name}']:18.3f}")
    if "fd_real_split" in scores:
        lines.append(f"{'real pictures':18}  {'':12}   {scores['fd_real_split']:18.3f}")
    return "\n".join(lines)


def table_line(scores: dict[str, float]) -> str:
    """The same in one clause."""
    return (
        f"CLIP score {scores['clip_score_knn']:.3f} with neighbours, {scores['clip_score_no_knn']:.3f} without; "
        f"Fréchet distance {scores['fd_knn']:.3f} and {scores['fd_no_knn']:.3f}"
    )


def _evaluate(
    generator: Generator, version: DatabaseVersion, folder_uri: str, config: EvaluateConfig, cache: Path
) -> artifacts.Shard:
    """Sample, embed, score; on a worker."""
    database = open_database(version, cache)
    pipeline = KNNDiffusionPipeline.open(generator_folder(generator, cache), database)
    if config.use_gpu:
        pipeline.to("cuda")
    queries = _queries(pipeline, config)
    real = _real_rows(len(database), config)
    reference = database.rows(real[: config.samples]).astype(np.float32)
    split = database.rows(real[config.samples :]).astype(np.float32)
    scores = {"fd_real_split": metrics.frechet_distance(split, reference)} if len(split) > 1 else {}
    with storage.scratch() as folder:
        for name, retrieve in _CONDITIONS.items():
            images = _draw(pipeline, queries, config, retrieve, name)
            rows = pipeline.encoder.embed_images([image.convert("RGB") for image in images]).numpy()
            scores[f"clip_score_{name}"] = metrics.clip_score(rows, queries.numpy())
            scores[f"fd_{name}"] = metrics.frechet_distance(rows, reference)
            contact_sheet(images[:64]).save(folder / f"{name}.png")
        (folder / "scores.csv").write_text(_csv(scores))
        info: dict[str, Any] = {"scores": scores, "encoder": dataclasses.asdict(encoder_of(version.manifest()))}
        return artifacts.commit_shard(folder_uri, SAMPLES, folder, rows=config.samples, info=info)


def _queries(pipeline: KNNDiffusionPipeline, config: EvaluateConfig) -> torch.Tensor:
    """(samples, D): the prompts' embeddings in order, over and over; without prompts, random database rows."""
    if config.prompts:
        embedded = pipeline.encoder.embed_texts(config.prompts)
        return embedded[torch.arange(config.samples) % len(embedded)]
    rows = np.random.default_rng(config.seed).choice(len(pipeline.database), config.samples)
    return torch.from_numpy(pipeline.database.rows(rows).astype(np.float32))


def _real_rows(count: int, config: EvaluateConfig) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Up to twice ``samples`` random rows: the domain's reference, and a second set to compare it with itself."""
    return np.random.default_rng(config.seed + 1).permutation(count)[: 2 * config.samples]


def _draw(
    pipeline: KNNDiffusionPipeline, queries: torch.Tensor, config: EvaluateConfig, retrieve: bool, name: str
) -> list[Image.Image]:
    with tqdm(desc=f"evaluate {name}", unit="step", leave=False) as progress:

        def told(step: int, steps: int) -> None:
            progress.total = steps
            progress.update(step - progress.n)

        return list(
            pipeline(
                queries,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                generator=torch.Generator().manual_seed(config.seed),
                retrieve=retrieve,
                callback=told,
            ).images
        )


def contact_sheet(images: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Pictures of one size in rows of ``columns``."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for image, (row, column) in zip(images, itertools.product(range(len(images)), range(columns)), strict=False):
        sheet.paste(image, (column * width, row * height))
    return sheet


def _csv(scores: dict[str, float]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["metric", "value"])
    writer.writerows((name, f"{value:.6f}") for name, value in sorted(scores.items()))
    return buffer.getvalue()


@stage_task(name="evaluate")
def evaluate(
    generator: Generator, database: DatabaseVersion, base: str, config: EvaluateConfig, cache: Path
) -> Outcome[Evaluation]:
    """Task of :func:`evaluate_generator`."""
    return evaluate_generator(generator, database, base, config, cache=cache)
