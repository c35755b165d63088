"""Steps of the flow ``rebuild-index``: from the champion of a domain to the database that replaces it."""

import dataclasses

from flows.rebuild_config import RebuildIndexConfig
from infra.settings import Settings
from tasks.download.config import DownloadConfig, list_options
from tasks.download.refresh import refresh
from tasks.download.task import download
from tasks.embed.task import EmbedConfig, embed
from tasks.index.config import IndexConfig
from tasks.index.task import index
from tasks.references.domain_folder import DomainFolder
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
from tasks.stage import StageTimings
from tasks.upkeep.compact import compact


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A database and its inputs."""

    database: DatabaseVersion
    embeddings: EmbeddingShards
    images: ImageShards
    takedown: Takedown | None


def champion_of(domain: str, settings: Settings) -> State:
    """Return the champion of a domain and its inputs. Raises ``NotFoundError`` if there is none."""
    database, _ = open_named(DatabaseVersion, domain, settings)
    embeddings = embeddings_of(database)
    return State(database=database, embeddings=embeddings, images=images_of(embeddings), takedown=takedown_of(database))


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


def reused_artifacts(config: RebuildIndexConfig, state: State) -> list[Reference]:
    """Return the artifacts whose files the new version reuses; images only if some are added or all is verified."""
    changed = config.urls or config.folder or config.refresh or config.verify
    images = [state.images] if changed else []
    return [*images, state.embeddings, state.database]


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
