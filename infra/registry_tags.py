"""Names and tags of registered models, and the addresses of their pages."""

import re
from collections.abc import Callable
from typing import TypeVar

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from infra import uris, validation
from infra.errors import IntegrityError
from infra.settings import Settings

PACKAGE_TAG = "package.sha256"
"""Tag of a version: the digest of the wheel of this package that is stored with it."""
DATABASE_PREFIX = "knn-database."
GENERATOR_NAME = "knn-diffusion"
CHAMPION = "champion"
RUN_TAG = "run"
"""Tag of a version: the page of the run that registered it."""
DIGEST_TAG = "digest"
FOLDER_TAG = "uri"
Parsed = TypeVar("Parsed")
_MEASURED = (
    "recall_", "clip_score_", "fd_", "fid_", "mmd_", "precision_", "nearest_", "copy_rate_", "diversity_",
)  # fmt: skip


def champion_uri(name: str) -> str:
    """Return the MLflow URI of the champion of a registered model, e.g. ``models:/knn-database.twemoji@champion``."""
    return f"models:/{name}@{CHAMPION}"


def run_page(run: Run, settings: Settings) -> str:
    """Return the address of a run's page; without an MLflow server, the part after the server's address."""
    page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    server = settings.tracking_uri if settings.tracking_uri.startswith(("http://", "https://")) else ""
    return uris.masked(server.rstrip("/")) + page


def version_page(name: str, version: int, settings: Settings) -> str:
    """Return the address of a version's page, as :func:`run_page`."""
    server = settings.tracking_uri if settings.tracking_uri.startswith(("http://", "https://")) else ""
    return f"{uris.masked(server.rstrip('/'))}/#/models/{name}/versions/{version}"


def typed_tags(version: ModelVersion) -> dict[str, str | int | float]:
    """Parse the tags of a version, which MLflow stores as strings. Raises ``IntegrityError``."""
    return {tag: checked_tag(version, tag, _parser_of(tag)) for tag in version.tags}


def _parser_of(tag: str) -> Callable[[str], str | int | float]:
    if tag in {"rows", "bytes", "images_seen"}:
        return _count
    if tag.startswith(_MEASURED):
        return float
    return {DIGEST_TAG: validation.digest, FOLDER_TAG: validation.uri}.get(tag, str)


def checked_tag(version: ModelVersion, tag: str, parse: Callable[[str], Parsed]) -> Parsed:
    """Parse a tag, which anyone with write access to the registry may have set. Raises ``IntegrityError``."""
    try:
        return parse(version.tags.get(tag, ""))
    except ValueError as error:
        raise IntegrityError(
            f"models:/{version.name}/{version.version} has an unusable tag {tag}: {error}; register it again"
        ) from error


def _count(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", value):
        raise ValueError(f"a count must be digits, not {validation.shown(value)}")
    return validation.count(int(value), "a count")


def full_name(short: str, kind: str) -> str:
    """Return the name of the registered model of a kind; a domain gets the prefix of databases."""
    if kind == "database" and not short.startswith(DATABASE_PREFIX):
        return DATABASE_PREFIX + short
    return short


def is_kind(name: str, kind: str) -> bool:
    """Return True if the registered model holds artifacts of the kind."""
    return name.startswith(DATABASE_PREFIX) if kind == "database" else name == GENERATOR_NAME
