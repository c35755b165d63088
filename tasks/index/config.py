"""Settings of an index."""

import dataclasses
from typing import Annotated

from annotated_types import Ge, Interval

from infra.errors import ConfigError
from model.retrieval.faiss_index import MEMORY_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Index type, size limits and recall target.

    Attributes:
        index: FAISS factory string, or auto to choose by the number of rows and ``memory_bytes``.
        memory_bytes: Memory limit in bytes for the index in a searching process.
        target_recall: Minimum recall@10 of image and of text queries, in [0, 1]. The stage fails below it.
        recall_queries: Queries of each kind for the recall measurement.
        texts: Text queries for the recall measurement.
        shard_rows: Maximum number of rows per index shard: 16,777,216 take 8 GB at 256 dimensions of float16. Small
            shards split cells.
        near_duplicate_cosine: Minimum cosine of near-duplicates, in (0, 1]. 1 disables the search for them.
        dedup: Return only one row of each group of near-duplicates.
        max_drift: Relative growth of the error on new rows above which the quantizer is trained again.
        seed: Seed of the training and of the choice of queries.
    """

    index: str = "auto"
    memory_bytes: Annotated[int, Ge(1)] = MEMORY_BYTES
    target_recall: Annotated[float, Interval(ge=0, le=1)] = 0.95
    recall_queries: Annotated[int, Ge(1)] = 256
    texts: tuple[str, ...] = ()
    shard_rows: Annotated[int, Ge(1)] = 16_777_216
    near_duplicate_cosine: Annotated[float, Interval(gt=0, le=1)] = 0.995
    dedup: bool = False
    max_drift: Annotated[float, Ge(0)] = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for values out of range."""
        if not 0 <= self.target_recall <= 1:
            raise ConfigError(f"target_recall is out of range: {self.target_recall}; choose a value between 0 and 1")
        if self.recall_queries < 1 or self.shard_rows < 1 or self.memory_bytes < 1:
            raise ConfigError(
                f"recall_queries, shard_rows or memory_bytes is below 1: {self.recall_queries}, {self.shard_rows}, "
                f"{self.memory_bytes}; give at least 1 of each"
            )
        if not 0 < self.near_duplicate_cosine <= 1 or self.max_drift < 0:
            raise ConfigError(
                f"near_duplicate_cosine or max_drift is out of range: {self.near_duplicate_cosine}, {self.max_drift}; "
                "give a cosine in (0, 1], and a max_drift of at least 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IndexOverrides:
    """Index settings that replace those of the previous version, or the defaults; None keeps the existing value.

    Attributes:
        index: FAISS factory string, or auto.
        memory_bytes: Memory limit in bytes for the index in a searching process.
        target_recall: Minimum recall@10 of image and of text queries, in [0, 1].
        dedup: Return only one row of each group of near-duplicates.
    """

    index: str | None = None
    memory_bytes: int | None = None
    target_recall: float | None = None
    dedup: bool | None = None

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for values that :class:`IndexConfig` rejects."""
        self.over(IndexConfig())

    def over(self, config: IndexConfig) -> IndexConfig:
        """Return ``config`` with the values set here."""
        changes = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(config, **changes)
