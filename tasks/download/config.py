"""Settings of a download, and of the list that it reads."""

import dataclasses
from typing import Annotated, Any, Protocol

from annotated_types import Ge, Interval

from infra.download.downloader import SHARD_ROWS, DownloadPolicy
from infra.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """Options for reading a URL list. The rows that result are part of a stage's key, and not these options.

    Attributes:
        url_column: Column with the URLs. Default: ``url``.
        only_failed: Use only the rows that failed, of a list that is the parquet of a download. Default: False.
        images: The location is not that of a list but a folder of image files. Default: False.
    """

    url_column: str | None = None
    only_failed: bool = False
    images: bool = False


class _Source(Protocol):
    """Fields of a flow's config that say what is downloaded."""

    @property
    def folder(self) -> str | None: ...
    @property
    def url_column(self) -> str | None: ...
    @property
    def only_failed(self) -> bool: ...


def list_options(config: _Source) -> ListOptions:
    """Return the options of a flow's config."""
    return ListOptions(url_column=config.url_column, only_failed=config.only_failed, images=config.folder is not None)


def require_one_source(urls: object, folder: str | None, *, optional: bool = False) -> None:
    """Raise ``ConfigError`` unless exactly one of a URL list and a folder is given, or with ``optional`` neither."""
    if urls and folder:
        raise ConfigError(f"urls and folder are both given: {urls}, {folder}; give one of them")
    if not urls and not folder and not optional:
        raise ConfigError("urls and folder are both missing; give one of them")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """Settings of the download stage.

    Attributes:
        shard_rows: URLs per shard, the unit of work and of resuming.
        policy: Limits on what may be fetched.
        max_lost_fraction: Share of shards, not of URLs, that may fail before the stage fails.
        workers: Shards downloaded at once, each with the threads of the policy.
        retry_failed: Request URLs again that failed in the previous version.
    """

    shard_rows: Annotated[int, Interval(ge=1, le=SHARD_ROWS)] = 1000
    policy: DownloadPolicy = dataclasses.field(default_factory=DownloadPolicy)
    max_lost_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.01
    workers: Annotated[int, Ge(1)] = 2
    retry_failed: bool = False

    def __post_init__(self) -> None:
        """Check that img2dataset's keys can number the rows of a shard. Raises ``ConfigError``."""
        if not 1 <= self.shard_rows <= SHARD_ROWS:
            raise ConfigError(
                f"shard_rows is {self.shard_rows}; use 1 to {SHARD_ROWS}, because img2dataset's keys number "
                "the rows of a shard with four digits"
            )

    def with_policy(self, **changes: Any) -> "DownloadConfig":
        """Return this config with changes to fields of its policy."""
        return dataclasses.replace(self, policy=dataclasses.replace(self.policy, **changes))

    def worker_policy(self) -> DownloadPolicy:
        """Return the policy of one worker: its share of the rate per host, because workers do not coordinate."""
        return dataclasses.replace(self.policy, host_rate=self.policy.host_rate / max(1, self.workers))
