"""Flow that trains a generator on a committed database: neighbours -> train -> evaluate -> register."""

import dataclasses
from typing import Annotated, Any, ClassVar

from prefect import flow

from flows.deployed_run import deployable
from flows.form import DOMAIN, Form
from infra import compute, tracking, uris
from infra.registry_tags import DATABASE_PREFIX, champion_uri
from model.saved_generator import BUNDLED_GENERATOR
from tasks.evaluate.config import check_weights
from tasks.evaluate.task import EvaluateConfig, Evaluation, evaluate
from tasks.neighbours import find_neighbours
from tasks.references.domain_folder import DomainFolder
from tasks.references.domain_name import require_domain
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.trust import open_folder
from tasks.references.types import DatabaseVersion, Generator, StageResult, encoder_of
from tasks.register import RegistrationResult, register_generator
from tasks.stage import settings_of
from tasks.train.config import TrainConfig
from tasks.train.inputs import TrainingInputs, check_inputs
from tasks.train.task import train


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainGeneratorConfig(Form):
    """Settings of the flow: database to train on, training, and evaluation.

    Attributes:
        domain: Domain that the generator is stored under.
        database: URI of the committed folder of a database version.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        train: Training settings.
        evaluate: Evaluation settings.
        trust: Treat folders outside of the root like those below it; see SECURITY.md. Default: False.
    """

    COMMON: ClassVar = (
        "domain", "database", "train.start_from", "train.training.images", "train.training.batch_size",
        "train.training.learning_rate", "train.use_gpu", "root",
    )  # fmt: skip
    CHOICES: ClassVar = {"start_from": (BUNDLED_GENERATOR,)}

    domain: Annotated[str, DOMAIN]
    database: str
    root: str | None = None
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    trust: bool = False

    def __post_init__(self) -> None:
        """Validate the domain, and keep passwords in URIs out of the records of Prefect and MLflow."""
        require_domain(self.domain)
        uris.hide_fields(self, "database", "root")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainedGenerator:
    """Results of the flow.

    Attributes:
        generator: Trained generator.
        evaluation: Its evaluation.
        registered: Its registered version.
        seconds: Duration of each stage, by name.
        skipped: Whether each stage was skipped, by name.
    """

    generator: StageResult[Generator]
    evaluation: StageResult[Evaluation]
    registered: RegistrationResult
    seconds: dict[str, float]
    skipped: dict[str, bool]


@flow(name="train-generator", flow_run_name="train-{config.domain}", validate_parameters=True)
@deployable
def train_generator(config: TrainGeneratorConfig) -> TrainedGenerator:
    """Train a generator on the images of a database, evaluate it, and register it as a version of ``knn-diffusion``.

    It becomes the champion if the gates of :mod:`tasks.promote` pass.
    """
    settings = settings_of(config.root)
    folder = DomainFolder.of(settings, config.domain)
    database = open_folder(DatabaseVersion, config.database, settings, trust=config.trust)
    check_inputs(config.train, encoder_of(database.manifest()))
    check_weights(config.evaluate)
    embeddings = embeddings_of(database)
    images = images_of(embeddings)
    with (
        compute.cluster(settings.ray_address, settings.cpus),
        tracking.start_run(settings, experiment="train-generator", name=config.domain) as run,
    ):
        run.params(dataclasses.asdict(config))
        neighbours = find_neighbours(embeddings, database, folder, config.train.conditioning.pool)
        inputs = TrainingInputs(
            images=images, embeddings=embeddings, database=database, neighbours=neighbours.reference
        )
        generator = train(inputs, folder, config.train, run=run)
        evaluation = evaluate(generator.reference, database, folder, config.evaluate)
        scores = evaluation.reference.scores()
        run.log(step=generator.reference.manifest().info["images_seen"], values=scores)
        database_uri = champion_uri(DATABASE_PREFIX + config.domain)
        sheet = evaluation.reference.sheet(settings.cache_folder)
        registered = register_generator(generator.reference, database_uri, scores, settings, run.run_id, sheet=sheet)
    stages: dict[str, StageResult[Any] | RegistrationResult] = {
        "neighbours": neighbours,
        "train": generator,
        "evaluate": evaluation,
        "register_generator": registered,
    }
    return TrainedGenerator(
        generator=generator,
        evaluation=evaluation,
        registered=registered,
        seconds={name: stage.seconds for name, stage in stages.items()},
        skipped={name: stage.skipped for name, stage in stages.items()},
    )
