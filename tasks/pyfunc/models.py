"""MLflow pyfunc models of a registered database and a registered generator.

MLflow copies the scripts next to this module into every registered version and runs them at load. They import only the
two classes below. Registered versions depend on this module path, so it must not change.
"""

import copy
import io
import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModelContext

from infra.artifacts import Manifest
from infra.errors import NotFoundError
from infra.registry_tags import CHAMPION, DATABASE_PREFIX
from infra.settings import Settings
from tasks.pyfunc.parameters import CheckedModel, PredictionError, check_predictions, prediction_errors
from tasks.references.trust import open_named
from tasks.references.types import DatabaseVersion

if TYPE_CHECKING:  # a database is loaded without diffusers
    from model.encoder.clip import Encoder
    from model.pipeline import KNNDiffusionPipeline
    from model.retrieval.database import Database

_NAME = re.compile(r"[\w.-]+|models:/[\w.-]+(@[\w.-]+|/\d+)", re.ASCII)
_DATABASES = 4
"""Number of databases besides the default that a generator keeps open."""

check_predictions()


class DatabaseModel(CheckedModel):
    """Text search in a registered database.

    The version holds the manifest only. Index and embeddings are opened in the folder that the model config names.
    """

    database: "Database"
    encoder: "Encoder"

    def load_context(self, context: PythonModelContext) -> None:
        """Open the database and its encoder."""
        from model.encoder.clip import encoder_for
        from tasks.references.database import open_database

        path = Path(context.artifacts["manifest"])
        manifest = Manifest.from_json(path.read_bytes(), str(path))
        version = DatabaseVersion.of(manifest, context.model_config["uri"])
        self.database = open_database(version, Settings().cache_folder)
        self.encoder = encoder_for(self.database.encoder)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Search with the column ``prompt``.

        Args:
            context: unused.
            model_input: one row per query.
            params: ``k``, the number of neighbours; default 10.

        Returns:
            Columns ``prompt`` and ``neighbours``, a JSON list of objects with ``score`` and the row's metadata.
        """
        prompts = _prompts(model_input)
        with prediction_errors():
            hits = self.database.search(self.encoder.embed_texts(prompts).numpy(), int((params or {}).get("k", 10)))
            found = [self.database.describe(ids) for ids in hits.ids.tolist()]
        lists = [
            json.dumps([{**row, "score": float(score)} for row, score in zip(rows, scores, strict=True)])
            for rows, scores in zip(found, hits.scores, strict=True)
        ]
        return pd.DataFrame({"prompt": prompts, "neighbours": lists})


class GeneratorModel(CheckedModel):
    """Text-to-image generation: weights from the version's artifacts, neighbours from a registered database.

    Without the parameter ``database`` that is the one in the version's config.
    """

    pipeline: "KNNDiffusionPipeline"
    settings: Settings

    def __init__(self) -> None:
        """Start without open databases."""
        self._others: dict[str, KNNDiffusionPipeline] = {}  # by folder of the database, oldest first
        self._lock = threading.Lock()

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights, and the database from the registry that this model was loaded from."""
        from model.pipeline import KNNDiffusionPipeline
        from tasks.serve.load import load_database

        self.settings = Settings(MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())
        database = load_database(context.model_config["database"], self.settings)
        self.pipeline = KNNDiffusionPipeline.open(Path(context.artifacts["pipeline"]), database)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Generate one image for each row of the column ``prompt``.

        Args:
            context: unused.
            model_input: one row per prompt.
            params: ``seed`` (default 0); ``steps``, ``guidance``, ``candidates`` and ``k``, the number of neighbours
                (defaults: the saved pipeline's); ``database``, the short name or ``models:/`` URI of a registered
                database (default: the one in the config).

        Returns:
            Columns ``prompt`` and ``png``, the encoded image.

        Raises:
            PredictionError: The database is unknown or was made by another encoder, or the prediction failed.
        """
        import torch

        chosen = params or {}
        prompts = _prompts(model_input)
        fixed = self.pipeline.config.noise_levels
        if fixed is not None and chosen.get("steps") not in (None, len(fixed)):
            raise PredictionError(f"steps is not supported: {chosen['steps']}; this generator needs {len(fixed)} steps")
        with prediction_errors():
            output = self._pipeline_with(chosen.get("database") or "")(
                prompts,
                num_inference_steps=chosen.get("steps"),
                guidance_scale=chosen.get("guidance"),
                neighbours=chosen.get("k"),
                candidates=chosen.get("candidates"),
                generator=torch.Generator().manual_seed(int(chosen.get("seed", 0))),
            )
        return pd.DataFrame({"prompt": prompts, "png": [_png(image) for image in output.images]})

    def _pipeline_with(self, name: str) -> "KNNDiffusionPipeline":
        """Return a pipeline with the registered database ``name``; an empty name is the default database.

        Folders are refused, because a client must not choose the files that the server opens.
        """
        from model.errors import ModelError
        from tasks.references.database import open_database
        from tasks.references.images import with_stored_images

        if not name:
            return self.pipeline
        if not _NAME.fullmatch(name):
            raise PredictionError("database is not a name; give the short name or models:/ URI of a registered one")
        reference = name if name.startswith("models:/") else f"models:/{_full_name(name)}@{CHAMPION}"
        try:
            version, _ = open_named(DatabaseVersion, reference, self.settings)
        except NotFoundError:
            raise PredictionError(f"no database is registered as {name}; give the name of a registered one") from None
        with self._lock:  # the server predicts in several threads
            if version.uri not in self._others:
                cache = self.settings.cache_folder
                database = with_stored_images(open_database(version, cache), version, cache)
                other = copy.copy(self.pipeline)  # shares the networks
                try:
                    other.swap_database(database)
                except ModelError:
                    raise PredictionError(
                        f"database {name} was made with another encoder than this generator; use another database"
                    ) from None
                self._others[version.uri] = other
                if len(self._others) > _DATABASES:
                    del self._others[next(iter(self._others))]
            return self._others[version.uri]


def _prompts(model_input: pd.DataFrame) -> list[str]:
    prompts: list[str] = model_input["prompt"].astype(str).tolist()
    if not all(prompt.strip() for prompt in prompts):
        raise PredictionError("a prompt is empty; give a text in each row")
    return prompts


def _full_name(name: str) -> str:
    return name if name.startswith(DATABASE_PREFIX) else DATABASE_PREFIX + name


def _png(image: Any) -> bytes:
    """Encode a PIL image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
