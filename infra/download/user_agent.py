"""The ``User-Agent`` header of downloads: it names this project and says where to read about it."""

import functools
import importlib.metadata
import re

from infra.errors import ConfigError

ROBOT = "knn-diffusion"
"""Product token by which sites address this project in robots.txt and ``X-Robots-Tag``."""

_PREFERRED = ("Repository", "Homepage", "Documentation")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,198}[\x21-\x7e])?")


@functools.cache
def default_user_agent() -> str:
    """Return ``knn-diffusion/VERSION (+URL)``, with a URL from the metadata of the package."""
    metadata = importlib.metadata.metadata(ROBOT)
    entries = (entry.partition(",") for entry in metadata.get_all("Project-URL") or ())
    urls = {label.strip(): url.strip() for label, _, url in entries}
    contact = next((urls[label] for label in (*_PREFERRED, *urls) if label in urls), None)
    product = f"{ROBOT}/{metadata['Version']}"
    return product if contact is None else f"{product} (+{contact})"


def require_user_agent(value: str) -> None:
    """Raise ``ConfigError`` if ``value`` cannot be a ``User-Agent`` header."""
    if not _HEADER_VALUE.fullmatch(value):
        raise ConfigError(
            f"user_agent is not 1 to 200 printable ASCII characters: {value[:80]!r}; "
            'use the form "NAME/VERSION (+URL or address of a contact)"'
        )
