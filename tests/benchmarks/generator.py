"""The bundled generator with prompts that people write. Images that a prompt names are left out of the database.

    make bench NAME=generator                            # the 160 prompts that were not used to choose the presets
    make bench NAME=generator SAMPLES=60                 # a seeded sample of them
    make bench NAME=generator PROMPTS=tuning             # the 40 that were used: every fifth, from the first
    make bench NAME=generator PROMPTS=all SAMPLES=200    # all
    STICKERS=FOLDER make bench NAME=generator            # with an independent judge, and EmojiOne if it is there

Twemoji, OpenMoji and EmojiOne are the databases; the generator was trained on none of them. Images with a prompt's
words in their name are left out for that prompt; similar ones remain. The nearest remaining image is what the generator
must beat. The second and third database are measured with two thirds of the prompts.

Conditions share their noise: candidate i of a prompt starts from the same noise in all of them.

    noise        the defaults of the pipeline
    noise_both   noise, mean and text in the query slot, best of 3: the preset fast without its start
    fast_one     the preset fast with one candidate, so nothing is selected
    fast, best   the presets
    nearest      the nearest stored image

Only the first database has noise_both and best.

``clip_score``, ``top1`` and ``top5`` are by the encoder that also retrieves, conditions and selects. A concept counts
as retrieved if the prompt is the nearest of all 200 to the image. ``judge_top1`` and ``judge_top5`` are by the
independent judge of ``judge.py``: the rank of the prompt among the 1,000 names of ``concepts.py``. It needs STICKERS, a
folder of make_stickers.py. ``judge_real`` has the same for the left-out image that is nearest to the prompt, which is
what perfect images would reach, and ``judge_recall`` the recall of real images by their own names. ``judged`` counts
the retrieved concepts over all databases, and divides them by those of ``noise``. Intervals resample the prompts.

``copy_rate_real`` is the share of the left-out images that count as copies of a remaining image, the mean over the
prompts. It is the copy rate that images as good as the real ones would have.

``swap`` compares the images of the preset fast for each database with the real images of each. ``nearest`` and ``real``
in it are the same for the nearest stored images and for the left-out ones: what a swap of real images covers.

Generated images are cached, see ``draws.py``. The grid is written to ``build/bench/generator.png``.

Legend: ``N`` prompts, ``P`` all prompts, ``M`` images of a database, ``D`` embedding width, ``S`` side.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from concepts import Concepts
from domains import BENCH, Drawings, drawings, embedded, rows_of
from draws import SEED, Asked, Studio
from edit import DTYPE, dtype_of, save_grid
from left_out import LeftOutDatabase, Prompt, own_images, read_prompts
from numpy.typing import NDArray
from several_databases import RESAMPLES, judged, stored_swaps, swaps

from model.encoder.clip import Encoder
from model.generation.quality import PRESETS
from model.metrics import embedding_metrics
from model.metrics.bootstrap import bootstrap_interval, mean_of
from model.metrics.embedding_metrics import Embeddings
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import BUNDLED_GENERATOR, pretrained_folder, weights_digest

TUNING_STEP = 5
"""Every prompt whose number is a multiple of it was used to choose the presets."""
CONDITIONS: dict[str, dict[str, Any]] = {
    "noise": {},
    "noise_both": {"start": "noise", "query": "both", "candidates": 3},
    "fast_one": {"quality": "fast", "candidates": 1},
    "fast": {"quality": "fast"},
    "best": {"quality": "best"},
}
"""Arguments of the call in each condition."""
FIRST_ONLY = frozenset({"noise_both", "best"})
"""Conditions that only the first database has."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """What the images of one database are compared with.

    Attributes:
        texts: (P, D), the embeddings of all prompts.
        numbers: (N,), the prompts of the images.
        rows: (M, D), the embeddings of the database.
        database: The database without the prompts' own images.
        threshold: Cosine above which an image counts as a copy.
        concepts: The independent judge, if there is one.
    """

    texts: Embeddings
    numbers: NDArray[np.int64]
    rows: Embeddings
    database: LeftOutDatabase
    threshold: float
    concepts: Concepts | None = None

    def scores(self, images: Embeddings, pixels: NDArray[np.uint8]) -> dict[str, Any]:
        """Return all metrics of one image per prompt, and the interval of those that depend on single images.

        ``images`` (N, D) are the embeddings of ``pixels`` (N, S, S, 3).
        """
        cosines = images @ self.texts.T
        own = cosines[np.arange(len(images)), self.numbers]
        better = (cosines > own[:, None]).sum(axis=1)
        near = self.database.nearest(images, 1, self.numbers).scores[:, 0]
        single = {"clip_score": own, "top1": better == 0, "top5": better < 5, "copy_rate": near > self.threshold}
        if self.concepts is not None:
            ranks = self.concepts.ranks(pixels, self.numbers)
            single |= {"judge_top1": ranks < 1, "judge_top5": ranks < 5}
        scores: dict[str, Any] = {}
        for name, values in single.items():
            rng = np.random.default_rng(SEED)
            statistic, groups = mean_of(values.astype(np.float64)), len(values)
            bounds = (-1.0, 1.0) if name == "clip_score" else (0.0, 1.0)
            score = bootstrap_interval(statistic, groups, resamples=RESAMPLES, rng=rng, bounds=bounds)
            scores |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        return {
            **scores,
            "nearest": float(near.mean()),
            "kid": embedding_metrics.kernel_distance(images, self.rows),
            "fd": embedding_metrics.frechet_distance(images, self.rows),
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The measurements of one database.

    Attributes:
        scores: The scores of each condition, and figures of the real images.
        sheets: The images (N, S, S, 3) of each condition.
        nearest: (N,), the row of the stored image that is nearest to each prompt.
        own: (N,), the row of the left-out image that is nearest to each prompt; -1 if there is none.
    """

    scores: dict[str, Any]
    sheets: dict[str, NDArray[np.uint8]]
    nearest: NDArray[np.int64]
    own: NDArray[np.int64]


def bench_generator(samples: int, device: str) -> dict[str, Any]:
    """Return the scores of ``samples`` prompts, at most all of ``PROMPTS``, for each database and condition."""
    encoder, prompts = Encoder(device=device), read_prompts()
    pipeline = KNNDiffusionPipeline.open(pretrained_folder(BUNDLED_GENERATOR)).to(device, DTYPE[device])
    kind = os.environ.get("PROMPTS") or "held-out"
    chosen = choose(kind, len(prompts), samples)
    columns: dict[str, NDArray[np.uint8]] = {}
    databases: dict[str, dict[str, Any]] = {}
    rows, made, ranks = {}, {}, {}
    stored: dict[str, dict[str, NDArray[np.int64]]] = {"nearest": {}, "real": {}}
    concepts = Concepts.trained(prompts)
    few = choose(kind, len(prompts), -(-2 * len(chosen) // 3))  # some of those chosen
    for source in drawings():
        numbers = few if databases else chosen
        names = [name for name in CONDITIONS if not (databases and name in FIRST_ONLY)]
        measured = measure(source, pipeline, encoder, concepts, prompts, numbers, names)
        databases[source.name], sheets = measured.scores, measured.sheets
        shown = np.isin(numbers, few)
        columns |= {f"{source.name} {name}": images[shown] for name, images in sheets.items()}
        rows[source.name] = labelled_rows(source, encoder)[1]
        made[source.name] = encoder.embed_pixels(sheets["fast"][shown]).numpy()
        for kind, found in (("nearest", measured.nearest), ("real", measured.own)):
            stored[kind][source.name] = found[shown]
        if concepts is not None:
            ranks[source.name] = {name: (numbers, concepts.ranks(sheets[name], numbers)) for name in sheets}
    save_grid(columns, [prompts[number].text for number in few], BENCH / "generator.png")
    return {
        "samples": len(chosen),
        "samples_of_other_databases": len(few),
        "prompts": kind,
        "prompts_of_the_judge": len(prompts),
        "names_of_the_independent_judge": None if concepts is None else concepts.facts(),
        "databases": databases,
        "swap": swaps(made, rows) | {kind: stored_swaps(found, rows) for kind, found in stored.items()},
        "judged": judged(ranks),
        "device": device,
        "dtype": dtype_of(device),
        "weights": weights_digest(BUNDLED_GENERATOR),
        "conditions": CONDITIONS,
        "presets": {name: dataclasses.asdict(preset) for name, preset in PRESETS.items()},
    }


def choose(kind: str, total: int, samples: int) -> NDArray[np.int64]:
    """Return the numbers of ``samples`` of ``total`` prompts, at most all of this kind, in order."""
    numbers = np.arange(total)
    tuning = numbers % TUNING_STEP == 0
    kinds = {"held-out": numbers[~tuning], "tuning": numbers[tuning], "all": numbers}
    if kind not in kinds:
        raise SystemExit(f"PROMPTS is unknown: {kind}; use one of {', '.join(kinds)}")
    return np.sort(np.random.default_rng(SEED).permutation(kinds[kind])[:samples])


def measure(
    source: Drawings,
    pipeline: KNNDiffusionPipeline,
    encoder: Encoder,
    concepts: Concepts | None,
    prompts: Sequence[Prompt],
    chosen: NDArray[np.int64],
    names: Sequence[str],
) -> Measured:
    """Measure one database under the named conditions."""
    labelled, rows = labelled_rows(source, encoder)
    own = own_images(prompts, [source.labels[row] for row in labelled])
    texts = encoder.embed_texts([prompt.text for prompt in prompts]).numpy()
    database = LeftOutDatabase(
        source.name, encoder.identity, rows, lambda number: source.image(labelled[number]), texts, own
    )
    pipeline.swap_database(database)
    near = nearest_others(rows)
    threshold = embedding_metrics.copy_threshold(near)
    judge = Judge(texts=texts, numbers=chosen, rows=rows, database=database, threshold=threshold, concepts=concepts)
    asked = Asked(numbers=chosen, texts=texts[chosen], own=own[chosen])
    first = database.search(asked.texts, 1).ids[:, 0]
    sheets = {"nearest": source.pixels(labelled[number] for number in first)}
    seconds = {}
    studio = Studio(pipeline=pipeline, encoder=encoder, source=source, asked=asked)
    for name in names:
        sheets[name], seconds[name] = studio.generated(CONDITIONS[name])
    scores = {}
    for name, images in sheets.items():
        others = dataclasses.replace(judge, rows=np.delete(rows, first, axis=0)) if name == "nearest" else judge
        scores[name] = others.scores(encoder.embed_pixels(images).numpy(), images)
    own_rows = np.where(asked.own.any(1), np.where(asked.own, asked.texts @ rows.T, -np.inf).argmax(1), -1)
    some = np.random.default_rng(SEED).permutation(len(rows))[: len(chosen)]
    figures = {
        **scores,
        "seconds_per_image": seconds,
        "copy_threshold": threshold,
        "copy_rate_real": real_copy_rate(database, rows, asked, threshold),
        "copy_rate_real_all": embedding_metrics.copy_rate(near, threshold),
        "fd_real": embedding_metrics.frechet_distance(rows[some], np.delete(rows, some, axis=0)),
        "kid_real": embedding_metrics.kernel_distance(rows[some], np.delete(rows, some, axis=0)),
        "images": len(rows),
        "left_out": int(asked.own.any(0).sum()),
    }
    if concepts is not None:
        numbers, own_images_of = asked.numbers[own_rows >= 0], [labelled[row] for row in own_rows if row >= 0]
        figures |= judged_real(concepts, source, own_images_of, numbers)
    return Measured(scores=figures, sheets=sheets, nearest=first, own=own_rows)


def real_copy_rate(database: LeftOutDatabase, rows: Embeddings, asked: Asked, threshold: float) -> float:
    """Return the share of left-out images that count as copies of a remaining one: the mean over the prompts."""
    prompt, left_out = np.nonzero(asked.own)
    copies = database.nearest(rows[left_out], 1, asked.numbers[prompt]).scores[:, 0] > threshold
    return float(np.mean([copies[prompt == one].mean() for one in np.unique(prompt)]))


def labelled_rows(source: Drawings, encoder: Encoder) -> tuple[list[int], Embeddings]:
    """Return the rows of images with a name, and their embeddings (M, D). Others may be the own image of a prompt."""
    labelled = [row for row, label in enumerate(source.labels) if label]
    return labelled, rows_of(embedded(source, encoder))[labelled]


def judged_real(
    concepts: Concepts, source: Drawings, images: Sequence[int], numbers: NDArray[np.int64]
) -> dict[str, Any]:
    """Return how well the independent judge knows real images, by their own names and by the prompts.

    ``images`` are the left-out images that are nearest to the prompts ``numbers`` (N,).
    """
    ranks = concepts.ranks(source.pixels(images), numbers)
    real = {"prompts": len(numbers), "top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean())}
    return {"judge_real": real, "judge_recall": concepts.recall(source)}


def nearest_others(rows: Embeddings) -> NDArray[np.float32]:
    """Return the cosine (M,) of each row (M, D) to its nearest other row."""
    scores = rows @ rows.T
    np.fill_diagonal(scores, -np.inf)
    nearest: NDArray[np.float32] = scores.max(axis=1)
    return nearest
