"""Tests of the pyfunc models behind MLflow's scoring server."""

import base64
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from fastapi.testclient import TestClient
from mlflow.pyfunc import scoring_server
from PIL import Image
from support import tiny_models

from infra.errors import NotFoundError
from infra.settings import Settings
from tasks.pyfunc import models
from tasks.pyfunc.models import GeneratorModel
from tasks.pyfunc.parameters import PredictionError
from tasks.register import DATABASE_SIGNATURE, generator_signature

GENERATOR = """
import mlflow
from mlflow.models import set_model
from tasks.pyfunc.models import GeneratorModel
from tests_pyfunc_fakes import FakePipeline

class Fake(GeneratorModel):
    def load_context(self, context):
        self.pipeline = FakePipeline()

set_model(Fake())
"""
FAKES = """
from types import SimpleNamespace
from PIL import Image

class FakePipeline:
    calls = []
    config = SimpleNamespace(noise_levels=None)

    def __call__(self, prompts, **options):
        options.pop("generator")
        self.calls.append(options)
        if "fail" in prompts:
            raise RuntimeError("/srv/secret/folder is damaged")
        return SimpleNamespace(images=[Image.new("RGB", (4, 4))] * len(prompts))
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Client of a scoring server of a generator with a fake pipeline."""
    folder = tmp_path_factory.mktemp("pyfunc")
    (folder / "tests_pyfunc_fakes.py").write_text(FAKES)
    (folder / "script.py").write_text(GENERATOR)
    defaults = {"num_inference_steps": 25, "guidance_scale": 2.0, "neighbours": 7}
    (folder / "model_index.json").write_text(json.dumps(defaults))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # the server sets it; undone at the end
        script, signature = str(folder / "script.py"), generator_signature(folder)
        mlflow.pyfunc.save_model(folder / "model", python_model=script, signature=signature)
        yield TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(folder / "model"))))


def post(client: TestClient, prompt: str = "an owl", **params: Any) -> Any:
    return client.post("/invocations", json={"inputs": {"prompt": [prompt]}, "params": params})


def test_generator_passes_parameters_to_the_pipeline(client: TestClient) -> None:
    from tests_pyfunc_fakes import FakePipeline  # type: ignore[import-not-found]

    FakePipeline.calls.clear()
    answers = [post(client, k=4, steps=2, guidance=3), post(client)]
    assert [answer.status_code for answer in answers] == [200, 200]
    (row,) = answers[0].json()["predictions"]
    assert base64.b64decode(row["png"]).startswith(b"\x89PNG")
    given, default = FakePipeline.calls
    assert given == {"neighbours": 4, "num_inference_steps": 2, "guidance_scale": 3.0, "candidates": 1}
    assert default == {"neighbours": 7, "num_inference_steps": 25, "guidance_scale": 2.0, "candidates": 1}


def test_generator_of_few_steps_accepts_their_number_only(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests_pyfunc_fakes import FakePipeline

    monkeypatch.setattr(FakePipeline.config, "noise_levels", [1.0, 0.8, 0.5])
    FakePipeline.calls.clear()
    refused = post(client, steps=8)
    assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert refused.json()["message"] == "steps is not supported: 8; this generator needs 3 steps"
    assert post(client, steps=3).status_code == 200
    assert [call["num_inference_steps"] for call in FakePipeline.calls] == [3]


@pytest.mark.parametrize(
    ("params", "line"),
    [
        ({"stepz": 2}, "unknown parameter: 'stepz'; use one of candidates, database, guidance, k, seed, steps"),
        ({"steps": "many"}, "steps is not an integer: 'many'; give an integer"),
        ({"steps": 0}, "steps is out of range: 0; give 1 to 1000"),
        ({"k": 2.5}, "k is not an integer: 2.5; give an integer"),
        ({"k": True}, "k is not an integer: True; give an integer"),
        ({"seed": 2**64}, f"seed is out of range: {2**64}; give {-(2**63)} to {2**63 - 1}"),
        ({"guidance": None}, "guidance is not a number: None; give a number"),
        ({"database": 3}, "database is not a text: 3; give a string"),
        ({"database": "/etc"}, "database is not a name; give the short name or models:/ URI of a registered one"),
        ({"database": ".."}, "no database is registered as ..; give the name of a registered one"),
    ],
)
def test_generator_with_invalid_parameters_answers_one_line(
    params: dict[str, Any], line: str, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GeneratorModel, "settings", Settings(root="/nonexistent/root"), raising=False)
    answer = post(client, **params)
    assert answer.status_code == 400
    assert answer.json() == {"error_code": "INVALID_PARAMETER_VALUE", "message": line}


def test_generator_with_an_empty_prompt_answers_one_line(client: TestClient) -> None:
    answer = post(client, " ")
    assert (answer.status_code, answer.json()["message"]) == (400, "a prompt is empty; give a text in each row")


def test_generator_with_an_unexpected_error_answers_without_paths(client: TestClient) -> None:
    answer = post(client, "fail")
    assert answer.status_code == 500
    assert answer.json() == {
        "error_code": "INTERNAL_ERROR",
        "message": "the prediction failed: RuntimeError; see the log of the server",
    }


def test_database_signature_has_k() -> None:
    assert [spec.name for spec in DATABASE_SIGNATURE.params.params] == ["k"]


@dataclasses.dataclass
class Version:
    """Fake of a database version: its folder and its database."""

    uri: str
    database: Any


def test_generator_with_another_database_shares_the_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny_models.unit_rows(20)
    own = tiny_models.database(tmp_path / "own", rows)
    others = {name: Version(name, tiny_models.database(tmp_path / name, rows)) for name in "abcdef"}
    opened: list[str] = []

    def open_named(kind: Any, reference: str, settings: Settings) -> tuple[Version, None]:
        name = reference.removeprefix("models:/knn-database.").removesuffix("@champion")
        if name not in others:
            raise NotFoundError(f"no database at {tmp_path}")
        return others[name], None

    def open_database(version: Version, cache: Path) -> Any:
        opened.append(version.uri)
        return version.database

    monkeypatch.setattr(models, "open_named", open_named)
    monkeypatch.setattr("tasks.references.database.open_database", open_database)
    monkeypatch.setattr("tasks.references.images.with_stored_images", lambda database, version, cache: database)
    model = GeneratorModel()
    model.settings, model.pipeline = Settings(root=str(tmp_path)), tiny_models.pipeline(own)
    assert model._pipeline_with("") is model.pipeline
    other = model._pipeline_with("a")
    assert other.database is others["a"].database
    assert other.transformer is model.pipeline.transformer
    assert model.pipeline.database is own
    assert model._pipeline_with("knn-database.a") is other
    for name in "bcdef":
        model._pipeline_with(name)
    assert (opened, len(model._others)) == (list("abcdef"), 4)
    with pytest.raises(PredictionError, match="no database is registered as absent; give"):
        model._pipeline_with("absent")
    others["g"] = Version(
        "g", tiny_models.database(tmp_path / "g", rows, encoder=tiny_models.identity(weights="2" * 64))
    )
    with pytest.raises(PredictionError, match="database g was made with another encoder"):
        model._pipeline_with("g")


def test_generator_output_is_png() -> None:
    assert models._png(Image.new("RGB", (2, 2))).startswith(b"\x89PNG")
