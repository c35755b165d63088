"""Tests of what the user interfaces show of a run: artifacts in Prefect, and the version and its run in MLflow."""

import base64
import io
from typing import Any

import pytest
from PIL import Image
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from support.changing_domain import NAMES, Living
from support.fakes import WithoutRay

from flows.run_page import outcome_rows
from infra.registry_tags import version_page
from infra.settings import Settings
from infra.tracking import registry_client


def newest(key: str) -> Any:
    """Return the newest Prefect artifact with the key."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return max(found, key=lambda one: one.created)


def test_new_domain_and_rebuild_present_themselves_in_prefect_and_mlflow(
    living_on_prefect: Living, ray: WithoutRay
) -> None:
    living = living_on_prefect
    living.build([*NAMES[:6], "/absent.png"])
    outcomes = newest("download-outcomes").data
    assert '"outcome": "success", "images": 6, "share": "85.7%"' in str(outcomes).replace("'", '"')
    page = newest("database").data
    assert "| rows | 6 |" in page
    assert "Recall against search effort" in page
    assert "models:/knn-database.shapes/1" in page
    assert "/#/models/knn-database.shapes/versions/1" in page
    assert newest("progress-images").data == 100
    for key in ("database-recall", "database-samples"):
        data = newest(key).data.partition("base64,")[2]
        assert Image.open(io.BytesIO(base64.b64decode(data))).width > 100

    client = registry_client(living.settings)
    version = client.get_model_version("knn-database.shapes", "1")
    run = client.get_run(version.run_id)
    assert run.data.metrics["rows"] == 6
    assert run.data.metrics["failed_downloads"] == pytest.approx(1 / 7)
    assert run.data.metrics["recall_at_10_image"] == 1
    assert {"seconds_download", "seconds_embed", "seconds_index"} <= set(run.data.metrics)
    assert {one.path for one in client.list_artifacts(version.run_id, "figures")} == {
        "figures/recall.png", "figures/samples.jpg",
    }  # fmt: skip
    assert version.tags["run"].endswith(f"/runs/{version.run_id}")
    assert f"get-artifact?path=figures/samples.jpg&run_uuid={version.run_id}" in version.description

    living.rebuild()
    assert "no version was registered" in newest("database").data


def test_outcome_rows_have_the_most_frequent_first() -> None:
    assert outcome_rows({"timeout": 1, "success": 3}) == [
        {"outcome": "success", "images": 3, "share": "75.0%"},
        {"outcome": "timeout", "images": 1, "share": "25.0%"},
    ]


def test_version_page_is_an_address_only_with_a_server() -> None:
    served = Settings(MLFLOW_TRACKING_URI="https://user:secret@mlflow.test/")  # type: ignore[call-arg]
    page = version_page("knn-diffusion", 3, served)
    assert page.startswith("https://")
    assert page.endswith("mlflow.test/#/models/knn-diffusion/versions/3")
    assert "secret" not in page
    assert version_page("a", 1, Settings(root="/tmp/a")) == "/#/models/a/versions/1"  # noqa: S108
