"""Presets of a call, "fast" and "best". Arguments that are given override them.

"fast" was chosen with the bundled generator on 40 prompts and Twemoji, without the images that a prompt names. "best"
was not among the settings that were compared: it is "fast" with more candidates. docs/results.md has the figures, and
``tests/benchmarks/generator.py`` measures both presets on other prompts.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

from model.generation.arguments import check_choice
from model.generation.backbone import Backbone
from model.generation.condition import QuerySlot
from model.generation.start import Start

Quality: TypeAlias = Literal["fast", "best"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Arguments of a call that trade its cost for the quality of the images. None is the generator's default.

    Attributes:
        candidates: Images generated for each image that is returned.
        query: Embedding in the query's slot. It conditions, and selects among the candidates.
        start: What the flow starts from.
        strength: Share of noise that is added to the start.
    """

    candidates: int | None = None
    query: QuerySlot | None = None
    start: Start = "noise"
    strength: float | None = None


PRESETS: dict[Quality, Preset] = {
    "fast": Preset(candidates=3, query="both", start="neighbour", strength=0.8),
    "best": Preset(candidates=8, query="both", start="neighbour", strength=0.8),
}


def resolve(
    quality: Quality | None, backbone: Backbone, *, neighbours_shown: bool, has_images: bool, **given: Any
) -> Preset:
    """Fill in the arguments that are not given from the preset.

    A preset uses neighbours only if the generator and the call support it.

    Args:
        quality: The preset. None: no preset; the call starts from noise unless ``start`` is given.
        backbone: The generator.
        neighbours_shown: False without retrieval, and for an interpolation.
        has_images: False if the database has no images that can be read. The preset then starts from noise.
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
        preset = dataclasses.replace(preset, query=None, start="noise")
    elif not has_images:
        preset = dataclasses.replace(preset, start="noise")
    merged = dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})
    return dataclasses.replace(merged, strength=given.get("strength")) if merged.start == "noise" else merged
