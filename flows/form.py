"""Forms of the flows' parameters in Prefect's UI.

A config is a nested dataclass with up to 120 fields. Its form shows the fields of ``COMMON`` first, and the others in
the group ``advanced``, which is closed at first. Parameters may use the names of the form, the names of the fields, or
both. A name of a field takes precedence.

The UI submits the default of every field that it shows, even if nobody touched it. The schema therefore has the
defaults as examples, which the UI shows as placeholders. Only switches keep theirs, because the UI submits false for a
switch without one. A group is null until it is opened, and then submits nothing.
"""

import copy
import dataclasses
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, get_args, get_type_hints

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from model.encoder.identity import BUNDLED_ENCODER

ADVANCED = "advanced"
Schema = dict[str, Any]
DOMAIN = Field(json_schema_extra={"pattern": "^[a-z0-9][a-z0-9-]{0,62}$", "examples": ["birds"]})
"""Form of a domain's name. ``tasks.references.domain_name`` checks it, with a clearer message."""
LIST = Field(json_schema_extra={"minLength": 1, "examples": ["s3://my-bucket/urls.parquet"]})
ENCODERS = (
    BUNDLED_ENCODER,
    "ViT-B-32/laion2b_s34b_b79k",
    "ViT-B-16/datacomp_xl_s13b_b90k",
    "ViT-L-14/datacomp_xl_s13b_b90k",
)
"""Known encoders. Every open_clip model is allowed."""
_NULL = {"type": "null"}


class Form:
    """Base of a config that is a parameter of a flow.

    Attributes:
        COMMON: Fields that the form shows first. ``embed.encoder`` is the field ``encoder`` of the group ``embed``.
        CHOICES: Known values of text fields, by their name in the form. Other values are allowed too.
        EXTRA: Schemas of names that are in the form only, such as ``recipe``.
    """

    __slots__ = ()
    COMMON: ClassVar[tuple[str, ...]] = ()
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    EXTRA: ClassVar[Mapping[str, Schema]] = {}

    @classmethod
    def base_of(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the values that the form changes. ``given`` has the names of the fields and those of ``EXTRA``."""
        return {
            field.name: dataclasses.asdict(field.default_factory())
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # subclasses are dataclasses
            if field.default_factory is not dataclasses.MISSING
        }

    @classmethod
    def from_form(cls, values: Any) -> Any:
        """Return parameters with the names of the fields. Anything but a dictionary is returned as it is."""
        groups = {path.rpartition(".")[2]: path for path in cls.COMMON if "." in path}
        if not isinstance(values, dict) or not values.keys() & {ADVANCED, *groups, *cls.EXTRA}:
            return values
        given = _without_nulls(values.get(ADVANCED) or {})
        for name, value in values.items():
            if name in groups and value is not None:
                group, _, field = groups[name].partition(".")
                given = _merge(given, {group: _nest(field, value)})
        fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        named = {name: value for name, value in values.items() if name in fields}
        given |= {name: values[name] for name in cls.EXTRA if values.get(name) is not None}
        base = cls.base_of({**given, **named})
        merged = _merge(base, {name: value for name, value in given.items() if name in fields})
        return _merge(merged, named)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept the names of the form."""
        return core_schema.no_info_before_validator_function(cls.from_form, handler(source))

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        """Return the schema of the form."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        if ADVANCED not in schema["properties"]:  # else arranged by an earlier call
            _describe(cls, schema, handler.resolve_ref_schema, None)
            _arrange(cls, schema, handler.resolve_ref_schema)
        return reference


def attributes_of(cls: type) -> dict[str, str]:
    """Return the descriptions in the section ``Attributes:`` of a class's docstring, by field."""
    _, _, section = (cls.__doc__ or "").partition("Attributes:\n")
    entries = re.split(r"^(\w+): ", textwrap.dedent(section), flags=re.MULTILINE)[1:]
    texts = (" ".join(text.split()).replace("``", "`") for text in entries[1::2])  # the UI renders Markdown
    return dict(zip(entries[::2], texts, strict=True))


def _describe(cls: type, schema: Schema, resolve: Callable[[Schema], Schema], default: Any) -> None:
    """Describe and order the fields of a dataclass's schema, and of the dataclasses in it."""
    schema["description"] = " ".join((cls.__doc__ or "").partition("\n\n")[0].split())
    texts, hints = attributes_of(cls), get_type_hints(cls)
    for position, field in enumerate(dataclasses.fields(cls)):
        value = _default_of(field) if default is None else getattr(default, field.name)
        shown = _presented(schema["properties"][field.name], value)
        schema["properties"][field.name] = shown | {
            "title": field.name,
            "description": _with_default(texts.get(field.name, ""), shown, value),
            "position": position,
        }
        nested = {one.__name__: one for one in _dataclasses_in(hints[field.name])}
        for option in shown.get("anyOf", ()):
            if "$ref" in option:
                target = resolve(option)
                kind = nested[target["title"]]
                _describe(kind, target, resolve, value if isinstance(value, kind) else kind())


def _presented(schema: Schema, default: Any) -> Schema:
    """Return the schema of a field without the default that the UI would submit. Null comes first before groups."""
    schema = dict(schema)
    if "$ref" in schema:
        schema = {"anyOf": [{"$ref": schema.pop("$ref")}, _NULL], **schema}
    if "anyOf" in schema:
        options = [part for option in schema["anyOf"] for part in option.get("oneOf", (option,))]
        if any("$ref" in option for option in options):
            others = [option for option in options if option != _NULL]
            return {"anyOf": [_NULL, *others], "default": None}
        schema["anyOf"] = options
    if schema.get("type") != "boolean" and "const" not in schema:
        schema.pop("default", None)
        if default not in (None, (), dataclasses.MISSING):
            schema["examples"] = [default]
    return schema


def _with_default(text: str, shown: Schema, value: Any) -> str:
    if "Default:" in text or value in (None, (), dataclasses.MISSING) or dataclasses.is_dataclass(value):
        return text
    return text if "const" in shown else f"{text} Default: {json.dumps(value)}."


def _arrange(cls: type[Form], schema: Schema, resolve: Callable[[Schema], Schema]) -> None:
    """Move the common fields to the front, and the others to the group ``advanced``."""
    fields: dict[str, Schema] = schema["properties"]
    common: dict[str, Schema] = {}
    for path in cls.COMMON:
        *groups, name = path.split(".")
        inside = schema
        for group in groups:
            inside = resolve(next(one for one in inside["properties"][group]["anyOf"] if "$ref" in one))
        common[name] = copy.deepcopy(cls.EXTRA[name]) if name in cls.EXTRA else inside["properties"].pop(name)
        if name in cls.CHOICES:
            known = {"type": "string", "title": "known", "enum": list(cls.CHOICES[name])}
            common[name].pop("type", None)
            common[name]["anyOf"] = [known, {"type": "string", "title": "other", "minLength": 1}, _NULL]
    if fields:
        text = "The other settings. They take precedence over a recipe."
        advanced = {"type": "object", "title": ADVANCED, "properties": _numbered(fields)}
        common[ADVANCED] = {"anyOf": [_NULL, advanced], "default": None, "title": ADVANCED, "description": text}
    schema["properties"] = _numbered(common)


def _numbered(fields: dict[str, Schema]) -> dict[str, Schema]:
    return {name: {**field, "title": name, "position": at} for at, (name, field) in enumerate(fields.items())}


def _dataclasses_in(hint: Any) -> Iterator[type[Any]]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from _dataclasses_in(part)


def _default_of(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _nest(path: str, value: Any) -> Any:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nulls(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes``, group by group."""
    merged = dict(base)
    for name, value in changes.items():
        earlier = merged.get(name)
        if isinstance(earlier, Mapping) and isinstance(value, Mapping):
            value = _merge(earlier, value)
        merged[name] = value
    return merged
