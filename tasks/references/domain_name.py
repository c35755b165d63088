"""Names of domains."""

import re

from infra.errors import ConfigError

_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def require_domain(domain: str) -> None:
    """Raise ``ConfigError`` if the name cannot be used for both a folder and a registered model."""
    if not _DOMAIN.fullmatch(domain) or domain == "mlflow":  # this folder of the root holds registered files
        raise ConfigError(f"domain {domain!r} must be lower-case letters, digits and hyphens, such as 'twemoji'")
