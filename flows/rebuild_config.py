"""Configuration of the flow ``rebuild-index``."""

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Ge, Interval

from flows.form import DOMAIN, ENCODERS, LIST, Form
from infra import uris
from infra.download.downloader import DownloadPolicy
from infra.errors import ConfigError
from tasks.download.config import DownloadConfig, require_one_source
from tasks.embed.task import EmbedConfig
from tasks.index.config import IndexConfig, IndexOverrides
from tasks.promotion.config import DatabaseGates
from tasks.references.domain_name import require_domain


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RebuildIndexConfig(Form):
    """Changes to the champion of a domain. Stage settings that are None are those that the champion was built with.

    Attributes:
        domain: Domain whose champion is rebuilt.
        urls: URL list as for ``new-domain``: all URLs, or only new ones. Default: no new URLs.
        folder: Folder of images as for ``new-domain``, in place of ``urls``. Default: no new images.
        url_column: Column of the list with the URLs. Default: ``url``.
        only_failed: Use only the failed rows of a list that is the parquet of a download. Default: False.
        takedown: List of images to take down, by url, sha256 or key. Earlier takedowns stay. Default: no new ones.
        compact: Rewrite the shards that hold images taken down. Default: False.
        compact_above: Share of rows taken down above which shards are rewritten without ``compact``, in (0, 1].
            Default: 0.1.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        retry_failed: Retry listed URLs that failed before. Default: False.
        wait_s: Seconds to wait for another writer of this domain before failing. Default: 0.
        verify: Check the digests of files that earlier runs committed, not only that they exist. Default: False.
        download: Download settings.
        refresh: Request the stored URLs again, and replace the images that have changed. Default: False.
        host_rate: Requests per second to one host, which overrides ``download``; 0 is unlimited. Default: 10, because
            the champion does not record it.
        embed: Embedding settings.
        index: Index settings.
        index_changes: Single settings that override ``index``.
        gates: Gates that a version with changes must pass to become the champion. Default: only its target recall.
    """

    COMMON: ClassVar = (
        "domain", "urls", "folder", "takedown", "compact", "embed.encoder", "index_changes.target_recall", "root",
    )  # fmt: skip
    CHOICES: ClassVar = {"encoder": ENCODERS}

    domain: Annotated[str, DOMAIN]
    urls: Annotated[str | tuple[str, ...] | None, LIST] = None
    folder: str | None = None
    url_column: str | None = None
    only_failed: bool = False
    takedown: str | None = None
    compact: bool = False
    compact_above: Annotated[float, Interval(gt=0, le=1)] = 0.1
    root: str | None = None
    retry_failed: bool = False
    refresh: bool = False
    wait_s: Annotated[float, Ge(0)] = 0.0
    verify: bool = False
    download: DownloadConfig | None = None
    host_rate: float | None = None
    embed: EmbedConfig | None = None
    index: IndexConfig | None = None
    index_changes: IndexOverrides = dataclasses.field(default_factory=IndexOverrides)
    gates: DatabaseGates | None = None

    def __post_init__(self) -> None:
        """Validate the fields."""
        uris.hide_fields(self, "urls", "folder", "takedown", "root")
        require_one_source(self.urls, self.folder, optional=True)
        require_domain(self.domain)
        if not 0 < self.compact_above <= 1:
            raise ConfigError(f"compact_above is out of range: {self.compact_above}; give a share in (0, 1]")
        if self.host_rate is not None:
            DownloadPolicy(host_rate=self.host_rate)
        if self.wait_s < 0:
            raise ConfigError(f"wait_s is out of range: {self.wait_s}; give 0 or more seconds")
