"""Marks of config fields that are left out of a stage's key, so that a new field keeps the keys of stored artifacts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_IN_KEY = "in_key"
IN_KEY_IF_SET: Mapping[str, Any] = {_IN_KEY: "if set"}
"""Metadata of a field that enters the key only with another value than its default."""

NOT_IN_KEY: Mapping[str, Any] = {_IN_KEY: "never"}
"""Metadata of a field that affects only when and how fast a stage runs."""


def key_settings(config: Any) -> Any:
    """Return ``config`` as :func:`dataclasses.asdict` does, without the fields that are left out of the key."""
    if isinstance(config, list | tuple):
        return type(config)(key_settings(item) for item in config)
    if isinstance(config, dict):
        return {name: key_settings(value) for name, value in config.items()}
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    kept = {}
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata.get(_IN_KEY)
        if rule is None or (rule == "if set" and value != field.default):
            kept[field.name] = key_settings(value)
    return kept
