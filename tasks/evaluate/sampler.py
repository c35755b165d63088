"""Generation of the images of each condition. Each condition is generated once.

Legend: ``N`` samples, ``S`` seeds, ``D`` embedding width.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.generation.condition import QuerySlot
from model.metrics.embedding_metrics import Embeddings
from model.pipeline import KNNDiffusionPipeline
from model.retrieval.database import Database


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """Condition under which samples are generated. None is the generator's default."""

    retrieve: bool = True
    query: QuerySlot | None = None
    neighbours: int | None = None

    def __str__(self) -> str:
        """Return the label for the progress bar."""
        return f"query {self.query}, k = {self.neighbours}" if self.retrieve else "without neighbours"


MAIN = {"knn": Condition(), "no_knn": Condition(retrieve=False)}
ABLATIONS = {
    "no_neighbours": Condition(retrieve=False),
    "query_none": Condition(query="none"),
    "query_text": Condition(query="text"),
    "query_mean": Condition(query="mean"),
    "query_both": Condition(query="both"),
    **{f"k_{k}": Condition(neighbours=k) for k in (1, 4, 10, 20)},
}


class Sampler:
    """Generator of images and their embeddings by condition. Results are cached in memory."""

    def __init__(
        self,
        pipeline: KNNDiffusionPipeline,
        queries: Tensor,
        *,
        steps: int | None,
        guidance: float | None,
        seed: int,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        """Create a sampler. The noise is the same for all conditions.

        Args:
            pipeline: Generator and database.
            queries: (N, D) query embeddings.
            steps: Number of sampling steps. None: the generator's default.
            guidance: Guidance scale. None: the generator's default.
            seed: Seed of the noise.
            on_progress: Called with (label, step, total steps). Default: no progress.
        """
        self._pipeline, self.queries, self._on_progress = pipeline, queries, on_progress
        self._steps, self._guidance, self._seed = steps, guidance, seed
        self._samples: dict[Condition, tuple[list[Image.Image], Embeddings]] = {}

    def __call__(self, condition: Condition) -> tuple[list[Image.Image], Embeddings]:
        """Return N images and their embeddings (N, D)."""
        key = self.resolved(condition)
        if key not in self._samples:
            self._samples[key] = self._generate(self.queries, key, 1)
        return self._samples[key]

    def seeds(self, condition: Condition, prompts: int, each: int) -> Embeddings:
        """Return embeddings (prompts, S, D): S = ``each`` images of each of the first queries, from different noise."""
        _, rows = self._generate(self.queries[:prompts], self.resolved(condition), each)
        return rows.reshape(-1, each, rows.shape[1])

    def resolved(self, condition: Condition) -> Condition:
        """Fill in the generator's defaults, so that equal conditions are generated only once."""
        if not condition.retrieve:
            return Condition(retrieve=False, query=condition.query or "text")
        defaults = self._pipeline.config
        return Condition(
            query=condition.query or defaults.query, neighbours=condition.neighbours or defaults.neighbours
        )

    def _generate(self, queries: Tensor, condition: Condition, each: int) -> tuple[list[Image.Image], Embeddings]:
        output = self._pipeline(
            queries,
            num_images_per_prompt=each,
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            generator=torch.Generator().manual_seed(self._seed),
            on_progress=lambda step, steps: self._on_progress(
                f"generate {len(queries) * each}, {condition}", step, steps
            ),
            **dataclasses.asdict(condition),
        )
        images = list(output.images)
        return images, self._pipeline.encoder.embed_images([image.convert("RGB") for image in images]).numpy()


def queries_of(
    pipeline: KNNDiffusionPipeline, database: Database, prompts: Sequence[str], samples: int, seed: int
) -> tuple[Tensor, list[str]]:
    """Return query embeddings (N, D) and their texts, N = ``samples``.

    Prompts are used in random order, each once before any is repeated. Without prompts, the queries are random rows of
    ``database``, and their texts are empty.
    """
    rng = np.random.default_rng(seed)
    if prompts:
        order = np.resize(rng.permutation(len(prompts)), samples).tolist()
        texts = [prompts[number] for number in order]
        return embed_unique(pipeline, texts), texts
    rows = row_ids_at(database, rng.choice(len(database), samples))
    return torch.from_numpy(database.rows(rows).astype(np.float32)), [""] * samples


def embed_unique(pipeline: KNNDiffusionPipeline, texts: Sequence[str]) -> Tensor:
    """Embed texts as (N, D). Equal texts get bitwise equal rows, so the bootstrap can group samples by prompt."""
    positions = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    return pipeline.encoder.embed_texts(list(positions))[[positions[text] for text in texts]]


def row_ids_at(database: Database, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ids at ``positions`` of :meth:`Database.ids`, which is called only if rows are hidden."""
    return positions if len(database) == database.stored else database.ids()[positions]
