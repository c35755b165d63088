"""Settings of an index."""

import dataclasses

from infra.errors import ConfigError
from model.retrieval.faiss_index import MEMORY_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Index type, size limits and recall target."""

    index: str = "auto"  # or any FAISS factory string
    memory_bytes: int = MEMORY_BYTES  # memory limit for the index in a searching process; determines the choice of auto
    target_recall: float = 0.95  # recall at 10 in [0, 1], for image and for text queries
    recall_queries: int = 256
    texts: tuple[str, ...] = ()  # text queries for the recall measurement
    shard_rows: int = 16_777_216  # maximum per index shard: 8 GB at 256 dimensions of float16
    near_duplicate_cosine: float = 0.995  # minimum cosine of near-duplicates; 1 disables the search for them
    dedup: bool = False  # return only one row of each group of near-duplicates
    max_drift: float = 0.25  # relative growth of the quantization error on new rows that triggers retraining
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
    """Index settings that replace those of the previous version, or the defaults. None keeps the existing value."""

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
