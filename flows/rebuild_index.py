"""Flow that updates a domain's database: add new images, hide images taken down, register the result.

The key of each step contains the champion that it starts from and the step's inputs, and the champion alias moves
last. So a killed rebuild resumes, and one without changes creates no version.

Takedowns come first, in a version of their own. It becomes the champion before new URLs are downloaded, anything is
embedded again or shards are compacted, and it remains the champion if one of these fails.
"""

import dataclasses

from prefect import flow

from infra import compute, logs, uris
from infra.settings import Settings
from infra.storage.lease import lease
from model.errors import ModelError
from tasks.download.task import DownloadConfig, download
from tasks.embed.task import EmbedConfig, embed
from tasks.index.task import IndexConfig, IndexOverrides, index
from tasks.references.lineage import embeddings_of, images_of, takedown_of
from tasks.references.trust import open_named
from tasks.references.types import (
    DatabaseVersion,
    EmbeddingShards,
    ImageShards,
    Made,
    Reference,
    StageResult,
    Takedown,
    config_from_manifest,
)
from tasks.register import RegistrationResult, register_database
from tasks.stage import base_of, check_files, require_domain, settings_of
from tasks.upkeep.compact import compact
from tasks.upkeep.policy import merge_with_existing
from tasks.upkeep.takedown import match_rows, rolled_back_on, take_down


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RebuildIndexConfig:
    """Changes to the champion of a domain. Stage settings that are None are those that the champion was built with.

    Attributes:
        domain: Domain whose champion is rebuilt.
        urls: URL list as for ``new-domain``: all URLs, or only new ones. Default: no new URLs.
        takedown: List of images to take down, by url, sha256 or key. Earlier takedowns stay. Default: no new ones.
        compact: Rewrite the shards that hold images taken down. Default: False.
        compact_above: Share of rows taken down above which shards are rewritten without ``compact``, in (0, 1].
            Default: 0.1.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        retry_failed: Retry listed URLs that failed before. Default: False.
        wait_s: Seconds to wait for another writer of this domain before failing. Default: 0.
        verify: Check the digests of files that earlier runs committed, not only that they exist. Default: False.
        download: Download settings.
        embed: Embedding settings.
        index: Index settings.
        index_changes: Single settings that override ``index``.
    """

    domain: str
    urls: str | None = None
    takedown: str | None = None
    compact: bool = False
    compact_above: float = 0.1
    root: str | None = None
    retry_failed: bool = False
    wait_s: float = 0.0
    verify: bool = False
    download: DownloadConfig | None = None
    embed: EmbedConfig | None = None
    index: IndexConfig | None = None
    index_changes: IndexOverrides = dataclasses.field(default_factory=IndexOverrides)

    def __post_init__(self) -> None:
        """Validate the fields."""
        uris.hide_fields(self, "urls", "takedown", "root")
        require_domain(self.domain)
        if not 0 < self.compact_above <= 1:
            raise ValueError(f"compact_above is out of range: {self.compact_above}; give a share in (0, 1]")
        if self.wait_s < 0:
            raise ValueError(f"wait_s is out of range: {self.wait_s}; give 0 or more seconds")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A database and its inputs."""

    database: DatabaseVersion
    embeddings: EmbeddingShards
    images: ImageShards
    takedown: Takedown | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """Champion before and after the rebuild; seconds, and whether skipped, by stage that ran."""

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
def rebuild_index(config: RebuildIndexConfig) -> Rebuilt:
    """Add new URLs to a domain's champion, hide and compact images taken down, and register the result as champion."""
    settings = settings_of(config.root)
    with lease(
        base_of(settings, config.domain), holder=f"rebuild-index {config.domain}", wait_s=config.wait_s
    ) as domain_lease:
        before = after = champion_of(config.domain, settings)
        required = merge_with_existing(base_of(settings, config.domain), settings.cache_folder, before.takedown)
        registered: RegistrationResult | None = None
        seconds: dict[str, float] = {}
        skipped: dict[str, bool] = {}
        hides = config.takedown is not None or required != before.takedown
        with (
            compute.cluster(settings.ray_address, settings.cpus),
            rolled_back_on(base_of(settings, config.domain), ModelError, but=lambda: after.takedown),
        ):
            for part in _split_takedown(config, hides):
                if part is config:  # a takedown must not fail because of a damaged file
                    check_files(*_reused_artifacts(config, after), verify=config.verify)
                steps = _Steps(part, settings, after, required)
                try:
                    rebuilt = steps.run()
                except ModelError as error:  # e.g. no row would remain: hide them in the version with the additions
                    if part is config:
                        raise
                    logs.get("stage").warning("%-11s not hidden in a version of its own: %s", "takedown", error)
                    continue
                domain_lease.check()
                if rebuilt is not after:
                    registered, after = register_database(config.domain, rebuilt.database, settings, None), rebuilt
                required = after.takedown
                seconds |= {name: took + seconds.get(name, 0.0) for name, took in steps.seconds.items()}
                skipped |= {name: was and skipped.get(name, True) for name, was in steps.skipped.items()}
    if registered is None:
        logs.get("stage").info(
            "%-11s %s: no new images and no takedowns; the champion is unchanged", "rebuild", config.domain
        )
    return Rebuilt(before=before, after=after, registered=registered, seconds=seconds, skipped=skipped)


def _split_takedown(config: RebuildIndexConfig, hides: bool) -> list[RebuildIndexConfig]:
    """Split a rebuild into one config per version: if ``hides``, the takedown alone comes first."""
    if not hides:
        return [config]
    hide = dataclasses.replace(
        config, urls=None, embed=None, index=None, index_changes=IndexOverrides(), compact=False, compact_above=1.0
    )
    return [hide, config]


def _reused_artifacts(config: RebuildIndexConfig, state: State) -> list[Reference]:
    """Return the artifacts whose files the new version reuses; images only if some are added or all is verified."""
    images = [state.images] if config.urls is not None or config.verify else []
    return [*images, state.embeddings, state.database]


def champion_of(domain: str, settings: Settings) -> State:
    """Return the champion of a domain and its inputs. Raises ``NotFoundError`` if there is none."""
    database, _ = open_named(DatabaseVersion, domain, settings)
    embeddings = embeddings_of(database)
    return State(database=database, embeddings=embeddings, images=images_of(embeddings), takedown=takedown_of(database))


class _Steps:
    """The stages in order; each runs only if an earlier one changed something.

    ``required`` has every takedown of the domain. After a rollback of the champion these are more than it hides.
    """

    def __init__(
        self, config: RebuildIndexConfig, settings: Settings, before: State, required: Takedown | None
    ) -> None:
        self._config, self._before, self._required = config, before, required
        self._base, self._cache = base_of(settings, config.domain), settings.cache_folder
        self.seconds: dict[str, float] = {}
        self.skipped: dict[str, bool] = {}

    def run(self) -> State:
        """Run the stages, and return the new state, or the state before if nothing changed."""
        takedown = self._take_down()
        images = self._download(takedown)
        embeddings = self._before.embeddings
        if images != self._before.images or self._config.embed is not None:
            embedded = self._note(
                "embed",
                embed(
                    images,
                    self._base,
                    self._embed_config(),
                    cache=self._cache,
                    previous=embeddings,
                    verify=self._config.verify,
                ),
            )
            embeddings = embedded if embedded.digest != embeddings.digest else embeddings
        images, embeddings = self._compact(images, embeddings, takedown)
        stored = config_from_manifest(IndexConfig, self._before.database.manifest().config)
        config = self._config.index_changes.over(self._config.index or stored)
        if (embeddings, takedown, config) == (self._before.embeddings, self._before.takedown, stored):
            self.skipped["index"] = True
            return self._before
        built = index(
            embeddings,
            self._base,
            config,
            cache=self._cache,
            previous=self._before.database,
            takedown=takedown,
            verify=self._config.verify,
        )
        database = self._note("index", built)
        return State(database=database, embeddings=embeddings, images=images, takedown=takedown)

    def _take_down(self) -> Takedown | None:
        if self._config.takedown is None:
            return self._required
        taken_down = take_down(
            self._config.takedown, self._before.images, self._base, cache=self._cache, previous=self._required
        )
        return self._note("takedown", taken_down)

    def _download(self, takedown: Takedown | None) -> ImageShards:
        images = self._before.images
        if self._config.urls is None:
            return images
        config = self._config.download or config_from_manifest(DownloadConfig, images.manifest().config)
        config = dataclasses.replace(config, retry_failed=self._config.retry_failed or config.retry_failed)
        return self._note(
            "download",
            download(
                self._config.urls,
                self._base,
                config,
                cache=self._cache,
                previous=images,
                takedown=takedown,
                verify=self._config.verify,
            ),
        )

    def _embed_config(self) -> EmbedConfig:
        """Return the settings of the champion, with a GPU if it used one, because that decides the precision."""
        stored = self._before.embeddings.manifest().config
        config = self._config.embed or config_from_manifest(EmbedConfig, stored)
        if self._config.embed is None and stored.get("precision") == "bfloat16":
            config = dataclasses.replace(config, gpus_per_worker=1)
        return config

    def _compact(
        self, images: ImageShards, embeddings: EmbeddingShards, takedown: Takedown | None
    ) -> tuple[ImageShards, EmbeddingShards]:
        if takedown is None:
            return images, embeddings
        if not self._config.compact:
            hidden = self._before.database.manifest().info["taken_down"]
            if takedown != self._before.takedown:
                hidden = len(match_rows(takedown, embeddings, self._cache))
            if hidden <= self._config.compact_above * embeddings.rows:
                return images, embeddings
        compacted, rows = compact(images, embeddings, takedown, self._base, cache=self._cache)
        self._note("compact", rows)
        return compacted.reference, rows.reference

    def _note(self, name: str, outcome: StageResult[Made]) -> Made:
        self.seconds[name], self.skipped[name] = outcome.seconds, outcome.skipped
        return outcome.reference
