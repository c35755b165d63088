"""Checks of requests that need the model or the database, or that bound their cost. They raise ``InputError``."""

import math
import re
from typing import Any

from infra.errors import InputError
from tasks.serve.service.generator import OpenModel
from tasks.serve.service.requests import GenerateRequest
from tasks.serve.service.served import OpenDatabase

MAX_IMAGE_STEPS = 6_400
"""Maximum of images times candidates times steps: 16 images of quality "best" in 50 steps, some minutes on a CPU."""
MAX_WORD_CHARACTERS = 200
"""Maximum characters without white space; the tokenizer's time grows faster than the length of a word."""
_LONG_WORD = re.compile(rf"[^ \t\r\n]{{{MAX_WORD_CHARACTERS + 1},}}")
"""Other separators do not count: the tokenizer removes control characters, which joins the words beside them."""


def require_text(*texts: str | None) -> None:
    """Raise ``InputError`` if a text that is given is empty, or has a word that is too long."""
    if any(text is not None and not text.strip() for text in texts):
        raise InputError("a text is empty; describe what the image should show")
    words = (match for text in texts if text is not None and (match := _LONG_WORD.search(text)))
    if (word := next(words, None)) is not None:
        raise InputError(f"a word is too long: {len(word[0])} characters; give at most {MAX_WORD_CHARACTERS}")


def check_steps(n: int, settings: dict[str, Any]) -> None:
    """Raise ``InputError`` if one request for ``n`` images would occupy the generator for too long."""
    counts = [n, settings["candidates"], settings["steps"]]
    if (total := math.prod(counts)) > MAX_IMAGE_STEPS:
        product = " × ".join(map(str, counts))
        raise InputError(f"n × candidates × steps is too large: {product} = {total}; give at most {MAX_IMAGE_STEPS}")


def check_start(request: GenerateRequest, opened: OpenDatabase, model: OpenModel) -> None:
    """Raise ``InputError`` if a generation cannot start from a stored neighbour, although the request says so."""
    if request.start != "neighbour":
        return
    if request.interpolate_to is not None:
        raise InputError("start=neighbour does not apply to an interpolation; remove it")
    if not model.backbone.starts_from_images:
        raise InputError("this model starts from noise only; remove start=neighbour")
    if not opened.has_images:
        raise InputError(f"database {opened.name} has no images to start from; remove start=neighbour")


def check_embedding(embedding: list[float], model: OpenModel) -> None:
    """Raise ``InputError`` if an embedding is not one of the model's encoder."""
    identity = model.pipeline.identity
    if len(embedding) != identity.dimension:
        line = f"embedding has {len(embedding)} numbers; give {identity.dimension}, as encoder {identity.name} does"
        raise InputError(line)
    if not math.hypot(*embedding) > 0:
        raise InputError("embedding has no direction; give one that is not zero")
