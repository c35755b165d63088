"""Recipes are complete configs, and Prefect's forms return them unchanged."""

import dataclasses
import inspect
from typing import Any

import pytest

from flows.new_domain import NewDomainConfig, new_domain
from flows.recipes import RECIPES, demo_cpu, own_domain, photos_h100, stickers_h100
from model.configs import TransformerConfig, UNetConfig, VQTransformerConfig
from model.saved_generator import BUNDLED_GENERATOR
from tasks.train.config import TrainConfig
from tasks.train.setup import image_side


def config_of(name: str, **options: Any) -> NewDomainConfig:
    needed = {"autoencoder": "vae"} if name == "photos_h100" else {}
    recipe: NewDomainConfig = RECIPES[name]("pets", "urls.csv", root="data", **needed, **options)
    return recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_docstring_has_every_heading(name: str) -> None:
    head = inspect.getdoc(RECIPES[name]) or ""
    for part in ("Source:", "Hardware:", "Time:", "Result:", "Command:"):
        assert part in head, part


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_keeps_domain_settings_and_passes_through_a_form(name: str) -> None:
    config = config_of(name, texts=("a dog",), allow_hosts=("127.0.0.1:80",))
    assert (config.domain, config.urls, config.root) == ("pets", "urls.csv", "data")
    assert config.download.policy.allow_hosts == ("127.0.0.1:80",)
    assert config.index.texts == config.evaluate.prompts == ("a dog",)
    assert new_domain.validate_parameters({"config": dataclasses.asdict(config)})["config"] == config


def test_demo_cpu_with_train_starts_from_the_bundled_generator() -> None:
    assert demo_cpu("pets", "urls.csv", root="data").train is None
    config = demo_cpu("pets", "urls.csv", root="data", train=True)
    assert config.train is not None
    assert (config.train.start_from, config.train.network) == (BUNDLED_GENERATOR, None)
    assert (config.train.training.images, config.train.training.learning_rate) == (2_000, 2e-4)


def test_own_domain_with_other_encoder_trains_from_random_weights() -> None:
    own = own_domain("pets", "urls.csv", train=True, encoder="ViT-B-32/laion2b_s34b_b79k").train
    assert own is not None
    assert own.start_from is None
    assert own.network == TransformerConfig(image_size=32, patch_size=4, layers=6, heads=5, head_width=32)
    embedded = own_domain("pets", "urls.csv", train=True).train
    assert embedded is not None
    assert embedded.start_from == BUNDLED_GENERATOR


def test_stickers_h100_has_the_settings_of_the_bundled_generator() -> None:
    train = stickers_h100("pets", "urls.csv").train
    assert train is not None
    assert train.network == TransformerConfig(image_size=64, patch_size=4, layers=6, heads=8, head_width=64)
    assert (train.editing, train.restoration.drop_reference, train.use_gpu) == (True, 0.7, True)
    assert (train.conditioning.neighbours, train.conditioning.pool) == (10, 20)
    training = train.training
    assert (training.batch_size, training.learning_rate, training.ema_decay) == (512, 1.5e-3, 0.999)
    assert (training.images, training.steps) == (2_048_000, 4_000)


def test_photos_h100_trains_on_latents_of_the_given_autoencoder() -> None:
    class Latent:
        class config:  # noqa: N801 - the name in diffusers
            block_out_channels = (128, 256, 512, 512)
            latent_channels = 4

    train = photos_h100("pets", "urls.csv", autoencoder="vae").train
    assert train is not None
    assert isinstance(train.network, TransformerConfig)
    assert (train.autoencoder, train.image_size) == ("vae", 256)
    assert image_side(train.network, Latent()) == 256  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "network",
    [
        TransformerConfig(image_size=64),
        UNetConfig(image_size=32, widths=(32, 64)),
        VQTransformerConfig(layers=3),
        None,
    ],
    ids=lambda network: getattr(network, "kind", "none"),
)
def test_network_config_passes_through_a_form_with_its_type(network: Any) -> None:
    config = dataclasses.replace(
        demo_cpu("pets", "u.csv", root="data"), train=TrainConfig(network=network, autoencoder="x")
    )
    parameters = new_domain.serialize_parameters({"config": config})
    assert new_domain.validate_parameters(parameters)["config"] == config
    named = {"domain": "pets", "urls": "u.csv", "train": {"network": {"kind": "unet", "image_size": 32}}}
    assert new_domain.validate_parameters({"config": named})["config"].train.network == UNetConfig(image_size=32)
