"""Flow that updates a domain's database: add new images, hide images taken down, register the result.

The key of each step contains the champion that it starts from and the step's inputs, and the champion alias moves
last. So a killed rebuild resumes, and one without changes creates no version.

Takedowns come first, in a version of their own. It becomes the champion before new URLs are downloaded, anything is
embedded again or shards are compacted, and it remains the champion if one of these fails.
"""

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Ge, Interval
from prefect import flow

from flows.deployed_run import deployable
from flows.form import DOMAIN, ENCODERS, LIST, Form
from flows.run_page import show_database
from infra import compute, logs, uris
from infra.download.downloader import DownloadPolicy
from infra.errors import ConfigError
from infra.settings import Settings
from infra.storage.lease import lease
from model.errors import ModelError
from tasks.download.config import DownloadConfig, list_options, require_one_source
from tasks.download.refresh import refresh
from tasks.download.task import download
from tasks.embed.task import EmbedConfig, embed
from tasks.index.config import IndexConfig, IndexOverrides
from tasks.index.task import index
from tasks.promotion.config import DatabaseGates
from tasks.references.domain_folder import DomainFolder
from tasks.references.domain_name import require_domain
from tasks.references.lineage import embeddings_of, images_of, takedown_of
from tasks.references.takedown import match_rows
from tasks.references.trust import open_named
from tasks.references.types import (
    DatabaseVersion,
    EmbeddingShards,
    ImageShards,
    Reference,
    Takedown,
    config_from_manifest,
)
from tasks.register import RegistrationResult, register_database
from tasks.stage import StageTimings, check_files, settings_of
from tasks.upkeep.compact import compact
from tasks.upkeep.policy import merge_with_existing
from tasks.upkeep.takedown import rolled_back_on, take_down


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A database and its inputs."""

    database: DatabaseVersion
    embeddings: EmbeddingShards
    images: ImageShards
    takedown: Takedown | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """Database before and after the rebuild; seconds, and whether skipped, by stage that ran.

    The new version is only a candidate if the champion is pinned.
    """

    before: State
    after: State
    registered: RegistrationResult | None  # None: nothing changed
    seconds: dict[str, float]
    skipped: dict[str, bool]

    @property
    def unchanged(self) -> bool:
        """Return True if the rebuild registered no version."""
        return self.registered is None


@flow(name="rebuild-index", flow_run_name="rebuild-index-{config.domain}", validate_parameters=True)
@deployable
def rebuild_index(config: RebuildIndexConfig) -> Rebuilt:
    """Add new URLs to a domain's champion, hide and compact images taken down, and register the result.

    It becomes the champion unless a rollback has pinned the present one; see :mod:`tasks.promote`.
    """
    settings = settings_of(config.root)
    folder, timings = DomainFolder.of(settings, config.domain), StageTimings()
    with lease(folder.uri, holder=f"rebuild-index {config.domain}", wait_s=config.wait_s) as domain_lease:
        before = champion = champion_of(config.domain, settings)
        registered: RegistrationResult | None = None

        def register(state: State) -> None:
            nonlocal champion, registered
            domain_lease.check()
            if state is not champion:
                registered = register_database(
                    config.domain, state.database, settings, None, gates=config.gates, seconds=timings.seconds
                )
                champion = state

        # After a rollback of the champion, the domain has more takedowns than the champion hides.
        takedown = merge_with_existing(folder, before.takedown)
        with (
            compute.cluster(settings.ray_address, settings.cpus),
            rolled_back_on(folder, ModelError, but=lambda: champion.takedown),
        ):
            if config.takedown is not None:
                outcome = take_down(config.takedown, before.images, folder, previous=takedown)
                takedown = timings.add("takedown", outcome)
            if takedown != before.takedown:
                try:
                    register(hide_takedown(config, before, takedown, folder, timings))
                except ModelError as error:  # e.g. no row would remain: hide them in the version with the additions
                    logs.get("stage").warning("%-11s not hidden in a version of its own: %s", "takedown", error)
            # Only now: a takedown must not fail because of a damaged file.
            check_files(*_reused_artifacts(config, champion), verify=config.verify)
            register(update(config, champion, takedown, folder, timings))
    show_database(config.domain, champion.database, registered, settings)
    if registered is None:
        logs.get("stage").info(
            "%-11s %s: no new images and no takedowns; the champion is unchanged", "rebuild", config.domain
        )
    return Rebuilt(
        before=before, after=champion, registered=registered, seconds=timings.seconds, skipped=timings.skipped
    )


def hide_takedown(
    config: RebuildIndexConfig, champion: State, takedown: Takedown | None, folder: DomainFolder, timings: StageTimings
) -> State:
    """Return a version that differs from the champion only in the rows that it hides."""
    hiding = dataclasses.replace(champion, takedown=takedown)
    return _index(config, champion, hiding, _index_config(champion), folder, timings)


def update(
    config: RebuildIndexConfig, champion: State, takedown: Takedown | None, folder: DomainFolder, timings: StageTimings
) -> State:
    """Download, embed, compact and index. Return the champion itself if nothing changed."""
    images = _refresh(config, champion, takedown, folder, timings)
    images = _download(config, champion, images, takedown, folder, timings)
    embeddings = _embed(config, champion, images, folder, timings)
    if takedown is not None and _compacts(config, champion, embeddings, takedown, folder):
        compacted, rows = compact(images, embeddings, takedown, folder)
        images, embeddings = compacted.reference, timings.add("compact", rows)
    updated = dataclasses.replace(champion, images=images, embeddings=embeddings, takedown=takedown)
    index_config = config.index_changes.over(config.index or _index_config(champion))
    return _index(config, champion, updated, index_config, folder, timings)


def _reused_artifacts(config: RebuildIndexConfig, state: State) -> list[Reference]:
    """Return the artifacts whose files the new version reuses; images only if some are added or all is verified."""
    changed = config.urls or config.folder or config.refresh or config.verify
    images = [state.images] if changed else []
    return [*images, state.embeddings, state.database]


def champion_of(domain: str, settings: Settings) -> State:
    """Return the champion of a domain and its inputs. Raises ``NotFoundError`` if there is none."""
    database, _ = open_named(DatabaseVersion, domain, settings)
    embeddings = embeddings_of(database)
    return State(database=database, embeddings=embeddings, images=images_of(embeddings), takedown=takedown_of(database))


def _index_config(champion: State) -> IndexConfig:
    return config_from_manifest(IndexConfig, champion.database.manifest().config)


def _download(
    config: RebuildIndexConfig,
    champion: State,
    images: ImageShards,
    takedown: Takedown | None,
    folder: DomainFolder,
    timings: StageTimings,
) -> ImageShards:
    """Add the new URLs of the list, or the new images of the folder, to ``images``."""
    source = config.urls or config.folder
    if source is None:
        return images
    settings = _download_config(config, champion)
    settings = dataclasses.replace(settings, retry_failed=config.retry_failed or settings.retry_failed)
    outcome = download(
        source,
        folder,
        settings,
        options=list_options(config),
        previous=images,
        takedown=takedown,
        verify=config.verify,
    )
    return timings.add("download", outcome)


def _refresh(
    config: RebuildIndexConfig, champion: State, takedown: Takedown | None, folder: DomainFolder, timings: StageTimings
) -> ImageShards:
    """Replace the images of the champion that have changed at their URLs, if the config says so."""
    if not config.refresh:
        return champion.images
    settings = _download_config(config, champion)
    return timings.add("refresh", refresh(champion.images, folder, settings, takedown=takedown))


def _download_config(config: RebuildIndexConfig, champion: State) -> DownloadConfig:
    settings = config.download or config_from_manifest(DownloadConfig, champion.images.manifest().config)
    return settings if config.host_rate is None else settings.with_policy(host_rate=config.host_rate)


def _embed(
    config: RebuildIndexConfig, champion: State, images: ImageShards, folder: DomainFolder, timings: StageTimings
) -> EmbeddingShards:
    if images == champion.images and config.embed is None:
        return champion.embeddings
    stored = champion.embeddings.manifest().config
    settings = config.embed or config_from_manifest(EmbedConfig, stored)
    if config.embed is None and stored.get("precision") == "bfloat16":  # made on a GPU, which decides the precision
        settings = dataclasses.replace(settings, gpus_per_worker=1)
    outcome = embed(images, folder, settings, previous=champion.embeddings, verify=config.verify)
    embedded = timings.add("embed", outcome)
    return embedded if embedded.digest != champion.embeddings.digest else champion.embeddings


def _compacts(
    config: RebuildIndexConfig,
    champion: State,
    embeddings: EmbeddingShards,
    takedown: Takedown,
    folder: DomainFolder,
) -> bool:
    """Return True if shards are rewritten: on request, or above the share of rows taken down in the config."""
    if config.compact:
        return True
    hidden = champion.database.manifest().info["taken_down"]
    if takedown != champion.takedown:
        hidden = len(match_rows(takedown, embeddings, folder.cache))
    return bool(hidden > config.compact_above * embeddings.rows)


def _index(
    config: RebuildIndexConfig,
    champion: State,
    wanted: State,
    index_config: IndexConfig,
    folder: DomainFolder,
    timings: StageTimings,
) -> State:
    """Index the embeddings of ``wanted``. Return the champion itself if it has the same rows and settings."""
    same_rows = (wanted.embeddings, wanted.takedown) == (champion.embeddings, champion.takedown)
    if same_rows and index_config == _index_config(champion):
        timings.skip("index")
        return champion
    outcome = index(
        wanted.embeddings,
        folder,
        index_config,
        previous=champion.database,
        takedown=wanted.takedown,
        verify=config.verify,
    )
    return dataclasses.replace(wanted, database=timings.add("index", outcome))
