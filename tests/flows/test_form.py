"""Tests of the forms that Prefect's UI shows of the flows' parameters. No server is started."""

from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows.form import ADVANCED
from flows.new_domain import NewDomainConfig, new_domain
from flows.recipes import RECIPES
from flows.train_generator import train_generator
from infra.registry_tags import GENERATOR_NAME
from model.encoder.identity import BUNDLED_ENCODER
from tasks.embed.task import EmbedConfig

DEPLOYMENTS = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text())["deployments"]
COMMON = {
    "new-domain": ["domain", "urls", "folder", "recipe", "encoder", "target_recall", "generator", "root"],
    "rebuild-index": ["domain", "urls", "folder", "takedown", "compact", "encoder", "target_recall", "root"],
    "train-generator": ["domain", "database", "start_from", "images", "batch_size", "learning_rate", "use_gpu", "root"],
    "sweep": ["name", "approval", "root"],
    "evaluate-generator": ["databases", "generator", "texts", "samples", "use_gpu", "root"],
}


def flow_of(deployment: dict[str, Any]) -> Any:
    return resolve_name(deployment["entrypoint"].replace(".py:", ":").replace("/", "."))


def schema_of(flow: Any) -> dict[str, Any]:
    return parameter_schema(flow).model_dump()


def form_of(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the parameter ``config``."""
    config: dict[str, Any] = schema["properties"]["config"]
    reference = config.get("$ref") or config.get("allOf", [{}])[0].get("$ref")
    return schema["definitions"][reference.rpartition("/")[2]] if reference else config


def objects_in(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield the properties of every object in a schema."""
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema["properties"]
        for part in schema.values():
            yield from objects_in(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects_in(part)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one["name"])
def test_form_describes_every_field_in_order_and_accepts_the_deployed_parameters(deployment: dict[str, Any]) -> None:
    schema = schema_of(flow_of(deployment))
    config = form_of(schema)
    for fields in objects_in([config, schema["definitions"]]):
        positions = [field["position"] for field in fields.values()]
        assert positions == sorted(set(positions))
        assert all(field["description"].strip() for field in fields.values()), fields
        for field in fields.values():  # the UI would submit it although nobody touched it
            switch = field.get("type") == "boolean" or "const" in field
            assert switch or field.get("default") is None, field
    names = list(config["properties"])
    assert names[: names.index(ADVANCED)] == COMMON.get(deployment["name"], names[:-1])
    assert set(config.get("required", ())) <= set(names)
    assert validate(deployment["parameters"], schema, raise_on_error=False, preprocess=True) == []


def test_form_has_choices_and_bounds() -> None:
    form = form_of(schema_of(new_domain))["properties"]
    assert form["recipe"]["anyOf"][0]["enum"] == list(RECIPES)
    assert form["encoder"]["anyOf"][0]["enum"][0] == BUNDLED_ENCODER
    assert (form["target_recall"]["minimum"], form["target_recall"]["maximum"]) == (0, 1)
    bad = {"config": {"domain": "A B", "urls": "", "target_recall": 2}}
    assert len(validate(bad, schema_of(new_domain), raise_on_error=False, preprocess=True)) == 3
    good = {"config": {"domain": "a", "urls": "b", "encoder": "ViT-H-14/other", "advanced": {"index": None}}}
    assert validate(good, schema_of(new_domain), raise_on_error=False, preprocess=True) == []


def parsed(flow: Any = new_domain, **config: Any) -> Any:
    return flow.validate_parameters({"config": {"domain": "birds", **config}})["config"]


def test_form_names_are_those_of_the_fields() -> None:
    form = parsed(
        urls="u", encoder="a/b", target_recall=0.8, advanced={"embed": {"batch_size": 8}, "train": None, "wait_s": 5}
    )
    fields = parsed(urls="u", embed={"encoder": "a/b", "batch_size": 8}, index={"target_recall": 0.8}, wait_s=5)
    assert form == fields
    assert parsed(urls="u", encoder=None, advanced=None) == NewDomainConfig(domain="birds", urls="u")
    assert parsed(urls="u", encoder="a/b", embed=EmbedConfig(encoder="c/d")).embed.encoder == "c/d"


def test_form_with_a_recipe_overrides_only_what_is_given() -> None:
    recipe = RECIPES["stickers_h100"]("birds", "u")
    assert parsed(urls="u", recipe="stickers_h100") == recipe
    changed = parsed(
        urls="u", recipe="stickers_h100", advanced={"train": {"training": {"images": 4096}}, "index": None}
    )
    assert (changed.train.training.images, changed.train.training.batch_size) == (4096, 512)
    assert changed.evaluate == recipe.evaluate
    photos = parsed(urls="u", recipe="photos_h100", advanced={"train": {"autoencoder": "vae"}})
    assert photos == RECIPES["photos_h100"]("birds", "u", autoencoder="vae")
    assert parsed(urls="u", recipe="own_domain", encoder="a/b") == RECIPES["own_domain"]("birds", "u", encoder="a/b")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"recipe": "magic"}, "recipe is unknown: magic"),
        ({"recipe": "photos_h100"}, "give train.autoencoder"),
        ({"target_recall": 2}, "target_recall"),
    ],
)
def test_form_with_a_wrong_value_fails_with_the_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ParameterTypeError, match=reason):
        parsed(urls="u", **config)


def test_form_of_the_evaluation_keeps_its_defaults() -> None:
    from flows.evaluate_generator import evaluate_generator

    values = {"config": {"databases": ["a"], "samples": 16}}
    config = evaluate_generator.validate_parameters(values)["config"]
    assert (config.generator, config.evaluate.samples, config.evaluate.ablations) == (GENERATOR_NAME, 16, True)
    trained = parsed(train_generator, database="d", images=640, start_from=BUNDLED_ENCODER, use_gpu=False)
    assert (trained.train.training.images, trained.train.start_from) == (640, BUNDLED_ENCODER)
