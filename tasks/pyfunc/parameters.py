"""Checks of the parameters of a prediction, and errors that a client may read.

MLflow's scoring server ignores unknown parameters, and answers any error but its own with a stack trace. The server
has no hook for either. :func:`check_predictions` therefore wraps ``PyFuncModel.predict``, for the models here only.
"""

import contextlib
import functools
import json
import math
import numbers
from collections.abc import Iterator
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.model import PythonModel
from mlflow.types import DataType, ParamSchema, ParamSpec

from infra import logs

_RANGES = {
    "candidates": (1, 100),
    "guidance": (0, 100),
    "k": (1, 1000),
    "seed": (-(2**63), 2**63 - 1),
    "steps": (1, 1000),
}


class CheckedModel(PythonModel):
    """Base of models whose parameters are checked before a prediction."""


class PredictionError(MlflowException):
    """Error of a prediction in one line, without paths. The scoring server sends it to the client."""

    def __init__(self, line: str, *, internal: bool = False) -> None:
        """Store the line. ``internal`` means that the request was valid (HTTP 500 instead of 400)."""
        super().__init__(line, error_code=INTERNAL_ERROR if internal else INVALID_PARAMETER_VALUE)
        self._line = line

    def serialize_as_json(self) -> str:
        """Return the body of the answer, without the dump of the input that the server adds to ``message``."""
        return json.dumps({"error_code": self.error_code, "message": self._line})


def check_predictions() -> None:
    """Make MLflow check the parameters of every :class:`CheckedModel`. Idempotent."""
    predict = PyFuncModel.predict
    if hasattr(predict, "is_checked"):
        return

    @functools.wraps(predict)  # the server looks for ``params`` in the signature
    def checked(self: PyFuncModel, data: Any, params: dict[str, Any] | None = None) -> Any:
        if isinstance(_python_model(self), CheckedModel):
            check_parameters(params, self.metadata.get_params_schema())  # type: ignore[no-untyped-call]
        return predict(self, data, params)

    checked.is_checked = True  # type: ignore[attr-defined]
    PyFuncModel.predict = checked  # type: ignore[method-assign]


def check_parameters(params: Any, schema: ParamSchema | None) -> None:
    """Raise ``PredictionError`` for unknown parameters, and for values of the wrong type or out of range."""
    if params is None or schema is None:
        return
    if not isinstance(params, dict):
        raise PredictionError(f"params is not an object: {_short(params)}; give names and values")
    specs = {spec.name: spec for spec in schema.params}
    for name, value in params.items():
        if name not in specs:
            raise PredictionError(f"unknown parameter: {_short(name)}; use one of {', '.join(sorted(specs))}")
        _check_value(specs[name], value)


@contextlib.contextmanager
def prediction_errors() -> Iterator[None]:
    """Replace any error but ``PredictionError`` by one without details, which go to the log of the server."""
    try:
        yield
    except PredictionError:
        raise
    except Exception as error:
        logs.get("pyfunc").exception("%-11s failed", "predict")
        raise PredictionError(
            f"the prediction failed: {type(error).__name__}; see the log of the server", internal=True
        ) from error


def _check_value(spec: ParamSpec, value: Any) -> None:
    if spec.dtype == DataType.string:
        if not isinstance(value, str):
            raise PredictionError(f"{spec.name} is not a text: {_short(value)}; give a string")
        return
    kind, article = (numbers.Integral, "an integer") if spec.dtype == DataType.long else (numbers.Real, "a number")
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
        raise PredictionError(f"{spec.name} is not {article}: {_short(value)}; give {article}")
    low, high = _RANGES.get(spec.name, (-math.inf, math.inf))
    number = int(value) if isinstance(value, numbers.Integral) else float(value)  # exact for seeds
    if not low <= number <= high:
        raise PredictionError(f"{spec.name} is out of range: {_short(value)}; give {low} to {high}")


def _python_model(model: PyFuncModel) -> Any:
    """Return the Python object of a loaded model, or None for another flavour."""
    with contextlib.suppress(MlflowException):
        return model.unwrap_python_model()  # type: ignore[no-untyped-call]
    return None


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
