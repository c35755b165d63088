"""Presets of a call, "fast" and "best". Arguments that are given override them.

They were chosen with the bundled generator on 40 prompts and Twemoji, with the prompts' own images left out, one draw
each. "Concept" is the share of images whose nearest prompt of 200 is their own; copies of real images are 6%.

    noise                                    CLIP score 0.267   concept 25%   copies 3%
    noise, reference                                    0.290           30%          0%
    start at 0.85                                       0.296           35%          7%
    start at 0.9, reference                             0.297           35%          3%
    start at 0.8                                        0.310           38%         10%
    start at 0.9, reference, 1 neighbour                0.292           30%          3%
"""

import dataclasses
from typing import Any, Literal, TypeAlias

from model.generation.arguments import check_choice
from model.generation.backbone import Backbone
from model.generation.start import STRENGTH, Reference, Start

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
    "fast": Preset(candidates=2, start="neighbour", strength=0.9, reference="neighbour"),
    "best": Preset(candidates=8, start="neighbour", strength=0.9, reference="neighbour"),
}


def resolve(quality: Quality | None, backbone: Backbone, *, neighbours_shown: bool, **given: Any) -> Preset:
    """Return the arguments of a call: those that are given, and for the others those of the preset.

    Where a preset starts from a neighbour or shows one, it does so only if the generator and the call support it. A
    generator that cannot see a reference starts with less noise instead.

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
        preset = dataclasses.replace(preset, reference="none", strength=STRENGTH)
    merged = dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})
    return dataclasses.replace(merged, strength=given.get("strength")) if merged.start == "noise" else merged
