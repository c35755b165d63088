"""Flow of the whole pipeline for one domain: download -> embed -> index -> register, and optionally a generator."""

import dataclasses
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from prefect import flow

from flows.adopt_generator import AdoptGeneratorConfig, adopt_generator
from flows.deployed_run import deployable
from flows.form import DOMAIN, ENCODERS, LIST, Form
from flows.run_page import show_database
from flows.train_generator import TrainedGenerator, TrainGeneratorConfig, train_generator
from infra import compute, uris
from infra.errors import ConfigError
from infra.storage.lease import lease
from model.saved_generator import BUNDLED_GENERATOR
from tasks.download.config import DownloadConfig, list_options, require_one_source
from tasks.download.task import download
from tasks.embed.task import EmbedConfig, embed
from tasks.evaluate.config import check_weights
from tasks.evaluate.task import EvaluateConfig
from tasks.index.config import IndexConfig
from tasks.index.task import index
from tasks.references.domain_folder import DomainFolder
from tasks.references.domain_name import require_domain
from tasks.references.types import DatabaseVersion, EmbeddingShards, ImageShards, StageResult
from tasks.register import RegistrationResult, register_database
from tasks.stage import settings_of
from tasks.train.config import TrainConfig
from tasks.train.inputs import check_inputs
from tasks.upkeep.policy import required_takedown

RECIPE = {
    "anyOf": [
        {"type": "string", "title": "recipe", "enum": ["own_domain", "demo_cpu", "stickers_h100", "photos_h100"]},
        {"type": "null"},
    ],
    "description": "Settings to start from; see flows/recipes.py. photos_h100 needs the autoencoder of train.",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewDomainConfig(Form):
    """URL list or image folder of a domain, and the settings of each stage.

    Attributes:
        domain: Domain name: lower-case letters, digits, hyphens.
        urls: URL list, local or remote: a file, folder or pattern, or several. See docs/reference/list-formats.md.
        folder: Folder of image files or webdataset tars, in place of ``urls``.
        url_column: Column of the list with the URLs. Default: ``url``.
        only_failed: Use only the failed rows of a list that is the parquet of a download. Default: False.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        download: Download settings.
        embed: Embedding settings.
        index: Index settings.
        train: Training settings. Default: no training; without ``generator`` only the database is built.
        generator: Generator to adopt without training: "sticker-generator", or the local folder of a saved pipeline.
            Default: None.
        evaluate: Evaluation settings of the generator.
        trust: Treat a generator's folder outside of the root like one below it; see SECURITY.md. Default: False.
        wait_s: Seconds to wait for another writer of this domain before failing. Default: 0.
        verify: Check the digests of files that earlier runs committed, not only that they exist. Default: False.
    """

    COMMON: ClassVar = (
        "domain",
        "urls",
        "folder",
        "recipe",
        "embed.encoder",
        "index.target_recall",
        "generator",
        "root",
    )
    CHOICES: ClassVar = {"encoder": ENCODERS, "generator": (BUNDLED_GENERATOR,)}
    EXTRA: ClassVar = {"recipe": RECIPE}

    domain: Annotated[str, DOMAIN]
    urls: Annotated[str | tuple[str, ...] | None, LIST] = None
    folder: str | None = None
    url_column: str | None = None
    only_failed: bool = False
    root: str | None = None
    download: DownloadConfig = dataclasses.field(default_factory=DownloadConfig)
    embed: EmbedConfig = dataclasses.field(default_factory=EmbedConfig)
    index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
    train: TrainConfig | None = None
    generator: str | None = None
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    trust: bool = False
    wait_s: Annotated[float, Ge(0)] = 0.0
    verify: bool = False

    def __post_init__(self) -> None:
        """Validate the fields."""
        uris.hide_fields(self, "urls", "folder", "root", "generator")
        require_one_source(self.urls, self.folder)
        require_domain(self.domain)
        if self.wait_s < 0:
            raise ConfigError(f"wait_s is out of range: {self.wait_s}; give 0 or more seconds")
        if self.train is not None and self.generator is not None:
            raise ConfigError(
                "train and generator are both given; to fine-tune a generator, set train.start_from instead"
            )

    @classmethod
    def base_of(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the config of the recipe, if the form names one."""
        if "recipe" not in given:
            return super(NewDomainConfig, cls).base_of(given)
        from flows.recipes import recipe_of

        return dataclasses.asdict(recipe_of(given))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """Results of the flow, with the duration of each stage and whether it was skipped."""

    images: StageResult[ImageShards]
    embeddings: StageResult[EmbeddingShards]
    database: StageResult[DatabaseVersion]
    registered: RegistrationResult
    trained: TrainedGenerator | None  # trained by this flow, or adopted
    seconds: dict[str, float]
    skipped: dict[str, bool]


@flow(name="new-domain", flow_run_name="new-domain-{config.domain}", validate_parameters=True)
@deployable
def new_domain(config: NewDomainConfig) -> Domain:
    """Build a domain's database from a URL list, and a generator if configured, and register them.

    A version becomes the champion if its gates pass and the champion is not pinned; see :mod:`tasks.promote`.
    """
    settings = settings_of(config.root)
    folder = DomainFolder.of(settings, config.domain)
    if config.train is not None:
        check_inputs(config.train)
        check_weights(config.evaluate)
    with compute.cluster(settings.ray_address, settings.cpus):
        with lease(folder.uri, holder=f"new-domain {config.domain}", wait_s=config.wait_s) as domain_lease:
            takedown = required_takedown(config.domain, settings)
            images = download(
                config.urls or config.folder or (),
                folder,
                config.download,
                options=list_options(config),
                takedown=takedown,
                verify=config.verify,
            )
            embeddings = embed(images.reference, folder, config.embed, verify=config.verify)
            database = index(embeddings.reference, folder, config.index, takedown=takedown, verify=config.verify)
            domain_lease.check()
            seconds = {"download": images.seconds, "embed": embeddings.seconds, "index": database.seconds}
            registered = register_database(config.domain, database.reference, settings, None, seconds=seconds)
            show_database(config.domain, database.reference, registered, settings)
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
