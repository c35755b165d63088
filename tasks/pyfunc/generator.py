"""The registered generator as an MLflow pyfunc: a DataFrame of prompts to PNG pictures.

MLflow copies this file beside the weights and runs it at load; ``knn-diffusion`` must be installed there.
"""

import io
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from infra.settings import Settings
from model.pipeline import KNNDiffusionPipeline
from tasks.serve.load import pull_database


class GeneratorModel(PythonModel):
    """Weights from the version's own artifacts; neighbours from the database named in the model config."""

    pipeline: KNNDiffusionPipeline

    def load_context(self, context: PythonModelContext) -> None:
        """Open the pipeline with its database, found in the registry that this model was loaded from."""
        settings = Settings(MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())
        database = pull_database(context.model_config["database"], settings)
        self.pipeline = KNNDiffusionPipeline.open(Path(context.artifacts["pipeline"]), database)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Columns ``prompt`` and ``png`` (bytes) of each row; params: seed, steps, guidance, candidates."""
        chosen = params or {}
        prompts = model_input["prompt"].astype(str).tolist()
        output = self.pipeline(
            prompts,
            num_inference_steps=chosen.get("steps"),
            guidance_scale=chosen.get("guidance"),
            candidates=chosen.get("candidates"),
            generator=torch.Generator().manual_seed(int(chosen.get("seed", 0))),
        )
        encoded = []
        for image in output.images:
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            encoded.append(buffer.getvalue())
        return pd.DataFrame({"prompt": prompts, "png": encoded})


mlflow.models.set_model(GeneratorModel())
