"""Elements of the page. Every text from the web becomes a text node or an attribute, never HTML."""

import datetime
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from tasks.serve.service.responses import Hit, ServedVersion

_SHOWN_COLUMNS = 12
_SHOWN_CHARACTERS = 200


def say(tag: str, text: str, classes: str = "") -> TextElement:
    """Add an element with a text, e.g. ``say("h2", "Neighbours")``."""
    return TextElement(tag=tag, text=text).classes(classes)


def image(source: str, alt: str, classes: str = "") -> Element:
    """Add an image of this service."""
    element = ui.element("img").classes(classes)
    element.props.update({"src": source, "alt": alt, "loading": "lazy", "decoding": "async"})
    return element


def box(classes: str, tag: str = "div", **attributes: str) -> Element:
    """Add a container."""
    element = ui.element(tag).classes(classes)
    element.props.update({name.replace("_", "-"): value for name, value in attributes.items()})
    return element


def press(label: str, on_click: Callable[..., Any], classes: str = "", tag: str = "button") -> Element:
    """Add a plain button that contains other elements, with a label for screen readers."""
    return box(classes, tag, aria_label=label, type="button").on("click", on_click, args=[])


def thumbnail_source(database: ServedVersion, row: int) -> str:
    """Return the address of a stored image. The generation keeps a swapped database from showing another image."""
    name = database.name.replace("%", "%25").replace("/", "%2F").replace("?", "%3F").replace("#", "%23")
    return f"playground/thumbnails/{name}/{row}?generation={database.generation}"


def result_source(job: str, number: int, *, download: bool = False) -> str:
    """Return the address of a generated image."""
    return f"playground/results/{job}/{number}.png" + ("?download=1" if download else "")


def web_address(url: str | None) -> str | None:
    """Return ``url`` if it is a link to the web, else None: data may contain ``javascript:`` URLs."""
    if url is None:
        return None
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return None
    return url.strip() if parts.scheme.lower() in ("http", "https") and parts.netloc else None


def source_link(url: str | None) -> None:
    """Add a link to the source of a stored image, or its text if it is not a link to the web."""
    address = web_address(url)
    if address is None:
        if url:
            say("span", shorten(url), "source")
        return
    link = say("a", shorten(address, 60), "source")
    link.props.update({"href": address, "target": "_blank", "rel": "noopener noreferrer nofollow"})


def shorten(value: Any, characters: int = _SHOWN_CHARACTERS) -> str:
    """Return a value as a text of at most ``characters``."""
    text = str(value)
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def pairs(values: Mapping[str, Any], limit: int = _SHOWN_COLUMNS) -> None:
    """Add a list of names and values, at most ``limit`` of them."""
    with box("pairs", "dl"):
        for name, value in list(values.items())[:limit]:
            say("dt", shorten(name, 40))
            say("dd", shorten(value))


def score_text(score: float) -> str:
    """Return a cosine as a text."""
    return f"{score:.2f}"


def age_text(created_ms: int | None) -> str:
    """Return the age of a version, e.g. "3 days"."""
    if created_ms is None:
        return "unknown"
    seconds = max(0.0, datetime.datetime.now(datetime.UTC).timestamp() - created_ms / 1_000)
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count:,} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"


def served_text(database: ServedVersion) -> str:
    """Return the name and version of a database, e.g. "birds, version 3"."""
    return database.name if database.version is None else f"{database.name}, version {database.version}"


def hit_alt(hit: Hit) -> str:
    """Return a text for a stored image."""
    return f"Stored image {hit.id}, similarity {score_text(hit.score)}"
