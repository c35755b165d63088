"""Searches: embed the queries of a batch together, and find their nearest rows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from infra.errors import InputError
from model.encoder.clip import Encoder
from model.retrieval.searchable import NearestIds
from tasks.serve.service.plans import SearchPlan
from tasks.serve.service.responses import SearchResponse
from tasks.serve.service.served import OpenDatabase

_BLOCK_ROWS = 65_536
_LEAST_NORM = 1e-3
"""Minimum length of a query before it is scaled to 1: below it, rounding decides its direction."""


def search(plans: Sequence[SearchPlan]) -> list[SearchResponse]:
    """Run searches of one database version and model.

    Raises:
        InputError: A filter is invalid, or the parts of a query cancel each other.
        IntegrityError: Metadata of a row cannot be read.
        ModelError: A stored row is not finite.
    """
    opened, model = plans[0].opened, plans[0].model
    queries = query_vectors(plans, opened, model.encoder)
    wanted = [one.request.k + (one.request.row is not None) for one in plans]  # a row does not find itself
    found = _nearest(plans, opened, queries, wanted)
    hits = opened.hits([_chosen(one, *nearest) for one, nearest in zip(plans, found, strict=True)])
    return [
        SearchResponse(
            model=model.name,
            database=opened.info,
            encoder=model.pipeline.identity.name,
            settings=one.settings,
            hits=own,
        )
        for one, own in zip(plans, hits, strict=True)
    ]


def query_vectors(plans: Sequence[SearchPlan], opened: OpenDatabase, encoder: Encoder) -> NDArray[np.float32]:
    """Return unit queries (Q, D): the mean of what is given, as unit rows, minus the mean of the negative texts."""
    texts = list(
        dict.fromkeys(text for one in plans for text in (one.request.text, *one.request.negative) if text is not None)
    )
    images = [one.request.image for one in plans if one.request.image is not None]
    of_text = dict(zip(texts, encoder.embed_texts(texts).numpy(), strict=True)) if texts else {}
    of_image = iter(encoder.embed_images(images).numpy()) if images else iter(())
    queries = []
    for request in (one.request for one in plans):
        given = [] if request.text is None else [of_text[request.text]]
        if request.image is not None:
            given.append(next(of_image))
        if request.row is not None:
            given.append(opened.database.rows(np.array([request.row]))[0].astype(np.float32))
        if request.embedding is not None:
            embedding = np.array(request.embedding)
            given.append((embedding / np.linalg.norm(embedding)).astype(np.float32))
        query = np.mean(given, axis=0)
        if request.negative:
            query = query - np.mean([of_text[text] for text in request.negative], axis=0)
        norm = float(np.linalg.norm(query))
        if norm < _LEAST_NORM:
            raise InputError("the parts of the query cancel each other; change one of them")
        queries.append(query / norm)
    return np.stack(queries).astype(np.float32)


def _nearest(
    plans: Sequence[SearchPlan], opened: OpenDatabase, queries: NDArray[np.float32], wanted: Sequence[int]
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Return ids and scores of the nearest rows of each plan, best first."""
    database = opened.database
    found = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in plans]
    plain = [number for number, one in enumerate(plans) if one.request.where is None]
    if plain:
        nearest: NearestIds = database.nearest(queries[plain], max(wanted[number] for number in plain))
        for place, number in enumerate(plain):
            found[number] = (nearest.ids[place, : wanted[number]], nearest.scores[place, : wanted[number]])
    for number, one in enumerate(plans):
        if one.request.where is not None:
            ids = np.setdiff1d(opened.matching(one.request.where), database.hidden, assume_unique=True)
            found[number] = nearest_of(opened, queries[number], ids, wanted[number])
    return found


def nearest_of(
    opened: OpenDatabase, query: NDArray[np.float32], ids: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Compare a query (D,) with the rows ``ids``, all of them, and return the best ``k`` ids and scores."""
    best_ids, best = np.empty(0, np.int64), np.empty(0, np.float32)
    for start in range(0, len(ids), _BLOCK_ROWS):
        block = ids[start : start + _BLOCK_ROWS]
        best = np.concatenate([best, opened.database.rows(block).astype(np.float32) @ query])
        best_ids = np.concatenate([best_ids, block])
        order = np.lexsort((best_ids, -best))[:k]
        best_ids, best = best_ids[order], best[order]
    return best_ids, best


def _chosen(plan: SearchPlan, ids: NDArray[np.int64], scores: NDArray[np.float32]) -> tuple[list[int], list[float]]:
    """Return the rows of a response: not the query's own row, and none below the lowest score."""
    request = plan.request
    lowest = -np.inf if request.min_score is None else request.min_score
    kept = (ids >= 0) & (scores >= lowest) & (ids != (-1 if request.row is None else request.row))
    return ids[kept][: request.k].tolist(), scores[kept][: request.k].tolist()
