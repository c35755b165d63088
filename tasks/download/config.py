"""Settings of a download."""

import dataclasses

from infra.download.downloader import SHARD_ROWS, DownloadPolicy
from infra.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """Settings of the download stage."""

    shard_rows: int = 1000
    policy: DownloadPolicy = dataclasses.field(default_factory=DownloadPolicy)
    max_lost_fraction: float = 0.01  # share of shards (not URLs) that may fail before the stage fails
    workers: int = 2  # shards downloaded at once, each with the policy's threads
    retry_failed: bool = False  # request URLs again that failed in the previous version

    def __post_init__(self) -> None:
        """Check that img2dataset's keys can number the rows of a shard. Raises ``ConfigError``."""
        if not 1 <= self.shard_rows <= SHARD_ROWS:
            raise ConfigError(
                f"shard_rows is {self.shard_rows}; use 1 to {SHARD_ROWS}, because img2dataset's keys number "
                "the rows of a shard with four digits"
            )
