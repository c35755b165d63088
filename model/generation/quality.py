"""Presets of a call, "fast" and "best". Arguments that are given override them."""

import dataclasses
from typing import Any, Literal, TypeAlias

from model.generation.arguments import check_choice
from model.generation.backbone import Backbone
from model.generation.start import Reference, Start

Quality: TypeAlias = Literal["fast", "best"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Arguments of a call that trade its cost for the quality of the images. None is the generator's default.

    Attributes:
        candidates: Images generated for each image that is returned.
        neighbours: K.
        start: What the flow starts from.
        strength: Share of noise that is added to the start.
        reference: What a network trained to restore sees at high noise levels.
    """

    candidates: int | None = None
    neighbours: int | None = None
    start: Start = "noise"
    strength: float | None = None
    reference: Reference = "none"


PRESETS: dict[Quality, Preset] = {
    "fast": Preset(candidates=2, start="neighbour", strength=0.8),
    "best": Preset(candidates=8, start="neighbour", strength=0.8),
}


def resolve(quality: Quality | None, backbone: Backbone, *, neighbours_shown: bool, **given: Any) -> Preset:
    """Return the arguments of a call: those that are given, and for the others those of the preset.

    Where a preset starts from a neighbour or shows one, it does so only if the generator and the call support it.

    Args:
        quality: The preset, or None for noise without a reference.
        backbone: The generator.
        neighbours_shown: False without retrieval, and for an interpolation.
        given: Fields of :class:`Preset`; None if not given.

    Raises:
        ModelError: ``quality`` is unknown.
    """
    preset = Preset()
    if quality is not None:
        check_choice("quality", quality, tuple(PRESETS))
        preset = PRESETS[quality]
        if given.get("strength") is not None:
            preset = dataclasses.replace(preset, start="neighbour")
    if not (neighbours_shown and backbone.starts_from_images):
        preset = dataclasses.replace(preset, start="noise")
    if not neighbours_shown or backbone.restorer is None:
        preset = dataclasses.replace(preset, reference="none")
    merged = dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})
    return dataclasses.replace(merged, strength=given.get("strength")) if merged.start == "noise" else merged
