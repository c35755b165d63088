"""Editing configuration."""

import dataclasses
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from model.errors import ModelError
from model.generation.batching import is_positive_int

EditMethod = Literal["flow", "local", "restore", "sdedit"]
FLOW_DEFAULTS = {"strength": 0.925, "candidates": 1, "kept_db": -math.inf}
"""Defaults of the method "flow" that differ from those of :class:`EditConfig`.

Its edits shift all pixels, so few of them reach the ``kept_db`` of the other methods.
"""
FLOW_NEIGHBOURS = 3
"""Default number of the target's neighbours for the method "flow"; the source has as many as in training."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EditConfig:
    """Settings of an edit.

    The defaults were measured with the bundled generator on 24 edits of Twemoji and OpenMoji, which it was not trained
    on. The CLIP score with the text rose from 0.315 to 0.355, with a PSNR of at least 25 dB outside of the changed
    region in every edit. A single candidate does not raise the score (0.299 in the first region); selection among
    eight does.
    ``tests/benchmarks/edit.py`` measures ten more edits.

    Attributes:
        method: "flow" moves the whole image towards the text (continuous networks), "local" regenerates one region,
            "restore" needs a network trained for editing, "sdedit" is the baseline. Default: "local".
        strength: Noise level to start from, in (0, 1]; small values return the source. For codes, the start time as a
            share of the process's timesteps. Default: 1.
        steps: Number of Euler steps, independent of the strength. For codes the number of strides, at most strength ×
            timesteps. Default: 12.
        guidance_scale: How strongly to follow the text; 1 as trained. It acts at all noise levels: edits do not use the
            generator's ``guidance_interval``. Default: 4.
        image_guidance_scale: How strongly to follow the source; 1 as trained. Only "restore". Default: 1.
        contrast: Push away from the source's own condition instead of the null condition. Not "flow". Default:
            False.
        keep: Restore the source's pixels where the edit barely differs. Not "sdedit". Default: True.
        candidates: Edits generated per image; the cost is proportional. Of those that preserve the rest of the image,
            the one whose embedding is closest to the text is returned. "local" generates two in each of half as many
            regions. Default: 8.
        kept_db: Minimum PSNR in dB outside of the changed region at which the rest counts as preserved. −∞ selects by
            the text alone. Default: 25.
        largest_region: Maximum share of the image that a region may cover, in (0, 1]. 1 allows changing an object that
            fills the image. Only "local". Default: 0.4.
        shift: Shift of the noise levels towards noise, as in new generators. Default: 2.
    """

    method: EditMethod = "local"
    strength: float = 1.0
    steps: int = 12
    guidance_scale: float = 4.0
    image_guidance_scale: float = 1.0
    contrast: bool = False
    keep: bool = True
    candidates: int = 8
    kept_db: float = 25.0
    largest_region: float = 0.4
    shift: float = 2.0

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.method not in get_args(EditMethod):
            raise ModelError(f"method is unknown: {self.method!r}; use 'flow', 'local', 'restore' or 'sdedit'")
        for name in ("strength", "largest_region"):
            if not 0 < getattr(self, name) <= 1:
                raise ModelError(f"{name} is out of range: {getattr(self, name)}; give a number above 0 and at most 1")
        for name in ("steps", "candidates"):
            if not is_positive_int(getattr(self, name)):
                raise ModelError(f"{name} is not a positive integer: {getattr(self, name)}; give at least 1")
        if not 0 < self.shift < math.inf:
            raise ModelError(f"shift is out of range: {self.shift}; give a finite number above 0")
        for name in ("guidance_scale", "image_guidance_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ModelError(f"{name} is not finite: {getattr(self, name)}; give a number")
        if math.isnan(self.kept_db):
            raise ModelError(f"kept_db is not a number: {self.kept_db}; give a PSNR in dB")


def edit_config(method: EditMethod, **options: Any) -> EditConfig:
    """Return the configuration of a method: its own defaults, changed by ``options``. Options of None are ignored."""
    given = {name: value for name, value in options.items() if value is not None}
    return EditConfig(method=method, **{**(FLOW_DEFAULTS if method == "flow" else {}), **given})


def noise_levels(config: EditConfig) -> Tensor:
    """Return the noise levels (steps + 1,) float32, from the strength down to 0, shifted like the scheduler's."""
    even = torch.linspace(1, 0, config.steps + 1)
    return config.strength * config.shift * even / (1 + (config.shift - 1) * even)
