"""Whether an image shows the concept of its prompt, by the judge of ``judge.py``: its rank among 1,000 names.

The names are the prompt and 999 distractors, a seeded sample of the names of Unicode's emoji without skin tones and
flags. A distractor must not describe the prompt: its name has none of the words that leave images out for the prompt,
and neither its name nor its keywords have a word of the prompt. Some words are too general to count: face, hand, man,
person, two and woman. Otherwise no name of a face would remain for "a sad face".

Legend: ``P`` prompts, ``N`` images, ``C`` names, ``S`` side.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from domains import Drawings
from judge import DualEncoder, captions, icon_files, trained_judge, words_of
from left_out import Prompt
from numpy.typing import NDArray
from tqdm.auto import tqdm

from flows.demo.images import emoji_names

NAMES = 1_000
"""Number of names that an image is compared with, the prompt included."""
GENERAL = frozenset({"face", "hand", "man", "person", "two", "woman"})
SEED = 0
LEFT_OUT = re.compile(r"1f3f[b-f]|^1f1[ef]|^1f3f[34]|^1f38c|^1f6a9")
"""Code points of skin tones, of the letters of country flags, and of other flags."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Concepts:
    """The prompts and their distractors, embedded by the judge.

    Attributes:
        judge: The judge.
        prompts: The P prompts.
        names: The C names of emoji.
        distractors: (P, 999), the numbers of the names that each prompt is compared with.
        unknown: Words of the prompts that the judge does not know.
    """

    judge: DualEncoder
    prompts: Sequence[Prompt]
    names: tuple[str, ...]
    distractors: NDArray[np.int64]
    unknown: tuple[str, ...]

    @classmethod
    def trained(cls, prompts: Sequence[Prompt]) -> "Concepts | None":
        """Return the prompts with a judge trained on the sets in the folder STICKERS, or None if it is not set."""
        folder = os.environ.get("STICKERS")
        if not folder:
            tqdm.write("no independent judge: STICKERS is not set; give the folder of make_stickers.py")
            return None
        keywords: dict[tuple[str, ...], set[str]] = {}
        for texts in captions(icon_files(Path(folder))).values():
            for name, *others in texts:
                keywords.setdefault(words_of(name), set()).update(word for text in others for word in words_of(text))
        return cls.of(trained_judge(Path(folder)), prompts, keywords)

    @classmethod
    def of(cls, judge: DualEncoder, prompts: Sequence[Prompt], keywords: Mapping[tuple[str, ...], set[str]]) -> Self:
        """Choose the distractors of prompts. ``keywords`` has the words of a name's keywords by the name's words."""
        names = tuple(name for name in judged_names() if judge.known(name))
        words = [set(words_of(name)) | keywords.get(words_of(name), set()) for name in names]
        order = np.random.default_rng(SEED).permutation(len(names))
        chosen = []
        for prompt in prompts:
            own = set(words_of(prompt.text)) - GENERAL
            rest = [number for number in order if not words[number] & own and not prompt.names(names[number])]
            chosen.append(rest[: NAMES - 1])
        unknown = {word for prompt in prompts for word in words_of(prompt.text)} - judge.numbers.keys()
        return cls(
            judge=judge, prompts=prompts, names=names, distractors=np.array(chosen), unknown=tuple(sorted(unknown))
        )

    def facts(self) -> dict[str, Any]:
        """Return the number of names, and the words of the prompts that the judge does not know."""
        return {"names": len(self.names), "compared": self.distractors.shape[1] + 1, "unknown_words": self.unknown}

    def ranks(self, pixels: NDArray[np.uint8], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of distractors (N,) that are nearer to each image (N, S, S, 3) than its prompt (N,) is."""
        images = self.judge.embed_pixels(pixels)
        own = self.judge.embed_texts([prompt.text for prompt in self.prompts])[numbers]
        cosines = images @ self.judge.embed_texts(self.names).T
        others = np.take_along_axis(cosines, self.distractors[numbers], axis=1)
        ranks: NDArray[np.int64] = (others >= (images * own).sum(1, keepdims=True)).sum(1)
        return ranks

    def recall(self, source: Drawings) -> dict[str, float]:
        """Return the share of real images whose own name is the first or among the first five of ``NAMES`` names.

        The names are a seeded sample of those of the images.
        """
        named = {label: row for row, label in enumerate(source.labels) if label in set(self.names)}
        labels = sorted(named)
        labels = [labels[number] for number in np.random.default_rng(SEED).permutation(len(labels))[:NAMES]]
        cosines = (
            self.judge.embed_pixels(source.pixels([named[label] for label in labels]))
            @ self.judge.embed_texts(labels).T
        )
        better = (cosines > np.diagonal(cosines)[:, None]).sum(1)
        return {"names": len(labels), "top1": float((better == 0).mean()), "top5": float((better < 5).mean())}


def judged_names() -> list[str]:
    """Return the names of emoji without skin tones and flags, each once, in order."""
    return sorted({name for code, name in emoji_names().items() if not LEFT_OUT.search(code)})
