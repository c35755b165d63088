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

Only the first database has noise_both.

``clip_score``, ``top1`` and ``top5`` are by the encoder that also retrieves, conditions and selects. A concept counts
as retrieved if the prompt is the nearest of all 200 to the image. ``judge_top1`` and ``judge_top5`` are by the
independent judge of ``judge.py``: the rank of the prompt among the 1,000 names of ``concepts.py``. It needs STICKERS, a
folder of make_stickers.py. ``judge_real`` has the same for the left-out image that is nearest to the prompt, which is
what perfect images would reach, and ``judge_recall`` the recall of real images by their own names. ``judged`` counts
the retrieved concepts over all databases, and divides them by those of ``noise``. Intervals resample the prompts.

``copy_rate_real`` is the share of the left-out images that count as copies of a remaining image. It is the copy rate
that images as good as the real ones would have.

``swap`` compares the images of the preset fast for each database with the real images of each.

Generated images are cached, see ``draws.py``. The grid is written to ``build/bench/generator.png``.

Legend: ``N`` prompts, ``P`` all prompts, ``M`` images of a database, ``D`` embedding width, ``S`` side.
"""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from concepts import Concepts
from domains import BENCH, Drawings, drawings, embedded, rows_of
from draws import SEED, Asked, Studio
from edit import DTYPE, dtype_of, save_grid
from left_out import LeftOutDatabase, Prompt, own_images, read_prompts
from numpy.typing import NDArray

from model.encoder.clip import Encoder
from model.generation.quality import PRESETS
from model.metrics import embedding_metrics
from model.metrics.bootstrap import bootstrap_interval, mean_of
from model.metrics.embedding_metrics import Embeddings, Values
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import BUNDLED_GENERATOR, pretrained_folder, weights_digest

RESAMPLES = 1_000
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
FIRST_ONLY = frozenset({"noise_both"})
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


def bench_generator(samples: int, device: str) -> dict[str, Any]:
    """Return the scores of ``samples`` prompts, at most all of ``PROMPTS``, for each database and condition."""
    encoder, prompts = Encoder(device=device), read_prompts()
    pipeline = KNNDiffusionPipeline.open(pretrained_folder(BUNDLED_GENERATOR)).to(device, DTYPE[device])
    kind = os.environ.get("PROMPTS") or "held-out"
    chosen = choose(kind, len(prompts), samples)
    columns: dict[str, NDArray[np.uint8]] = {}
    databases, rows, made, ranks = {}, {}, {}, {}
    concepts = Concepts.trained(prompts)
    few = choose(kind, len(prompts), -(-2 * len(chosen) // 3))  # some of those chosen
    for source in drawings():
        numbers = few if databases else chosen
        names = [name for name in CONDITIONS if not (databases and name in FIRST_ONLY)]
        databases[source.name], sheets = measure(source, pipeline, encoder, concepts, prompts, numbers, names)
        shown = np.isin(numbers, few)
        columns |= {f"{source.name} {name}": images[shown] for name, images in sheets.items()}
        rows[source.name] = labelled_rows(source, encoder)[1]
        made[source.name] = encoder.embed_pixels(sheets["fast"][shown]).numpy()
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
        "swap": swaps(made, rows),
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
) -> tuple[dict[str, Any], dict[str, NDArray[np.uint8]]]:
    """Return the scores and the images (N, S, S, 3) of one database under the named conditions."""
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
    scores = {name: judge.scores(encoder.embed_pixels(images).numpy(), images) for name, images in sheets.items()}
    prompt, left_out = np.nonzero(asked.own)
    remaining = database.nearest(rows[left_out], 1, chosen[prompt]).scores[:, 0]
    some = np.random.default_rng(SEED).permutation(len(rows))[: len(chosen)]
    return {
        **scores,
        "seconds_per_image": seconds,
        "copy_threshold": threshold,
        "copy_rate_real": embedding_metrics.copy_rate(remaining, threshold),
        "copy_rate_real_all": embedding_metrics.copy_rate(near, threshold),
        "fd_real": embedding_metrics.frechet_distance(rows[some], rows),
        "kid_real": embedding_metrics.kernel_distance(rows[some], np.delete(rows, some, axis=0)),
        "images": len(rows),
        "left_out": len(np.unique(left_out)),
        **({} if concepts is None else judged_real(concepts, source, labelled, rows, asked)),
    }, sheets


def labelled_rows(source: Drawings, encoder: Encoder) -> tuple[list[int], Embeddings]:
    """Return the rows of images with a name, and their embeddings (M, D). Others may be the own image of a prompt."""
    labelled = [row for row, label in enumerate(source.labels) if label]
    return labelled, rows_of(embedded(source, encoder))[labelled]


def judged_real(
    concepts: Concepts, source: Drawings, labelled: Sequence[int], rows: Embeddings, asked: Asked
) -> dict[str, Any]:
    """Return how well the independent judge knows real images, by their own names and by the prompts.

    For a prompt, it is the left-out image nearest to it. Prompts without one do not count.
    """
    has = asked.own.any(axis=1)
    nearest = np.where(asked.own, asked.texts @ rows.T, -np.inf).argmax(axis=1)[has]
    ranks = concepts.ranks(source.pixels(labelled[row] for row in nearest), asked.numbers[has])
    real = {"prompts": int(has.sum()), "top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean())}
    return {"judge_real": real, "judge_recall": concepts.recall(source)}


def judged(ranks: Mapping[str, Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]]) -> dict[str, dict[str, Any]]:
    """Return the concepts that the independent judge retrieves over all databases, by condition.

    ``ranks`` has the prompts (N,) and ranks (N,) of the images, by database and condition. Each condition that every
    database has is compared with ``noise``, image by image. Prompts are resampled, with their images of all databases.
    """
    if not ranks:
        return {}
    prompts = np.concatenate([by_condition["noise"][0] for by_condition in ranks.values()])
    groups = np.unique(prompts, return_inverse=True)[1]
    totals: dict[str, dict[str, Any]] = {}
    for name in set.intersection(*(set(by_condition) for by_condition in ranks.values())):
        totals[name] = {"images": len(prompts)}
        for top, limit in (("top1", 1), ("top5", 5)):
            hits, base = (
                np.concatenate([by_condition[one][1] < limit for by_condition in ranks.values()]).astype(np.float64)
                for one in (name, "noise")
            )

            def ratio(counts: Values, hits: Values = hits, base: Values = base) -> Values:
                return (counts @ hits) / np.maximum(counts @ base, 1)

            rng = np.random.default_rng(SEED)
            score = bootstrap_interval(ratio, groups, resamples=RESAMPLES, rng=rng, bounds=(0, np.inf))
            totals[name] |= {top: int(hits.sum()), f"{top}_ratio": [score.value, score.low, score.high]}
    return totals


def swaps(made: dict[str, Embeddings], rows: dict[str, Embeddings]) -> dict[str, Any]:
    """Return the kernel distances of the images made with each database to the real images of each.

    ``covered`` is the share of the distance between two databases that a swap covers: how much closer to the second
    database the images get, and how much farther from the first, relative to the same for real images.
    """
    distances = {
        name: {other: embedding_metrics.kernel_distance(images, rows[other]) for other in rows}
        for name, images in made.items()
    }
    real = {
        name: {other: embedding_metrics.kernel_distance(rows[name], rows[other]) for other in rows if other != name}
        for name in rows
    }
    covered = {}
    for one, other in itertools.combinations(made, 2):
        moved = distances[one][other] - distances[one][one] + distances[other][one] - distances[other][other]
        covered[f"{one} {other}"] = moved / (2 * real[one][other])
    return {"kid": distances, "kid_real": real, "covered": covered}


def nearest_others(rows: Embeddings) -> NDArray[np.float32]:
    """Return the cosine (M,) of each row (M, D) to its nearest other row."""
    scores = rows @ rows.T
    np.fill_diagonal(scores, -np.inf)
    nearest: NDArray[np.float32] = scores.max(axis=1)
    return nearest
