"""Measurement of the gates of a registered version."""

from typing import Any

from infra import logs
from infra.errors import NotFoundError
from infra.promotions import GateResult
from infra.registry import Registry
from infra.registry_tags import GENERATOR_NAME
from infra.settings import Settings
from tasks.promotion.config import GATES_TAG, DatabaseGates, GeneratorGates, gates_from_tag
from tasks.promotion.database_gates import measure_database
from tasks.references.types import DatabaseVersion, Generator


def measure(
    name: str,
    number: int,
    before: int | None,
    database_gates: DatabaseGates | None,
    generator_gates: GeneratorGates,
    settings: Settings,
) -> tuple[GateResult, ...]:
    """Measure the gates of version ``number``. Compare it with the champion ``before``, unless it is the champion."""
    is_other = before is not None and before != number
    if name != GENERATOR_NAME:
        version = open_version(DatabaseVersion, name, number, settings)
        champion = champion_database(name, before, settings) if is_other else None
        limits = database_gates or _recorded_gates(name, number, settings)
        return measure_database(version, champion, limits, settings.cache_folder)
    from tasks.promotion.generator_gates import (  # imported here: the gates of a database need no torch
        compare,
        comparison_gates,
        encoder_gate,
        evaluation_config,
        neighbour_gate,
    )

    gates, tags = generator_gates, _tags(name, number, settings)
    generator = open_version(Generator, name, number, settings)
    database_uri = str(tags.get("database", ""))
    pulled = Registry(settings).pull(database_uri, kind=DatabaseVersion.kind)
    database = DatabaseVersion.of(pulled.manifest, pulled.folder_uri)
    results = [encoder_gate(generator, database)]
    if gates.neighbour_loss is not None:
        results.append(neighbour_gate(tags, gates.neighbour_loss))
    if is_other and gates.compares and results[0].passed:
        champion_generator = open_version(Generator, name, before, settings)
        if encoder_gate(champion_generator, database).passed:  # otherwise the champion cannot use this database
            config = evaluation_config(gates)
            comparison = compare(generator, champion_generator, database, config, settings.cache_folder)
            results.extend(comparison_gates(comparison, gates))
    return tuple(results)


def _recorded_gates(name: str, version: int, settings: Settings) -> DatabaseGates:
    """Return the gates of the domain when the version was registered, or the defaults."""
    recorded = _tags(name, version, settings).get(GATES_TAG)
    return DatabaseGates() if recorded is None else gates_from_tag(str(recorded))


def open_version(kind: type[Any], name: str, version: int | None, settings: Settings) -> Any:
    """Open a registered version as a reference of ``kind``."""
    pulled = Registry(settings).pull(f"models:/{name}/{version}", kind=kind.kind)
    return kind.of(pulled.manifest, pulled.folder_uri)


def champion_database(name: str, number: int | None, settings: Settings) -> DatabaseVersion | None:
    """Open the champion, or return None if there is none or its files are lost: its successor replaces it."""
    if number is None:
        return None
    try:
        version: DatabaseVersion = open_version(DatabaseVersion, name, number, settings)
        return version
    except NotFoundError as error:
        logs.get("stage").warning("%-11s the champion is not compared: %s", "promote", error)
        return None


def _tags(name: str, version: int, settings: Settings) -> dict[str, Any]:
    listed = Registry(settings).versions(Generator.kind if name == GENERATOR_NAME else DatabaseVersion.kind)
    found = [one for one in listed if (one["name"], one["version"]) == (name, version)]
    if not found:
        raise NotFoundError(f"version is not registered: {name}/{version}; see knn-diffusion databases")
    return found[0]
