"""Sample: the pictures of each condition, drawn once.

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
    """How samples are drawn; None is the generator's own default."""

    retrieve: bool = True
    query: QuerySlot | None = None
    neighbours: int | None = None

    def __str__(self) -> str:
        """As a progress bar names it."""
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
    """Pictures and their embeddings by condition; what has been drawn is kept."""

    def __init__(
        self,
        pipeline: KNNDiffusionPipeline,
        queries: Tensor,
        *,
        steps: int | None,
        guidance: float | None,
        seed: int,
        told: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        """Draw from ``queries`` (N, D), always from the same noise: conditions differ by nothing else.

        ``told`` is called with (what is drawn, step, steps).
        """
        self._pipeline, self.queries, self._told = pipeline, queries, told
        self._steps, self._guidance, self._seed = steps, guidance, seed
        self._kept: dict[Condition, tuple[list[Image.Image], Embeddings]] = {}

    def __call__(self, condition: Condition) -> tuple[list[Image.Image], Embeddings]:
        """N pictures and their embeddings (N, D)."""
        key = self.resolved(condition)
        if key not in self._kept:
            self._kept[key] = self._draw(self.queries, key, 1)
        return self._kept[key]

    def seeds(self, condition: Condition, prompts: int, each: int) -> Embeddings:
        """(prompts, S, D): ``each`` pictures of each of the first queries, from different noise."""
        _, rows = self._draw(self.queries[:prompts], self.resolved(condition), each)
        return rows.reshape(-1, each, rows.shape[1])

    def resolved(self, condition: Condition) -> Condition:
        """With the generator's defaults filled in, so that no condition is drawn twice under two names."""
        if not condition.retrieve:
            return Condition(retrieve=False, query=condition.query or "text")
        defaults = self._pipeline.config
        return Condition(
            query=condition.query or defaults.query, neighbours=condition.neighbours or defaults.neighbours
        )

    def _draw(self, queries: Tensor, condition: Condition, each: int) -> tuple[list[Image.Image], Embeddings]:
        output = self._pipeline(
            queries,
            num_images_per_prompt=each,
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            generator=torch.Generator().manual_seed(self._seed),
            on_progress=lambda step, steps: self._told(f"draw {len(queries) * each}, {condition}", step, steps),
            **dataclasses.asdict(condition),
        )
        images = list(output.images)
        return images, self._pipeline.encoder.embed_images([image.convert("RGB") for image in images]).numpy()


def queries_of(
    pipeline: KNNDiffusionPipeline, database: Database, prompts: Sequence[str], samples: int, seed: int
) -> tuple[Tensor, list[str]]:
    """(N, D) what is drawn from, and the text of each: random prompts, all of them before any comes again.

    Without prompts, random rows of ``database`` stand in, and their texts are empty.
    """
    rng = np.random.default_rng(seed)
    if prompts:
        order = np.resize(rng.permutation(len(prompts)), samples).tolist()
        texts = [prompts[number] for number in order]
        return embed_unique(pipeline, texts), texts
    rows = row_ids_at(database, rng.choice(len(database), samples))
    return torch.from_numpy(database.rows(rows).astype(np.float32)), [""] * samples


def embed_unique(pipeline: KNNDiffusionPipeline, texts: Sequence[str]) -> Tensor:
    """(N, D): rows of one text are equal to the bit, which tells that what they are compared with is of one prompt."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return pipeline.encoder.embed_texts(list(places))[[places[text] for text in texts]]


def row_ids_at(database: Database, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids at places among those of :meth:`Database.ids`, which are listed only where rows are hidden."""
    return places if len(database) == database.stored else database.ids()[places]
