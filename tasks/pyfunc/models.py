"""MLflow pyfunc models of a registered database and a registered generator.

MLflow copies the scripts next to this module into every registered version and runs them at load. They import only the
two classes below. Registered versions depend on this module path, so it must not change.
"""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from infra.artifacts import Manifest
from infra.settings import Settings
from tasks.references.types import DatabaseVersion

if TYPE_CHECKING:  # a database is loaded without diffusers
    from model.encoder.clip import Encoder
    from model.pipeline import KNNDiffusionPipeline
    from model.retrieval.database import Database


class DatabaseModel(PythonModel):
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
        prompts = model_input["prompt"].astype(str).tolist()
        hits = self.database.search(self.encoder.embed_texts(prompts).numpy(), int((params or {}).get("k", 10)))
        lists = [
            json.dumps(
                [{**row, "score": float(score)} for row, score in zip(self.database.describe(ids), scores, strict=True)]
            )
            for ids, scores in zip(hits.ids.tolist(), hits.scores, strict=True)
        ]
        return pd.DataFrame({"prompt": prompts, "neighbours": lists})


class GeneratorModel(PythonModel):
    """Text-to-image generation: weights from the version's artifacts, neighbours from the database in its config."""

    pipeline: "KNNDiffusionPipeline"

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights, and the database from the registry that this model was loaded from."""
        from model.pipeline import KNNDiffusionPipeline
        from tasks.serve.load import load_database

        settings = Settings(MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())
        database = load_database(context.model_config["database"], settings)
        self.pipeline = KNNDiffusionPipeline.open(Path(context.artifacts["pipeline"]), database)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Generate one image for each row of the column ``prompt``.

        Args:
            context: unused.
            model_input: one row per prompt.
            params: ``seed`` (default 0), ``steps``, ``guidance`` and ``candidates`` (defaults: the saved pipeline's).

        Returns:
            Columns ``prompt`` and ``png``, the encoded image.
        """
        import torch

        chosen = params or {}
        prompts = model_input["prompt"].astype(str).tolist()
        output = self.pipeline(
            prompts,
            num_inference_steps=chosen.get("steps"),
            guidance_scale=chosen.get("guidance"),
            candidates=chosen.get("candidates"),
            generator=torch.Generator().manual_seed(int(chosen.get("seed", 0))),
        )
        return pd.DataFrame({"prompt": prompts, "png": [_png(image) for image in output.images]})


def _png(image: Any) -> bytes:
    """Encode a PIL image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
