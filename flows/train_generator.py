"""The flow that makes a generator of a committed database: neighbours -> train -> evaluate -> register."""

import dataclasses
from typing import Any

from prefect import flow

from infra import compute, tracking, uris
from tasks.evaluate.task import EvaluateConfig, Evaluation, evaluate
from tasks.neighbours import find_neighbours
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.trust import open_folder
from tasks.references.types import DatabaseVersion, Generator, StageResult
from tasks.register import RegistrationResult, register_generator
from tasks.stage import base_of, settings_of
from tasks.train.data import TrainingInputs
from tasks.train.setup import TrainConfig
from tasks.train.task import train


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainGeneratorConfig:
    """What to train on, how, and how it is judged."""

    domain: str
    database: str  # the committed folder of a database version
    root: str | None = None
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    trust: bool = False  # treat folders outside of the root like those below it; see SECURITY.md

    def __post_init__(self) -> None:
        """Keep passwords of URIs out of what Prefect and MLflow store."""
        uris.hide_fields(self, "database", "root")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainedGenerator:
    """The generator, its scores, and its name in the registry."""

    generator: StageResult[Generator]
    evaluation: StageResult[Evaluation]
    registered: RegistrationResult
    seconds: dict[str, float]
    skipped: dict[str, bool]


@flow(name="train-generator", flow_run_name="train-{config.domain}", validate_parameters=True)
def train_generator(config: TrainGeneratorConfig) -> TrainedGenerator:
    """Train a generator on a database's own pictures and register it as ``knn-diffusion``'s champion."""
    settings = settings_of(config.root)
    base, cache = base_of(settings, config.domain), settings.cache_folder
    database = open_folder(DatabaseVersion, config.database, settings, trust=config.trust)
    embeddings = embeddings_of(database)
    images = images_of(embeddings)
    with (
        compute.cluster(settings.ray_address, settings.cpus),
        tracking.start_run(settings, experiment="train-generator", name=config.domain) as run,
    ):
        run.params(dataclasses.asdict(config))
        found = find_neighbours(embeddings, database, base, config.train.conditioning.pool, cache=cache)
        inputs = TrainingInputs(images=images, embeddings=embeddings, database=database, neighbours=found.reference)
        generator = train(inputs, base, config.train, cache=cache, run=run)
        evaluation = evaluate(generator.reference, database, base, config.evaluate, cache=cache)
        scores = evaluation.reference.scores()
        run.log(step=generator.reference.manifest().info["images_seen"], values=scores)
        database_uri = f"models:/knn-database.{config.domain}@champion"
        registered = register_generator(generator.reference, database_uri, scores, settings, run.run_id)
    stages: dict[str, StageResult[Any] | RegistrationResult] = {
        "neighbours": found,
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
