"""Artifacts that Prefect's UI shows of a run: download outcomes, recall, samples, and links to MLflow."""

from collections.abc import Mapping

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext

from infra import storage
from infra.registry import Registry
from infra.registry_tags import version_page
from infra.settings import Settings
from tasks.evaluate.tables import markdown
from tasks.pages import preview
from tasks.promotion.figures import database_figures
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.types import DatabaseVersion
from tasks.register import RegistrationResult

OUTCOMES_KEY, DATABASE_KEY = "download-outcomes", "database"


def show_database(
    domain: str, database: DatabaseVersion, registered: RegistrationResult | None, settings: Settings
) -> None:
    """Publish the download outcomes of a database, its recall, samples, and pages, in the run of a flow.

    Without a run, nothing happens.
    """
    if FlowRunContext.get() is None:
        return
    outcomes = images_of(embeddings_of(database)).manifest().info.get("outcomes", {})
    if outcomes:
        create_table_artifact(outcome_rows(outcomes), key=OUTCOMES_KEY, description=f"Downloads of {domain}")
    create_markdown_artifact(
        database_markdown(domain, database, _links(registered, settings)), key=DATABASE_KEY, description=domain
    )
    with storage.scratch() as scratch:
        for figure in database_figures(database, scratch, settings.cache_folder):
            create_image_artifact(preview(figure), key=f"{DATABASE_KEY}-{figure.stem}", description=domain)


def outcome_rows(outcomes: Mapping[str, int]) -> list[dict[str, str | int]]:
    """Return a row for each outcome of a download, most frequent first."""
    total = sum(outcomes.values())
    ordered = sorted(outcomes.items(), key=lambda item: (-item[1], item[0]))
    return [{"outcome": name, "images": count, "share": f"{count / total:.1%}"} for name, count in ordered]


def database_markdown(domain: str, database: DatabaseVersion, links: Mapping[str, str]) -> str:
    """Return the facts of a database, the curve of recall against effort, and links."""
    manifest = database.manifest()
    info = manifest.info
    facts = {
        "rows": f"{manifest.rows - info['hidden']:,}",
        "index": info["factory"],
        "recall@10 of image queries": _recall(info["recall_at_10_image"]),
        "recall@10 of text queries": _recall(info["recall_at_10_text"]),
        "folder": f"`{database.uri}`",
    }
    heads = ["nprobe", "candidates", "latency ms", "recall image", "recall text"]
    rows = [
        [
            str(point["nprobe"]),
            str(point["candidates"]),
            f"{point['latency_ms']:.3f}",
            _recall(point.get("recall_at_10_image")),
            _recall(point.get("recall_at_10_text")),
        ]
        for point in info.get("curve", ())
    ]
    parts = [
        f"# {domain}",
        markdown(["", ""], [[name, value] for name, value in facts.items()]),
        "## Recall against search effort",
        markdown(heads, rows),
        *(f"{name}: {link}" for name, link in links.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _recall(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _links(registered: RegistrationResult | None, settings: Settings) -> dict[str, str]:
    """Return the pages of a version and of its run; without an MLflow server, their names."""
    if registered is None:
        return {"MLflow": "nothing changed, so no version was registered"}
    name, _, number = registered.uri.removeprefix("models:/").partition("/")
    pages = {
        "MLflow version": (registered.uri, version_page(name, int(number), settings)),
        "MLflow run": ("run", Registry(settings).run_page(name, int(number))),
    }
    return {
        title: f"[{text}]({page})" if page.startswith("http") else f"`{text}` {page}".strip()
        for title, (text, page) in pages.items()
    }
