"""Flow that evaluates a generator: all metrics on every database, database swaps, ablations, and one page."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from prefect import flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact

from flows.deployed_run import deployable
from flows.form import Form
from infra import compute, storage, tracking, uris
from infra.errors import ConfigError
from infra.formats.tables import read_lines
from infra.registry_tags import GENERATOR_NAME
from infra.settings import Settings
from model.saved_generator import BUNDLED_GENERATOR, contents_digest, pretrained_folder
from tasks.evaluate.report import FIGURE, MARKDOWN, Report, report_evaluations
from tasks.evaluate.task import EvaluateConfig, Evaluation, evaluate
from tasks.pages import preview
from tasks.references.domain_folder import DomainFolder
from tasks.references.trust import open_named, saved_pipeline
from tasks.references.types import DatabaseVersion, Generator, StageResult, domain_of
from tasks.stage import settings_of

ARTIFACT_KEY = "evaluation"
"""Key of the tables in the Prefect UI."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateGeneratorConfig(Form):
    """Generator, databases, and evaluation.

    Attributes:
        databases: Databases by short name, ``models:/…`` URI or folder. The first one comes first on the page.
        generator: Short name, ``models:/…`` URI, folder, or name of a bundled generator. Default: "knn-diffusion".
        texts: Text file, local or remote, with one prompt per line. Default: ``evaluate.prompts``.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        evaluate: Evaluation settings. Default: with ablations.
        trust: Treat folders outside of the root like those below it; see SECURITY.md. Default: False.
    """

    COMMON: ClassVar = ("databases", "generator", "texts", "evaluate.samples", "evaluate.use_gpu", "root")
    CHOICES: ClassVar = {"generator": (GENERATOR_NAME, BUNDLED_GENERATOR)}

    databases: tuple[str, ...]
    generator: str = GENERATOR_NAME
    texts: str | None = None
    root: str | None = None
    evaluate: EvaluateConfig = dataclasses.field(default_factory=lambda: EvaluateConfig(ablations=True))
    trust: bool = False

    def __post_init__(self) -> None:
        """Validate the fields."""
        uris.hide_fields(self, "databases", "generator", "texts", "root")
        if not self.databases:
            raise ConfigError("databases is empty; give at least one database")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedGenerator:
    """Evaluation by database, the report, and the id of the MLflow run."""

    evaluations: dict[str, StageResult[Evaluation]]
    report: StageResult[Report]
    run_id: str


@flow(name="evaluate-generator", validate_parameters=True)
@deployable
def evaluate_generator(config: EvaluateGeneratorConfig) -> EvaluatedGenerator:
    """Evaluate a generator on each database, compare its samples with the other databases, and write one page."""
    settings = settings_of(config.root)
    generator = open_generator(config.generator, settings, trust=config.trust)
    databases = open_databases(config.databases, settings, trust=config.trust)
    evaluate_config = config.evaluate
    if config.texts is not None:
        evaluate_config = dataclasses.replace(evaluate_config, prompts=tuple(read_lines(config.texts)), prompt_urls=())
    title = f"{config.generator} on {', '.join(databases)}"
    with (
        compute.cluster(settings.ray_address, settings.cpus),
        tracking.start_run(settings, experiment="evaluate-generator", name=title) as run,
    ):
        run.params({"generator": dataclasses.asdict(generator), **dataclasses.asdict(config)})
        evaluations = {}
        for name, database in databases.items():
            others = {other: version for other, version in databases.items() if other != name}
            folder = DomainFolder.of(settings, domain_of(database))
            evaluations[name] = evaluate(generator, database, folder, evaluate_config, others=others)
        references = {name: outcome.reference for name, outcome in evaluations.items()}
        first = DomainFolder.of(settings, domain_of(next(iter(databases.values()))))
        report = report_evaluations(references, first, title)
        for name, evaluation in references.items():
            run.log(step=0, values={f"{name}/{metric}": value for metric, value in evaluation.scores().items()})
        with storage.scratch() as scratch:
            files = report.reference.fetch(scratch, settings.cache_folder)
            for file in files.values():
                run.file(file)
            _show(files, f"MLflow run `{run.run_id}`, files in `{report.reference.uri}`.", title)
    return EvaluatedGenerator(evaluations=evaluations, report=report, run_id=run.run_id)


def open_generator(name: str, settings: Settings, *, trust: bool = False) -> Generator:
    """Open a generator by name. A saved pipeline without a manifest is identified by the digest of its contents."""
    if (pretrained_folder(name) / "model_index.json").exists():
        return saved_pipeline(name, contents_digest(name), settings, trust=trust)
    return open_named(Generator, name, settings, trust=trust)[0]


def open_databases(names: Sequence[str], settings: Settings, *, trust: bool = False) -> dict[str, DatabaseVersion]:
    """Open databases, and return each version once, by domain, in order.

    A second version of the same domain has the start of its stage key in its label.
    """
    opened = dict[str, DatabaseVersion]()
    for name in names:
        version, pulled = open_named(DatabaseVersion, name, settings, trust=trust)
        label = domain_of(version)
        if opened.get(label, version) != version:
            label = f"{label}-{pulled.manifest.key[:6]}"
        opened[label] = version
    return opened


def _show(files: Mapping[str, Path], where: str, title: str) -> None:
    """Publish the tables and the figure in the Prefect UI."""
    create_markdown_artifact(f"{files[MARKDOWN].read_text()}\n{where}\n", key=ARTIFACT_KEY, description=title)
    create_image_artifact(preview(files[FIGURE]), key=f"{ARTIFACT_KEY}-figure", description=title)
