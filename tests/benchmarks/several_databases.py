"""Comparisons over several databases: how far a swap moves the images, and the concepts that the judge retrieves.

Legend: ``N`` images, ``M`` rows of a database, ``D`` embedding width.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from draws import SEED
from numpy.typing import NDArray

from model.metrics.bootstrap import bootstrap_interval
from model.metrics.embedding_metrics import Embeddings, Values, kernel_distance

RESAMPLES = 1_000


def swaps(
    made: Mapping[str, Embeddings],
    rows: Mapping[str, Embeddings],
    stored: Mapping[str, NDArray[np.int64]] | None = None,
) -> dict[str, Any]:
    """Return the kernel distances of images to the real images of each database.

    ``covered`` is the share of the distance between two databases that a swap covers: how much closer to the second
    database the images get, and how much farther from the first, relative to the same for the whole databases.
    Databases differ in content too, which a swap for the same prompts does not change. Compare the share with that of
    real images.

    Args:
        made: The images (N, D) of the same prompts, by database.
        rows: The embeddings (M, D) of each database.
        stored: The rows that the images are, if they are images of the databases. They are left out of their database.
    """

    def distance(name: str, other: str) -> float:
        reference = rows[other]
        if stored is not None and name == other:
            reference = np.delete(reference, stored[name], axis=0)
        return kernel_distance(made[name], reference)

    distances = {name: {other: distance(name, other) for other in rows} for name in made}
    real = {name: {other: kernel_distance(rows[name], rows[other]) for other in rows if other != name} for name in rows}
    covered = {}
    for one, other in itertools.combinations(made, 2):
        moved = distances[one][other] - distances[one][one] + distances[other][one] - distances[other][other]
        covered[f"{one} {other}"] = moved / (2 * real[one][other])
    return {"kid": distances, "kid_real": real, "covered": covered}


def stored_swaps(stored: Mapping[str, NDArray[np.int64]], rows: Mapping[str, Embeddings]) -> dict[str, Any]:
    """Return :func:`swaps` of stored images: rows (N,) of each database, for the same prompts; -1 for no image.

    Prompts without an image in one of the databases do not count.
    """
    common = np.all([numbers >= 0 for numbers in stored.values()], axis=0)
    kept = {name: numbers[common] for name, numbers in stored.items()}
    images = {name: rows[name][numbers] for name, numbers in kept.items()}
    return {"prompts": int(common.sum()), **swaps(images, rows, kept)}


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
