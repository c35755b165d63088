"""The registered database as an MLflow pyfunc: a DataFrame of prompts to their nearest rows, as JSON.

The version carries the manifest alone; index and embeddings are opened where the manifest's folder is.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from infra.artifacts import Manifest
from infra.settings import Settings
from model.encoder.clip import Encoder, encoder_for
from model.retrieval.database import Database
from tasks.references.database import open_database
from tasks.references.types import DatabaseVersion


class DatabaseModel(PythonModel):
    """Text queries against the index that the manifest names."""

    database: Database
    encoder: Encoder

    def load_context(self, context: PythonModelContext) -> None:
        """Open the database and its encoder."""
        path = Path(context.artifacts["manifest"])
        manifest = Manifest.from_json(path.read_bytes(), str(path))
        version = DatabaseVersion.of(manifest, context.model_config["uri"])
        self.database = open_database(version, Settings().cache_folder)
        self.encoder = encoder_for(self.database.encoder)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Columns ``prompt`` and ``neighbours``: a JSON list of {id, score, key, url, …}; param: k."""
        prompts = model_input["prompt"].astype(str).tolist()
        hits = self.database.search(self.encoder.embed_texts(prompts).numpy(), int((params or {}).get("k", 10)))
        lists = [
            json.dumps(
                [{**row, "score": float(score)} for row, score in zip(self.database.describe(ids), scores, strict=True)]
            )
            for ids, scores in zip(hits.ids.tolist(), hits.scores, strict=True)
        ]
        return pd.DataFrame({"prompt": prompts, "neighbours": lists})


mlflow.models.set_model(DatabaseModel())
