"""MLflow model script of a generator; MLflow copies it into every registered version and runs it at load."""

import mlflow

from tasks.pyfunc.models import GeneratorModel

mlflow.models.set_model(GeneratorModel())
