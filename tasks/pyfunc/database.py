"""MLflow model script of a database; MLflow copies it into every registered version and runs it at load."""

import mlflow

from tasks.pyfunc.models import DatabaseModel

mlflow.models.set_model(DatabaseModel())
