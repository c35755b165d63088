"""OpenAPI of bodies that the routes read themselves, because images are decoded in a thread."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

_REFERENCE = "#/components/schemas/{model}"


def body_of(model: type[BaseModel], media_type: str = "application/json") -> dict[str, Any]:
    """Return the request body of a route, for its ``openapi_extra``."""
    return _body({media_type: {"schema": schema_of(model)}})


def job_body(kinds: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Return the request body of a job: one of the requests, and its kind."""
    choices = []
    for kind, model in kinds.items():
        schema = schema_of(model)
        schema["title"] = f"{kind.title()}Job"
        schema["properties"] = {"kind": {"type": "string", "const": kind}} | schema["properties"]
        schema["required"] = ["kind", *schema.get("required", ())]
        choices.append(schema)
    return _body({"application/json": {"schema": {"oneOf": choices}}})


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a request. Requests have no nested models."""
    return model.model_json_schema(ref_template=_REFERENCE)


def _body(content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": content}}
