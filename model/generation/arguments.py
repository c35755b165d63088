"""Arguments of a pipeline: validation, deprecated names, and conversion of the output."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.configs import Prediction
from model.errors import ModelError
from model.generation.batching import is_positive_int
from model.generation.condition import QuerySlot
from model.images import to_pil
from model.retrieval.searchable import Searchable

OutputType = Literal["pil", "np", "pt"]
"""Images as PIL, as float32 (B, S, S, 3) in [0, 1], or as a tensor float32 (B, 3, S, S) in [0, 1]."""
Images = list[Image.Image] | NDArray[np.float32] | Tensor


def required_database(database: Searchable | None) -> Searchable:
    """Return the database. Raises ``ModelError`` for None."""
    if database is None:
        raise ModelError("this pipeline has no database; plug one in with swap_database")
    return database


def check_defaults(config: Any) -> None:
    """Raise ``ModelError`` if a default of a pipeline is not valid for any call."""
    for name in ("neighbours", "trained_neighbours", "candidates", "num_inference_steps"):
        check_count(name, config[name])
    for name, choices in (("query", get_args(QuerySlot)), ("prediction", get_args(Prediction))):
        check_choice(name, config[name], choices)
    levels, truncation = config.guidance_interval, config.truncation
    if len(levels) != 2 or not all(map(math.isfinite, levels)) or not levels[0] < levels[1]:
        raise ModelError(f"guidance_interval is not valid: {levels}; give two noise levels, the lower first")
    check_finite("guidance_scale", config.guidance_scale)
    if not 0 < truncation <= 1:
        raise ModelError(f"truncation is out of range: {truncation}; give a share above 0 and at most 1")


def check_count(name: str, value: object) -> None:
    """Raise ``ModelError`` unless ``value`` is an integer of at least 1."""
    if not is_positive_int(value):
        raise ModelError(f"{name} is not a positive integer: {value!r}; give at least 1")


def check_steps(steps: int, noise_levels: Sequence[float] | None) -> None:
    """Raise ``ModelError`` if ``steps`` differs from the fixed number of steps of a distilled generator."""
    if noise_levels is not None and steps != len(noise_levels):
        raise ModelError(
            f"number of steps is not supported: {steps}; this generator was distilled to {len(noise_levels)} steps"
        )


def check_finite(name: str, value: float) -> None:
    """Raise ``ModelError`` unless ``value`` is finite."""
    if not math.isfinite(value):
        raise ModelError(f"{name} is not finite: {value}; give a number")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ModelError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ModelError(f"{name} is unknown: {value!r}; use one of {', '.join(choices)}")


def check_size(side: int, height: int | None, width: int | None) -> None:
    """Raise ``ModelError`` for a size that the network was not trained for."""
    for name, value in (("height", height), ("width", width)):
        if value not in (None, side):
            raise ModelError(f"{name} is not supported: {value}; this generator makes images of {side} × {side} px")


def renamed_arguments(renamed: Mapping[str, str], given: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Return the values of ``current``, taking arguments given by their old names, with a ``FutureWarning``.

    Args:
        renamed: Old name -> new name.
        given: Keyword arguments that the caller's signature does not name.
        current: Values of the new arguments; None if not given.

    Raises:
        TypeError: A name in ``given`` is unknown, or an argument was given by both names.
    """
    values = dict(current)
    for old, value in given.items():
        if old not in renamed:
            raise TypeError(f"unexpected argument: {old!r}")
        new = renamed[old]
        if values[new] is not None:
            raise TypeError(f"argument given twice: {new!r} and its old name {old!r}; use {new!r}")
        warnings.warn(f"{old!r} is deprecated; use {new!r} instead", FutureWarning, stacklevel=4)
        values[new] = value
    return values


def to_output(images: Tensor, output_type: str) -> Images:
    """Convert images (B, 3, S, S) in [−1, 1] to the requested ``OutputType``."""
    match output_type:
        case "pil":
            return to_pil(images)
        case "pt":
            return (images / 2 + 0.5).clamp(0, 1)
        case _:
            pixels: NDArray[np.float32] = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
            return pixels
