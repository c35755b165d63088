"""Tuning of the search effort: the cheapest numbers of visited cells and re-ranked candidates that reach a recall.

With few bits per row, no number of cells reaches the target unless more candidates are re-ranked. With few candidates,
no number of cells reaches it either. Both are therefore varied, and the cheapest sufficient combination is chosen.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from model.retrieval.database import Database
from model.retrieval.ranked_search import SearchEffort
from model.retrieval.recall import GroundTruth, recall

CANDIDATES = (20, 50, 100, 200, 500, 1000)
MAX_PROBES = 2_048  # limit of faiss-gpu
BEYOND = 2
"""How many more numbers of cells are measured after the target is reached, for the recall curve."""
_TIMED_QUERIES = 64
_READ_COST = 4.0  # cost of reading a stored row at random, relative to a code of a list that is read in order


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measurement.

    Attributes:
        effort: The search effort.
        recalls: Recall@10 by kind of query.
        latency_ms: Latency of a search for ten ids in ms.
    """

    effort: SearchEffort
    recalls: Mapping[str, float]
    latency_ms: float

    def as_row(self) -> dict[str, Any]:
        """Return plain values for a manifest."""
        named = {f"recall_at_10_{kind}": value for kind, value in self.recalls.items()}
        return {**dataclasses.asdict(self.effort), **named, "latency_ms": round(self.latency_ms, 4)}


def tune(
    database: Database, truths: Mapping[str, GroundTruth], target: float, *, before: SearchEffort | None = None
) -> tuple[Point, list[Point]]:
    """Return the cheapest effort whose recall@10 reaches ``target`` for every kind of query, and all measurements.

    Cost counts the codes compared and the candidates read, so the result does not depend on the machine's load. If no
    effort reaches the target, the point with the highest worst recall is returned.

    Args:
        database: The database to tune.
        truths: Ground truth by kind of query.
        target: Recall@10, in [0, 1].
        before: Effort of an earlier version. A grown database needs about the same, so the search starts at half of its
            number of cells. Default: None, start at one cell.
    """
    search = database.candidate_search
    probes = [1 if before is None else max(1, before.nprobe // 2)]
    while probes[-1] * 2 <= min(search.cells, MAX_PROBES):
        probes.append(probes[-1] * 2)
    depths = CANDIDATES[:1] if search.exact else CANDIDATES
    measured: list[Point] = []
    left = BEYOND
    for nprobe in probes:
        points = _measure_depths(database, truths, target, nprobe, depths)
        measured += points
        if _worst(points[-1]) >= target:
            if left == 0:
                break
            left -= 1
    reaching = [point for point in measured if _worst(point) >= target]
    if reaching:
        return min(reaching, key=lambda point: _cost(database, point.effort)), measured
    return max(measured, key=_worst), measured


def _measure_depths(
    database: Database, truths: Mapping[str, GroundTruth], target: float, nprobe: int, depths: tuple[int, ...]
) -> list[Point]:
    """Measure increasing numbers of candidates until they reach the target or no longer raise the recall."""
    points: list[Point] = []
    for candidates in depths:
        point = measure(database.with_effort(SearchEffort(nprobe=nprobe, candidates=candidates)), truths)
        saturated = bool(points) and _worst(point) - _worst(points[-1]) < 1e-3
        points.append(point)
        if saturated or _worst(point) >= target:
            break
    return points


def measure(database: Database, truths: Mapping[str, GroundTruth]) -> Point:
    """Measure recall@10 of a database with its own effort, and the latency of a search for ten ids."""
    recalls = {kind: recall(database, truth) for kind, truth in truths.items()}
    queries = next((truth.queries[:_TIMED_QUERIES] for truth in truths.values() if len(truth)), None)
    seconds = 0.0
    if queries is not None:
        database.nearest(queries[:1], 10)
        started = time.perf_counter()
        for query in queries:
            database.nearest(query[None], 10)  # without embeddings: their files may not be fetched yet
        seconds = (time.perf_counter() - started) / len(queries)
    return Point(effort=database.effort, recalls=recalls, latency_ms=1e3 * seconds)


def _worst(point: Point) -> float:
    return min(point.recalls.values(), default=1.0)


def _cost(database: Database, effort: SearchEffort) -> float:
    search = database.candidate_search
    read = 10 if search.exact else effort.candidates
    return effort.nprobe * database.stored / max(1, search.cells) + _READ_COST * read
