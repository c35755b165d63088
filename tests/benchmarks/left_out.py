"""Databases without the image that a prompt names, and the prompts that people write.

``prompts.txt`` has the prompts, and words in the names of their own images. Every search for a prompt leaves out the
images with these words in their name. Similar ones remain.

Legend: ``P`` prompts, ``M`` images of a database, ``Q`` queries, ``K`` neighbours, ``D`` embedding width.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.encoder.identity import EncoderIdentity
from model.metrics.embedding_metrics import Embeddings
from model.retrieval.searchable import Hits

PROMPTS = Path(__file__).with_name("prompts.txt")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt, and words that the names of its own images contain, whole or as plurals."""

    text: str
    words: tuple[str, ...]

    def names(self, label: str) -> bool:
        """Return True if ``label`` is the name of an image that the prompt asks for."""
        label = label.replace("-", " ")  # some sets have no hyphens in their names
        words = (re.escape(word.replace("-", " ")) for word in self.words)
        return any(re.search(rf"\b{word}(?:e?s)?\b", label, re.IGNORECASE) for word in words)


def read_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """Read the prompts; lines that start with # are comments."""
    lines = [line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [Prompt(text=text, words=tuple(word.strip() for word in words.split(","))) for text, words in lines]


def own_images(prompts: Sequence[Prompt], labels: Sequence[str]) -> NDArray[np.bool_]:
    """Return a mask (P, M): the images whose label a prompt names."""
    return np.array([[prompt.names(label) for label in labels] for prompt in prompts])


class LeftOutDatabase:
    """An exact search without the own images of each prompt; see :class:`model.retrieval.searchable.Searchable`.

    A query is recognised as the nearest of the prompts' embeddings.
    """

    has_images = True

    def __init__(
        self,
        name: str,
        encoder: EncoderIdentity,
        rows: Embeddings,
        images: Callable[[int], Image.Image],
        texts: Embeddings,
        own: NDArray[np.bool_],
    ) -> None:
        """Search ``rows`` (M, D) without the mask ``own`` (P, M) of the prompts ``texts`` (P, D)."""
        self.name, self.encoder = name, encoder
        self._rows, self._images, self._texts, self._own = rows, images, texts, own

    def __len__(self) -> int:
        """Return M."""
        return len(self._rows)

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """Return the ``k`` nearest rows of queries (Q, D) that are not images of their prompt. No other exclusion."""
        if exclude is not None:
            raise ValueError("LeftOutDatabase excludes the prompts' own images only; pass no exclude")
        return self.nearest(queries, k, (queries @ self._texts.T).argmax(axis=1))

    def nearest(self, queries: NDArray[Any], k: int, prompts: NDArray[np.int64]) -> Hits:
        """Return the ``k`` nearest rows of queries (Q, D) without the images of the prompts (Q,)."""
        scores = (queries @ self._rows.T).astype(np.float32)
        scores[self._own[prompts]] = -np.inf
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return Hits(scores=np.take_along_axis(scores, ids, axis=1), ids=ids, embeddings=self._rows[ids])

    def images(self, ids: Sequence[int]) -> list[Image.Image]:
        """Return the images of rows."""
        return [self._images(number) for number in ids]
