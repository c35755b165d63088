"""Flow that adopts a saved generator for a database without training: adopt -> evaluate -> register."""

import dataclasses
from typing import Annotated, Any, ClassVar

from prefect import flow

from flows.deployed_run import deployable
from flows.form import DOMAIN, Form
from flows.train_generator import TrainedGenerator
from infra import compute, tracking, uris
from infra.registry_tags import DATABASE_PREFIX, champion_uri
from model.saved_generator import BUNDLED_GENERATOR
from tasks.evaluate.task import EvaluateConfig, evaluate
from tasks.references.domain_folder import DomainFolder
from tasks.references.domain_name import require_domain
from tasks.references.trust import open_folder, saved_pipeline
from tasks.references.types import DatabaseVersion, StageResult
from tasks.register import RegistrationResult, register_generator
from tasks.stage import settings_of
from tasks.train.adopt import adopt


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdoptGeneratorConfig(Form):
    """Generator to adopt, database, and evaluation.

    Attributes:
        domain: Domain that the generator is stored under.
        database: URI of the committed folder of a database version.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        generator: Name of a bundled generator, or local folder of a saved pipeline. Default: "sticker-generator".
        evaluate: Evaluation settings.
        trust: Treat folders outside of the root like those below it; see SECURITY.md. Default: False.
    """

    COMMON: ClassVar = ("domain", "database", "generator", "root")
    CHOICES: ClassVar = {"generator": (BUNDLED_GENERATOR,)}

    domain: Annotated[str, DOMAIN]
    database: str
    root: str | None = None
    generator: str = BUNDLED_GENERATOR
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    trust: bool = False

    def __post_init__(self) -> None:
        """Validate the domain, and keep passwords in URIs out of the records of Prefect and MLflow."""
        require_domain(self.domain)
        uris.hide_fields(self, "database", "root", "generator")


@flow(name="adopt-generator", flow_run_name="adopt-{config.domain}", validate_parameters=True)
@deployable
def adopt_generator(config: AdoptGeneratorConfig) -> TrainedGenerator:
    """Copy a generator to the domain, evaluate it on the database, and register it as a version of ``knn-diffusion``.

    It becomes the champion if the gates of :mod:`tasks.promote` pass.
    """
    settings = settings_of(config.root)
    folder = DomainFolder.of(settings, config.domain)
    database = open_folder(DatabaseVersion, config.database, settings, trust=config.trust)
    source = saved_pipeline(config.generator, "", settings, trust=config.trust)
    with (
        compute.cluster(settings.ray_address, settings.cpus),
        tracking.start_run(settings, experiment="adopt-generator", name=config.domain) as run,
    ):
        run.params(
            {"config": dataclasses.asdict(config)}
        )  # MLflow uses the plain names for the model that it registers
        generator = adopt(config.generator, folder, confined_to=source.confined_to)
        evaluation = evaluate(generator.reference, database, folder, config.evaluate)
        scores = evaluation.reference.scores()
        run.log(step=0, values=scores)
        database_uri = champion_uri(DATABASE_PREFIX + config.domain)
        sheet = evaluation.reference.sheet(settings.cache_folder)
        registered = register_generator(generator.reference, database_uri, scores, settings, run.run_id, sheet=sheet)
    stages: dict[str, StageResult[Any] | RegistrationResult] = {
        "adopt": generator,
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
