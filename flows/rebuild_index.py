"""The flow that keeps a domain's database up to date: add what is new, hide what was taken down, register the result.

Every step is keyed by the champion it starts from and by what it is given, and the champion moves last: a rebuild that
was killed goes on where it was, and one that finds nothing to do makes no version. What is to be taken down waits for
nothing: it is hidden in a version of its own, which is the champion before the first new URL is asked for, anything is
embedded anew or a tar is read for compaction, and stays it when that fails.
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
    """What changes in a domain's champion. Settings of a stage that are not given are those it was made with."""

    domain: str
    urls: str | None = None  # a list as new-domain takes it: all URLs, or new ones alone
    takedown: str | None = None  # a list of url, sha256 or key; adds to what was taken down before
    compact: bool = False  # rewrite the shards that hold something taken down, however little
    compact_above: float = 0.1  # and without being told, from this fraction of the rows on
    root: str | None = None
    retry_failed: bool = False  # ask again for listed URLs that failed
    wait_s: float = 0.0  # for another writer of this domain to end, before this one is refused
    verify: bool = False  # check the digests of what earlier runs committed, not only that it is there
    download: DownloadConfig | None = None
    embed: EmbedConfig | None = None
    index: IndexConfig | None = None
    index_changes: IndexOverrides = dataclasses.field(default_factory=IndexOverrides)  # over ``index``

    def __post_init__(self) -> None:
        """Refuse a name that is none, and a bound that cannot be one."""
        uris.hide_fields(self, "urls", "takedown", "root")
        require_domain(self.domain)
        if not 0 < self.compact_above <= 1 or self.wait_s < 0:
            raise ValueError("compact_above is a fraction of the rows, above 0 and at most 1; wait_s is 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A database and what it is made from."""

    database: DatabaseVersion
    embeddings: EmbeddingShards
    images: ImageShards
    takedown: Takedown | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """The champion before and after, and what each stage that had to do with it took."""

    before: State
    after: State
    registered: RegistrationResult | None  # None: nothing changed
    seconds: dict[str, float]
    skipped: dict[str, bool]

    @property
    def unchanged(self) -> bool:
        """Whether there was nothing to do."""
        return self.registered is None


@flow(name="rebuild-index", flow_run_name="rebuild-index-{config.domain}", validate_parameters=True)
def rebuild_index(config: RebuildIndexConfig) -> Rebuilt:
    """Add new URLs to a domain's champion, hide and compact what was taken down; register the result as champion."""
    settings = settings_of(config.root)
    with lease(base_of(settings, config.domain), holder=f"rebuild-index {config.domain}", wait_s=config.wait_s) as held:
        before = after = champion_of(config.domain, settings)
        standing = merge_with_existing(base_of(settings, config.domain), settings.cache_folder, before.takedown)
        registered: RegistrationResult | None = None
        seconds: dict[str, float] = {}
        skipped: dict[str, bool] = {}
        hides = config.takedown is not None or standing != before.takedown
        with (
            compute.cluster(settings.ray_address, settings.cpus),
            rolled_back_on(base_of(settings, config.domain), ModelError, but=lambda: after.takedown),
        ):
            for part in _in_turn(config, hides):
                if part is config:  # what is hidden first does not wait for a damaged file
                    check_files(*_taken_over(config, after), verify=config.verify)
                steps = _Steps(part, settings, after, standing)
                try:
                    made = steps.run()
                except ModelError as error:  # nothing would be left to search: hidden together with what is added
                    if part is config:
                        raise
                    logs.get("stage").warning("%-11s not hidden by itself: %s", "takedown", error)
                    continue
                held.check()
                if made is not after:
                    registered, after = register_database(config.domain, made.database, settings, None), made
                standing = after.takedown
                seconds |= {name: took + seconds.get(name, 0.0) for name, took in steps.seconds.items()}
                skipped |= {name: was and skipped.get(name, True) for name, was in steps.skipped.items()}
    if registered is None:
        logs.get("stage").info(
            "%-11s %s: nothing new, nothing taken down; the champion stays", "rebuild", config.domain
        )
    return Rebuilt(before=before, after=after, registered=registered, seconds=seconds, skipped=skipped)


def _in_turn(config: RebuildIndexConfig, hides: bool) -> list[RebuildIndexConfig]:
    """What is rebuilt in one version each: where something is taken down, that alone, and then whatever else is due."""
    if not hides:
        return [config]
    hide = dataclasses.replace(
        config, urls=None, embed=None, index=None, index_changes=IndexOverrides(), compact=False, compact_above=1.0
    )
    return [hide, config]


def _taken_over(config: RebuildIndexConfig, state: State) -> list[Reference]:
    """What the new version takes files over from; of the images only where some are added, or all is verified."""
    images = [state.images] if config.urls is not None or config.verify else []
    return [*images, state.embeddings, state.database]


def champion_of(domain: str, settings: Settings) -> State:
    """The domain's champion and what it was made from. Raises ``NotFoundError`` when there is none."""
    database, _ = open_named(DatabaseVersion, domain, settings)
    embeddings = embeddings_of(database)
    return State(database=database, embeddings=embeddings, images=images_of(embeddings), takedown=takedown_of(database))


class _Steps:
    """The stages in their order, each only where the one before has changed something.

    ``standing`` is what was ever taken down, more than the state before hides where the champion was moved back.
    """

    def __init__(
        self, config: RebuildIndexConfig, settings: Settings, before: State, standing: Takedown | None
    ) -> None:
        self._config, self._before, self._standing = config, before, standing
        self._base, self._cache = base_of(settings, config.domain), settings.cache_folder
        self.seconds: dict[str, float] = {}
        self.skipped: dict[str, bool] = {}

    def run(self) -> State:
        """The new state, or the one before itself."""
        takedown = self._taken_down()
        images = self._downloaded(takedown)
        embeddings = self._before.embeddings
        if images != self._before.images or self._config.embed is not None:
            made = self._note(
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
            embeddings = made if made.digest != embeddings.digest else embeddings
        images, embeddings = self._compacted(images, embeddings, takedown)
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

    def _taken_down(self) -> Takedown | None:
        if self._config.takedown is None:
            return self._standing
        made = take_down(
            self._config.takedown, self._before.images, self._base, cache=self._cache, previous=self._standing
        )
        return self._note("takedown", made)

    def _downloaded(self, takedown: Takedown | None) -> ImageShards:
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
        """As the champion was embedded: on a GPU if it was, since that decides the precision."""
        stored = self._before.embeddings.manifest().config
        config = self._config.embed or config_from_manifest(EmbedConfig, stored)
        if self._config.embed is None and stored.get("precision") == "bfloat16":
            config = dataclasses.replace(config, gpus_per_worker=1)
        return config

    def _compacted(
        self, images: ImageShards, embeddings: EmbeddingShards, takedown: Takedown | None
    ) -> tuple[ImageShards, EmbeddingShards]:
        if takedown is None:
            return images, embeddings
        if not self._config.compact:
            named = self._before.database.manifest().info["taken_down"]
            if takedown != self._before.takedown:
                named = len(match_rows(takedown, embeddings, self._cache))
            if named <= self._config.compact_above * embeddings.rows:
                return images, embeddings
        slimmer, rows = compact(images, embeddings, takedown, self._base, cache=self._cache)
        self._note("compact", rows)
        return slimmer.reference, rows.reference

    def _note(self, name: str, outcome: StageResult[Made]) -> Made:
        self.seconds[name], self.skipped[name] = outcome.seconds, outcome.skipped
        return outcome.reference
