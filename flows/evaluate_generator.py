"""The flow that judges a generator: every metric on every database, the swap between them, ablations, one page."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact

from infra import compute, storage, tracking, uris
from infra.formats.tables import read_lines
from infra.registry import GENERATOR_NAME
from infra.settings import Settings
from model.saved_generator import contents_digest, pretrained_folder
from tasks.evaluate.report import FIGURE, MARKDOWN, Report, preview, report_evaluations
from tasks.evaluate.task import EvaluateConfig, Evaluation, evaluate
from tasks.references.trust import open_named, saved_pipeline
from tasks.references.types import DatabaseVersion, Generator, StageResult, domain_of
from tasks.stage import base_of, settings_of

ARTIFACT_KEY = "evaluation"
"""Under which the Prefect UI lists the tables, run after run."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateGeneratorConfig:
    """Which generator, on which databases, and what is measured."""

    databases: tuple[str, ...]  # short names, models:/… or folders; the first is the one that is shown first
    generator: str = GENERATOR_NAME  # short name, models:/…, a folder, or "sticker-generator"
    texts: str | None = None  # text file, local or remote, a prompt a line; None: ``evaluate.prompts``
    root: str | None = None  # None: the settings' root
    evaluate: EvaluateConfig = dataclasses.field(default_factory=lambda: EvaluateConfig(ablations=True))
    trust: bool = False  # treat folders outside of the root like those below it; see SECURITY.md

    def __post_init__(self) -> None:
        """Refuse an evaluation of nothing."""
        uris.hide_fields(self, "databases", "generator", "texts", "root")
        if not self.databases:
            raise ValueError("databases is empty; name at least one to draw from")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedGenerator:
    """The evaluation on each database, the page, and the MLflow run that keeps it."""

    evaluations: dict[str, StageResult[Evaluation]]
    report: StageResult[Report]
    run_id: str


@flow(name="evaluate-generator", validate_parameters=True)
def evaluate_generator(config: EvaluateGeneratorConfig) -> EvaluatedGenerator:
    """Score a generator on each database, hold its samples against every other, and put all of it on one page."""
    settings = settings_of(config.root)
    cache = settings.cache_folder
    generator = open_generator(config.generator, settings, trust=config.trust)
    databases = open_databases(config.databases, settings, trust=config.trust)
    asked = config.evaluate
    if config.texts is not None:
        asked = dataclasses.replace(asked, prompts=tuple(read_lines(config.texts)), prompt_urls=())
    title = f"{config.generator} on {', '.join(databases)}"
    with (
        compute.cluster(settings.ray_address, settings.cpus),
        tracking.start_run(settings, experiment="evaluate-generator", name=title) as run,
    ):
        run.params({"generator": dataclasses.asdict(generator), **dataclasses.asdict(config)})
        evaluations = {}
        for name, database in databases.items():
            others = {other: version for other, version in databases.items() if other != name}
            base = base_of(settings, domain_of(database))
            evaluations[name] = evaluate(generator, database, base, asked, cache=cache, others=others)
        references = {name: outcome.reference for name, outcome in evaluations.items()}
        first = base_of(settings, domain_of(next(iter(databases.values()))))
        made = report_evaluations(references, first, title, cache=cache)
        for name, evaluation in references.items():
            run.log(step=0, values={f"{name}/{metric}": value for metric, value in evaluation.scores().items()})
        with storage.scratch() as folder:
            files = made.reference.fetch(folder, cache)
            for file in files.values():
                run.file(file)
            _show(files, f"MLflow run `{run.run_id}`, files in `{made.reference.uri}`.", title)
    return EvaluatedGenerator(evaluations=evaluations, report=made, run_id=run.run_id)


def open_generator(name: str, settings: Settings, *, trust: bool = False) -> Generator:
    """What a name leads to; a saved pipeline without a manifest stands as its folder and the digest of its contents."""
    if (pretrained_folder(name) / "model_index.json").exists():
        return saved_pipeline(name, contents_digest(name), settings, trust=trust)
    return open_named(Generator, name, settings, trust=trust)[0]


def open_databases(names: Sequence[str], settings: Settings, *, trust: bool = False) -> dict[str, DatabaseVersion]:
    """The versions by domain, each once, in the order asked; two of one domain are told apart by their keys."""
    opened = dict[str, DatabaseVersion]()
    for name in names:
        version, pulled = open_named(DatabaseVersion, name, settings, trust=trust)
        label = domain_of(version)
        if opened.get(label, version) != version:
            label = f"{label}-{pulled.manifest.key[:6]}"
        opened[label] = version
    return opened


def _show(files: Mapping[str, Path], where: str, title: str) -> None:
    """The tables and the figure in the Prefect UI."""
    create_markdown_artifact(f"{files[MARKDOWN].read_text()}\n{where}\n", key=ARTIFACT_KEY, description=title)
    create_image_artifact(preview(files[FIGURE]), key=f"{ARTIFACT_KEY}-figure", description=title)
