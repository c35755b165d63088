"""Flow that evaluates a generator, on the small domain."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.fakes import WithoutRay


def configured(domain: Any, **changes: Any) -> Any:
    from flows.evaluate_generator import EvaluateGeneratorConfig
    from tasks.evaluate.task import EvaluateConfig

    measured = EvaluateConfig(samples=12, steps=2, bootstrap=20, seeds=2, diversity_prompts=2)
    config = EvaluateGeneratorConfig(databases=("shapes",), root=str(domain.root), evaluate=measured)
    return dataclasses.replace(config, **changes)


def artifacts_of(key: str) -> list[str]:
    """Return the data of the Prefect artifacts with a key."""
    query = {"artifacts": {"key": {"any_": [key]}}}
    user, _, password = os.environ["PREFECT_API_AUTH_STRING"].partition(":")
    url = f"{os.environ['PREFECT_API_URL']}/artifacts/filter"
    return [found["data"] for found in httpx.post(url, json=query, auth=(user, password)).json()]


def test_evaluate_generator_publishes_the_page_to_mlflow_and_prefect(
    domain: Any, ray: WithoutRay, tmp_path: Path
) -> None:
    import mlflow

    from flows.evaluate_generator import evaluate_generator
    from infra.settings import Settings

    (tmp_path / "texts.txt").write_text("red circle\nblue square\n")
    config = configured(domain, texts=str(tmp_path / "texts.txt"))
    first, again = evaluate_generator(config), evaluate_generator(config)
    (evaluation,) = first.evaluations.values()
    scores = evaluation.reference.scores()
    assert not evaluation.skipped
    assert again.evaluations["shapes"].skipped
    assert again.report.skipped
    assert first.run_id != again.run_id
    client = mlflow.tracking.MlflowClient(Settings(root=str(domain.root)).tracking_uri)
    for run_id in (first.run_id, again.run_id):
        names = ["evaluation.csv", "evaluation.html", "evaluation.md", "evaluation.png"]
        assert [entry.path for entry in client.list_artifacts(run_id)] == names
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.metrics["shapes/fd_knn"] == pytest.approx(scores["fd_knn"])
        assert run.data.params["evaluate.samples"] == "12"
    with Image.open(client.download_artifacts(first.run_id, "evaluation.png", str(tmp_path))) as page:
        assert page.width > 1_000
    assert any(f"{scores['fd_knn']:.3f}" in shown and first.run_id in shown for shown in artifacts_of("evaluation"))
    assert all(shown.startswith("data:image/jpeg;base64,") for shown in artifacts_of("evaluation-figure"))
    assert len(artifacts_of("evaluation-figure")) == len(artifacts_of("evaluation")) >= 2


def test_open_by_each_kind_of_name_returns_the_version(domain: Any, tmp_path: Path) -> None:
    from flows.evaluate_generator import open_databases, open_generator
    from infra.errors import NotFoundError
    from infra.settings import Settings

    settings = Settings(root=str(domain.root))
    version, generator = domain.result.database.reference, domain.result.trained.generator.reference
    assert open_databases(["shapes", version.uri, "models:/knn-database.shapes@champion"], settings) == {
        "shapes": version
    }
    assert open_generator("knn-diffusion", settings) == open_generator(generator.uri, settings) == generator
    embedded = open_generator("sticker-generator", settings)
    assert (embedded.uri, embedded.rows, len(embedded.digest)) == ("sticker-generator", 0, 64)
    plain = open_generator(f"{generator.uri}/pipeline", settings)
    assert plain.uri == f"{generator.uri}/pipeline"
    with pytest.raises(NotFoundError, match="no database is registered as"):
        open_databases(["nothing"], settings)


def test_config_without_databases_fails() -> None:
    from flows.evaluate_generator import EvaluateGeneratorConfig

    with pytest.raises(ValueError, match="databases is empty"):
        EvaluateGeneratorConfig(databases=())
