"""A project with a registry, whose folders hold a few bytes instead of an index or weights."""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from infra import artifacts, storage
from infra.artifacts import Manifest
from infra.errors import NotFoundError
from infra.registry import RegisteredVersion, Registry
from infra.registry_tags import DATABASE_PREFIX
from infra.settings import Settings

DATABASE = f"{DATABASE_PREFIX}twemoji"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]), outputs=Schema([ColSpec(DataType.string, "answer")])
)
SCRIPT = """
import json
from pathlib import Path

import mlflow
import pandas as pd


class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.rows = json.loads(Path(context.artifacts["manifest"]).read_text())["rows"]
        words = context.artifacts.get("words")
        self.words = Path(words, "words.txt").read_text() if words else "none"
        self.greeting = context.model_config["greeting"]

    def predict(self, context, model_input: pd.DataFrame, params=None):
        return [f"{self.greeting} {prompt}: {self.rows} rows, {self.words}" for prompt in model_input["prompt"]]


mlflow.models.set_model(Model())
"""


class Project:
    """Registry and root of a project, with helpers that commit and register folders."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.registry = settings, Registry(settings)
        self._script = folder / "script.py"
        self._script.write_text(SCRIPT)

    def folder(self, kind: str = "database", *, rows: int = 3, base: str | None = None) -> tuple[str, Manifest]:
        """Commit a folder and return its URI and manifest."""
        stage = artifacts.ArtifactBuilder(
            base or f"{self.settings.root}/twemoji", kind, inputs={}, config={"rows": rows}
        )
        return stage.uri, fill(stage, rows)

    def register(self, name: str, folder_uri: str, **changes: Any) -> RegisteredVersion:
        arguments: dict[str, Any] = {"tags": {}, "model_config": {"greeting": "hello"}, **changes}
        return self.registry.register(name, folder_uri, script=self._script, signature=SIGNATURE, **arguments)

    def refusal(self, reference: str, *, kind: str) -> str:
        with pytest.raises(NotFoundError) as caught:
            self.registry.pull(reference, kind=kind)
        assert "\n" not in str(caught.value)
        return str(caught.value)


def fill(stage: artifacts.ArtifactBuilder, rows: int) -> Manifest:
    with storage.scratch() as scratch:
        (scratch / "00000.faiss").write_bytes(b"index" * rows)
        shard = artifacts.commit_shard(stage.uri, "00000", scratch, rows=rows, info={})
    return stage.commit([shard], info={})


def answer(uri: str, prompt: str) -> str:
    return str(mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"prompt": [prompt]}))[0])


def names_and_aliases(versions: list[dict[str, Any]]) -> list[tuple[str, int, list[str]]]:
    return [(entry["name"], entry["version"], entry["aliases"]) for entry in versions]
