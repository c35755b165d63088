"""The flow of the whole line, for one domain: download -> embed -> index -> register, and a generator if asked for."""

import dataclasses
from typing import Any

from prefect import flow

from flows.adopt_generator import AdoptGeneratorConfig, adopt_generator
from flows.train_generator import TrainedGenerator, TrainGeneratorConfig, train_generator
from infra import compute, uris
from infra.storage.lease import lease
from tasks.download.task import DownloadConfig, download
from tasks.embed.task import EmbedConfig, embed
from tasks.evaluate.task import EvaluateConfig
from tasks.index.task import IndexConfig, index
from tasks.references.types import DatabaseVersion, EmbeddingShards, ImageShards, StageResult
from tasks.register import RegistrationResult, register_database
from tasks.stage import base_of, require_domain, settings_of
from tasks.train.setup import TrainConfig
from tasks.upkeep.policy import required_takedown


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewDomainConfig:
    """One domain: where its pictures are listed and how each stage treats them."""

    domain: str
    urls: str  # parquet, csv, tsv, json lines or text, local or remote, with a column ``url``
    root: str | None = None  # None: the settings' root
    download: DownloadConfig = dataclasses.field(default_factory=DownloadConfig)
    embed: EmbedConfig = dataclasses.field(default_factory=EmbedConfig)
    index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
    train: TrainConfig | None = None  # None: no training, and without ``generator`` the database alone
    generator: str | None = None  # to adopt as it is: a saved pipeline's local folder, or "sticker-generator"
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    trust: bool = False  # treat a generator's folder outside of the root like one below it; see SECURITY.md
    wait_s: float = 0.0  # for another writer of this domain to end, before this one is refused
    verify: bool = False  # check the digests of what earlier runs committed, not only that it is there

    def __post_init__(self) -> None:
        """Refuse a name that cannot be a folder and a registered model, two generators, and a wait that is none."""
        uris.hide_fields(self, "urls", "root", "generator")
        require_domain(self.domain)
        if self.wait_s < 0:
            raise ValueError("wait_s is 0 or more")
        if self.train is not None and self.generator is not None:
            raise ValueError("train and generator are both given; what a training starts from is train.start_from")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """What the flow made, and what each stage took."""

    images: StageResult[ImageShards]
    embeddings: StageResult[EmbeddingShards]
    database: StageResult[DatabaseVersion]
    registered: RegistrationResult
    trained: TrainedGenerator | None  # here, or elsewhere and adopted
    seconds: dict[str, float]
    skipped: dict[str, bool]


@flow(name="new-domain", flow_run_name="new-domain-{config.domain}", validate_parameters=True)
def new_domain(config: NewDomainConfig) -> Domain:
    """Make a domain's database from a URL list, and a generator if one is asked for; register both as champions."""
    settings = settings_of(config.root)
    base, cache = base_of(settings, config.domain), settings.cache_folder
    with compute.cluster(settings.ray_address, settings.cpus):
        with lease(base, holder=f"new-domain {config.domain}", wait_s=config.wait_s) as held:
            takedown = required_takedown(config.domain, settings, cache)
            images = download(config.urls, base, config.download, cache=cache, takedown=takedown, verify=config.verify)
            embeddings = embed(images.reference, base, config.embed, cache=cache, verify=config.verify)
            database = index(
                embeddings.reference, base, config.index, cache=cache, takedown=takedown, verify=config.verify
            )
            held.check()
            registered = register_database(config.domain, database.reference, settings, None)
        trained = None
        if config.train is not None:
            trained = train_generator(
                TrainGeneratorConfig(
                    domain=config.domain,
                    database=database.reference.uri,
                    root=config.root,
                    train=config.train,
                    evaluate=config.evaluate,
                )
            )
        elif config.generator is not None:
            trained = adopt_generator(
                AdoptGeneratorConfig(
                    domain=config.domain,
                    database=database.reference.uri,
                    root=config.root,
                    generator=config.generator,
                    trust=config.trust,
                    evaluate=config.evaluate,
                )
            )
    stages: dict[str, StageResult[Any] | RegistrationResult] = {
        "download": images,
        "embed": embeddings,
        "index": database,
        "register_database": registered,
    }
    seconds = {name: stage.seconds for name, stage in stages.items()} | (trained.seconds if trained else {})
    skipped = {name: stage.skipped for name, stage in stages.items()} | (trained.skipped if trained else {})
    return Domain(
        images=images,
        embeddings=embeddings,
        database=database,
        registered=registered,
        trained=trained,
        seconds=seconds,
        skipped=skipped,
    )
