"""Register stages: databases and generators in MLflow as champions, each loadable by its URI alone."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from infra import artifacts, logs
from infra.promotions import CANDIDATE, Promotions
from infra.registry import RegisteredVersion, Registry
from infra.registry_tags import CHAMPION, DATABASE_PREFIX, GENERATOR_NAME
from infra.settings import Settings
from infra.storage.lease import lease
from infra.wheel import Package, package
from model.encoder.identity import BUNDLED_ENCODER
from tasks.events import emit_registered
from tasks.promote import promote_registered, promotion_folder
from tasks.promotion.config import GATES_TAG, DatabaseGates, gates_to_tag
from tasks.promotion.presentation import database_presentation, generator_presentation
from tasks.references.generator import PIPELINE, generator_folder
from tasks.references.lineage import embeddings_of
from tasks.references.types import DatabaseVersion, Generator, encoder_of
from tasks.stage import stage_task

_SCRIPTS = Path(__file__).parent / "pyfunc"
_WAIT_S = 60.0
"""Seconds to wait for another process that promotes a generator."""
_PROMPTS = Schema([ColSpec(DataType.string, "prompt")])
DATABASE_SIGNATURE = ModelSignature(
    inputs=_PROMPTS,
    outputs=Schema([ColSpec(DataType.string, "prompt"), ColSpec(DataType.string, "neighbours")]),
    params=ParamSchema([ParamSpec("k", DataType.long, 10)]),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RegistrationResult:
    """Registry URIs of a version, and whether it was registered before.

    ``alias_uri`` ends in ``@champion``, or in ``@candidate`` if the version was not promoted.
    """

    uri: str
    alias_uri: str
    skipped: bool
    seconds: float


@stage_task(name="register-database")
def register_database(
    domain: str,
    database: DatabaseVersion,
    settings: Settings,
    run_id: str | None = None,
    *,
    gates: DatabaseGates | None = None,
    seconds: Mapping[str, float] | None = None,
    promote: bool = True,
) -> RegistrationResult:
    """Register ``database`` as ``knn-database.<domain>``, and promote it if the champion is not pinned.

    With ``gates``, it must pass them too. They are stored as a tag, for later promotions of this version. ``seconds``
    of the stages become metrics. Without ``promote`` the version remains a candidate.
    """
    manifest = database.manifest()
    tags = {
        **_tags(manifest),
        "rows": str(manifest.rows - manifest.info["hidden"]),
        "bytes": str(_stored_bytes(database)),
        "index": manifest.info["factory"],
    }
    for name in ("recall_at_10_image", "recall_at_10_text"):
        if manifest.info[name] is not None:  # None if there were no queries to measure it
            tags[name] = f"{manifest.info[name]:.4f}"
    if gates is not None:
        tags[GATES_TAG] = gates_to_tag(gates)
    started = time.monotonic()
    registered = Registry(settings).register(
        DATABASE_PREFIX + domain,
        database.uri,
        script=_SCRIPTS / "database.py",
        signature=DATABASE_SIGNATURE,
        tags=tags,
        model_config={"uri": database.uri},
        presentation=database_presentation(database, settings.cache_folder, seconds),
        package=_package_for(manifest, settings),
        run_id=run_id,
        alias=CANDIDATE,
    )
    is_champion = False
    if promote:  # the calling flow holds the lease of the domain
        decision = promote_registered(registered, settings, gates_of_domain=gates)
        is_champion = decision is None or decision.moved
    return _log_registration(registered, time.monotonic() - started, is_champion=is_champion)


@stage_task(name="register-generator")
def register_generator(
    generator: Generator,
    database_uri: str,
    scores: dict[str, float],
    settings: Settings,
    run_id: str | None = None,
    *,
    sheet: Path | None = None,
    promote: bool = True,
) -> RegistrationResult:
    """Register ``generator``, weights included, as ``knn-diffusion``, and promote it if its absolute gates pass.

    With ``KNN_DIFFUSION_PROMOTION=event`` it remains a candidate until it has been compared with the champion, and
    without ``promote`` in any case. ``database_uri`` is the default database of the pyfunc model. ``scores`` become
    tags. ``sheet`` is an image of samples.
    """
    manifest, folder = generator.manifest(), generator_folder(generator, settings.cache_folder)
    origin: dict[str, str] = {
        name: str(manifest.info[name]) for name in ("images_seen", "adopted") if name in manifest.info
    }
    started = time.monotonic()
    registered = Registry(settings).register(
        GENERATOR_NAME,
        generator.uri,
        script=_SCRIPTS / "generator.py",
        signature=generator_signature(folder),
        tags={
            **_tags(manifest),
            **origin,
            "database": database_uri,
            **{name: f"{value:.4f}" for name, value in scores.items()},
        },
        files={PIPELINE: folder},
        model_config={"database": database_uri},
        presentation=generator_presentation(manifest, database_uri, scores, sheet),
        package=_package_for(manifest, settings),
        run_id=run_id,
        alias=CANDIDATE,
    )
    champion = Promotions(settings).champion(GENERATOR_NAME)
    by_event = settings.promotion == "event" and champion not in (None, registered.version)
    is_champion = False
    if promote and not by_event:  # otherwise the event starts the comparison with the champion
        with lease(promotion_folder(GENERATOR_NAME, settings), holder=f"register {GENERATOR_NAME}", wait_s=_WAIT_S):
            decision = promote_registered(registered, settings, scores)
        is_champion = decision is None or decision.moved
    return _log_registration(registered, time.monotonic() - started, is_champion=is_champion)


def generator_signature(pipeline: Path) -> ModelSignature:
    """Return the signature: prompts in, PNG images out. Parameter defaults are those of the saved pipeline."""
    defaults = json.loads((pipeline / "model_index.json").read_text())
    params = [
        ParamSpec("seed", DataType.long, 0),
        ParamSpec("steps", DataType.long, defaults["num_inference_steps"]),
        ParamSpec("guidance", DataType.double, float(defaults["guidance_scale"])),
        ParamSpec("candidates", DataType.long, defaults.get("candidates", 1)),
        ParamSpec("k", DataType.long, defaults.get("neighbours", 10)),
        ParamSpec("database", DataType.string, ""),  # empty: the default database of the version
    ]
    outputs = Schema([ColSpec(DataType.string, "prompt"), ColSpec(DataType.binary, "png")])
    return ModelSignature(inputs=_PROMPTS, outputs=outputs, params=ParamSchema(params))


def _package_for(manifest: artifacts.Manifest, settings: Settings) -> Package:
    """Return this package as a requirement, with the weights of the encoder if it has them."""
    return package(settings.cache_folder, {BUNDLED_ENCODER} & {encoder_of(manifest).name})


def _tags(manifest: artifacts.Manifest) -> dict[str, str]:
    return {"encoder": encoder_of(manifest).name, "rows": str(manifest.rows)}


def _stored_bytes(database: DatabaseVersion) -> int:
    """Return the bytes of a database's index and embeddings, including files stored by earlier versions."""
    parts = (database.manifest(), embeddings_of(database).manifest())
    return sum(file.bytes for part in parts for file in part.files)


def _log_registration(registered: RegisteredVersion, seconds: float, *, is_champion: bool) -> RegistrationResult:
    state = "was registered" if registered.existed else f"{seconds:.1f} s"
    alias_uri = f"models:/{registered.name}@{CHAMPION if is_champion else CANDIDATE}"
    logs.get("stage").info("%-11s %s = version %d  %s", "register", alias_uri, registered.version, state)
    emit_registered(registered.name, registered.version)
    return RegistrationResult(uri=registered.uri, alias_uri=alias_uri, skipped=registered.existed, seconds=seconds)
