"""MLflow model script of a database; MLflow copies it into every registered version and runs it at load."""

import mlflow

try:
    from tasks.pyfunc.models import DatabaseModel
except ImportError as error:
    raise ImportError(
        f"the package knn-diffusion cannot be imported: {error}; "
        "run pip install -r requirements.txt in the folder of this model"
    ) from error

mlflow.models.set_model(DatabaseModel())
