"""Measurement: generate and score the samples of every condition, on a worker.

Legend: ``N`` samples, ``D`` embedding width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, storage
from infra.compute.progress import Progress
from infra.errors import InputError
from infra.uris import normal_url
from model.images import image_grid
from model.metrics import embedding_metrics
from model.metrics.bootstrap import Score
from model.metrics.embedding_metrics import Embeddings
from model.metrics.inception import inception_distance, require_inception
from model.metrics.scores import ReferenceSet, flatten, score_mean, score_samples
from model.pipeline import KNNDiffusionPipeline
from model.retrieval.database import Database
from model.saved_generator import pretrained_folder
from tasks.evaluate.config import MIN_COMPARED, SAMPLES, EvaluateConfig
from tasks.evaluate.sampler import ABLATIONS, MAIN, Condition, Sampler, embed_unique, queries_of, row_ids_at
from tasks.references.database import open_database
from tasks.references.generator import generator_folder
from tasks.references.images import fetch_images, with_stored_images
from tasks.references.types import DatabaseVersion, Generator, encoder_of

SHOWN = 64
"""Images of each condition that are stored for the report."""
WORST_COPIES = 10
"""Samples closest to a database image that are stored for the report."""
_DESCRIBED_ROWS = 1 << 14
_SPACING_NEIGHBOURS = 32
"""Neighbours searched for the nearest distinct one: more than an image usually has variants."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationInputs:
    """Generator and database to evaluate, and the other domains that the samples are compared with."""

    generator: Generator
    name: str  # name of the database
    database: DatabaseVersion
    others: Mapping[str, DatabaseVersion]
    config: EvaluateConfig


def pipeline_folder(generator: Generator, cache: Path) -> Path:
    """Return the local pipeline folder of a generator. A plain pipeline folder, e.g. a bundled one, is not copied."""
    plain = pretrained_folder(generator.uri)
    return plain if (plain / "model_index.json").exists() else generator_folder(generator, cache)


def measure(subject: EvaluationInputs, folder_uri: str, cache: Path) -> artifacts.Shard:
    """Generate, embed and score the samples. Commit the scores and the images for the report."""
    weights = _weights(subject.config, cache)
    worker = Evaluator(subject, cache, Progress(folder_uri, "step"))
    with storage.scratch() as folder:
        scores = worker.main(folder, weights)
        info: dict[str, Any] = {
            "scores": scores,
            "ablations": worker.ablations() if subject.config.ablations else {},
            "swap": worker.swap(),
            "compared": worker.compared,
            "copies": worker.copies(folder),
            "copy_threshold": worker.reference_set.threshold,
            "shown": worker.labels[:SHOWN],
            "encoder": dataclasses.asdict(encoder_of(subject.database.manifest())),
        }
        lines = [f"{name},{value:.6f}" for name, value in sorted(scores.items())]
        (folder / "scores.csv").write_text("\n".join(["metric,value", *lines, ""]))
        return artifacts.commit_shard(folder_uri, SAMPLES, folder, rows=subject.config.samples, info=info)


class Evaluator:
    """Evaluation of one generator on one database. The samples of each condition are generated once."""

    def __init__(
        self,
        subject: EvaluationInputs,
        cache: Path,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        """Open the databases and the generator of ``subject``.

        ``on_progress`` is called with (label, step, total steps). Default: no progress.
        """
        self._subject, self._config, self._cache = subject, subject.config, cache
        versions = {subject.name: subject.database, **subject.others}
        self._opened = {name: open_database(version, cache) for name, version in versions.items()}
        for name, opened in self._opened.items():
            if len(opened) < MIN_COMPARED:
                raise InputError(
                    f"database {name} is too small to evaluate: {len(opened)} images; "
                    f"use one with at least {MIN_COMPARED}"
                )
        for name, version in versions.items():
            self._opened[name] = with_stored_images(self._opened[name], version, cache)
        self._database = self._opened[subject.name]
        self._pipeline = KNNDiffusionPipeline.open(pipeline_folder(subject.generator, cache), self._database)
        subject.generator.require_known(self._pipeline.identity)
        if self._config.use_gpu:
            self._pipeline.to("cuda")
        config = self._config
        queries, self.labels = queries_of(self._pipeline, self._database, config.prompts, config.samples, config.seed)
        self._sampler = Sampler(
            self._pipeline,
            queries,
            steps=config.steps,
            guidance=config.guidance,
            seed=config.seed,
            on_progress=on_progress,
        )
        self._scores: dict[Condition, dict[str, Score]] = {}
        # Two disjoint sets of real images of the compared size; a very small database has only one.
        half = len(self._database) // 2
        self.compared = count = min(config.samples, half if half >= MIN_COMPARED else len(self._database))
        self._real_ids = random_rows(self._database, 2 * count, self._config.seed)
        real = self._database.rows(self._real_ids).astype(np.float32)
        near = self._database.search(real, 1, exclude=self._real_ids).scores[:, 0]
        self._held_out, self._real_near = real[count:], near
        self.reference_set = ReferenceSet(
            real=real[:count],
            threshold=embedding_metrics.copy_threshold(near[:count], config.copy_percentile, config.near_duplicate),
            resamples=self._config.bootstrap,
            seed=self._config.seed,
        )

    def main(self, folder: Path, weights: Path | None) -> dict[str, float]:
        """Return the scores with and without neighbours, and of real images. Save the sample sheets to ``folder``."""
        scores = self._real_scores()
        for name, condition in MAIN.items():
            images, _ = self._sampler(condition)
            scores |= flatten(self._scored(condition), name)
            image_grid(images[:SHOWN]).save(folder / f"{name}.png")
            if weights is not None:
                real = fetch_images(self._subject.database, self._real_ids[: self.compared].tolist(), self._cache)
                compared = images[: self.compared]
                scores[f"fid_{name}"] = inception_distance(compared, real, weights, cuda=self._config.use_gpu)
        return scores | flatten({"diversity": self._diversity()}, "knn")

    @property
    def queries(self) -> Embeddings:
        """The query embedding (N, D) of each sample."""
        return self._sampler.queries.numpy()

    def scored_samples(self) -> tuple[Embeddings, NDArray[np.floating]]:
        """Return the embeddings (N, D) of the samples with neighbours, and their cosines (N,) to the nearest image."""
        _, rows = self._sampler(Condition())
        return rows, self._database.search(rows, 1).scores[:, 0]

    def ablations(self) -> dict[str, dict[str, float]]:
        """Return the scores of every ablation, by name."""
        return {name: flatten(self._scored(condition)) for name, condition in ABLATIONS.items()}

    def swap(self) -> dict[str, float]:
        """Return the Fréchet distance of the samples to each domain, at equal numbers of rows; empty for one domain."""
        if not self._subject.others:
            return {}
        count = min(self._config.samples, *(len(database) for database in self._opened.values()))
        _, rows = self._sampler(Condition())
        return {
            name: embedding_metrics.frechet_distance(rows[:count], _some_rows(database, count, self._config.seed))
            for name, database in self._opened.items()
        }

    def copies(self, folder: Path) -> list[dict[str, Any]]:
        """Save the samples closest to a database image, with their sources, to ``folder``/copies; closest first."""
        images, rows = self._sampler(Condition())
        hits = self._database.search(rows, 1)
        worst = np.argsort(-hits.scores[:, 0], kind="stable")[:WORST_COPIES].tolist()
        ids = hits.ids[worst, 0].tolist()
        sources = fetch_images(self._subject.database, ids, self._cache)
        (folder / "copies").mkdir()
        entries = []
        for rank, (number, source, row) in enumerate(zip(worst, sources, self._database.describe(ids), strict=True)):
            images[number].save(folder / "copies" / f"{rank:02d}_sample.png")
            source.save(folder / "copies" / f"{rank:02d}_source.png")
            cosine = float(hits.scores[number, 0])
            details = {"prompt": self.labels[number], "row": row["id"], "url": row["url"]}
            entries.append({"cosine": cosine, "copy": cosine > self.reference_set.threshold, **details})
        return entries

    def _scored(self, condition: Condition) -> dict[str, Score]:
        key = self._sampler.resolved(condition)
        if key not in self._scores:
            _, rows = self._sampler(condition)
            hits = self._database.search(rows, 1)
            self._scores[key] = score_samples(
                rows,
                self._sampler.queries.numpy(),
                hits.scores[:, 0],
                self.reference_set,
                spacing=self._spacing(hits.ids[:, 0]),
            )
        return self._scores[key]

    def _spacing(self, ids: NDArray[np.int64], without: NDArray[np.int64] | None = None) -> NDArray[np.floating]:
        """Return the cosine (N,) of images to their nearest distinct one, which is none of ``without`` (N,)."""
        count = min(_SPACING_NEIGHBOURS, len(self._database) - 1)
        found = self._database.search(self._database.rows(ids).astype(np.float32), count, exclude=ids)
        scores = found.scores if without is None else np.where(found.ids == without[:, None], -np.inf, found.scores)
        return embedding_metrics.distinct_nearest(scores, self._config.near_duplicate)

    def _diversity(self) -> Score:
        """Return the diversity over ``seeds`` images of each of the first prompts."""
        rows = self._sampler.seeds(Condition(), self._config.diversity_prompts, self._config.seeds)
        queries = self._sampler.queries[: len(rows)].numpy()
        return score_mean(embedding_metrics.prompt_diversity(rows), queries, self.reference_set, bounds=(0.0, 2.0))

    def _real_scores(self) -> dict[str, float]:
        """Return the scores of real images.

        If there are enough rows, a second set is compared with the first. If the images of prompts are known, their
        CLIP score is measured.
        """
        distinct = self._real_near[np.isfinite(self._real_near)]
        scores = {"nearest_real": float(distinct.mean())} if len(distinct) else {}
        if len(self._held_out) == self.compared:
            scores["fd_real_split"] = embedding_metrics.frechet_distance(self._held_out, self.reference_set.real)
            scores["mmd_real_split"] = embedding_metrics.mmd_distance(self._held_out, self.reference_set.real)
            scores["copy_rate_real"] = embedding_metrics.copy_rate(
                self._real_near[self.compared :], self.reference_set.threshold
            )
            own = self._real_ids[self.compared :]
            hits = self._database.search(self._held_out, 1, exclude=own)
            known = hits.ids[:, 0] >= 0  # an image may have only exact copies
            if known.any():
                spacing = self._spacing(hits.ids[known, 0], without=own[known])
                scores["authenticity_real"] = float(embedding_metrics.authentic(hits.scores[known, 0], spacing).mean())
            scores["coverage_real_split"] = embedding_metrics.coverage(self._held_out, self.reference_set.real)
        if self._config.prompt_urls:
            scores |= flatten(self._real_clip_score(), "real")
        return scores

    def _real_clip_score(self) -> dict[str, Score]:
        """Return the CLIP score of database images with the prompts that describe them; empty if there are none."""
        wanted = dict(zip(map(normal_url, self._config.prompt_urls), self._config.prompts, strict=True))
        texts_by_row = {row: wanted[url] for row, url in urls_of(self._database) if url in wanted}
        if not texts_by_row:
            return {}
        rows = self._database.rows(np.array(list(texts_by_row))).astype(np.float32)
        texts = embed_unique(self._pipeline, list(texts_by_row.values())).numpy()
        return {
            "clip_score": score_mean(
                embedding_metrics.pair_cosines(rows, texts), texts, self.reference_set, bounds=(-1.0, 1.0)
            )
        }


def random_rows(database: Database, wanted: int, seed: int) -> NDArray[np.int64]:
    """Return ids (m,) int64 of up to ``wanted`` distinct rows that are not hidden."""
    rng = np.random.default_rng(seed + 1)
    return row_ids_at(database, rng.choice(len(database), min(wanted, len(database)), replace=False))


def urls_of(database: Database) -> Iterator[tuple[int, str]]:
    """Yield the id and normal URL of every row that is not hidden. Metadata is read in batches."""
    ids = database.ids()
    for start in range(0, len(ids), _DESCRIBED_ROWS):
        for row in database.describe(ids[start : start + _DESCRIBED_ROWS].tolist()):
            yield row["id"], normal_url(row["url"])


def _some_rows(database: Database, count: int, seed: int) -> Embeddings:
    return database.rows(random_rows(database, count, seed)).astype(np.float32)


def _weights(config: EvaluateConfig, cache: Path) -> Path | None:
    """Return a local copy of the Inception weights. Raises ``InputError`` before any image is generated."""
    if config.inception_weights is None:
        return None
    if not storage.exists(config.inception_weights):
        path = Path(config.inception_weights)
    else:
        path = storage.fetch(config.inception_weights, cache / "inception" / Path(config.inception_weights).name)
    require_inception(path)
    return path
