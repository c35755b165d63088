"""Networks, objectives and defaults that are built from a training config, and configs that are refused."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.training_configs import (
    CODES,
    LATENTS,
    SMALL,
    VQ,
    VQ_LATENTS,
    WITH_IMAGES,
    autoencoders,
    configured,
    save_generator,
)

from infra.errors import EncoderMismatchError, InputError
from model.configs import TransformerConfig, UNetConfig
from model.networks.editor import is_editor, widen_input
from model.networks.image_tokens import takes_images
from model.networks.vq_autoencoder import build_autoencoder
from model.networks.vq_transformer import VQTransformer
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import pretrained_folder
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.restoration import Restoration
from model.training.objectives.vq_diffusion import MaskAndReplace
from tasks.train.config import TrainConfig
from tasks.train.setup import build_setup, objective_of


def test_build_setup_takes_size_defaults_and_weights_of_start_from(tmp_path: Path) -> None:
    network = tiny_models.network(image_size=16, layers=2)
    start = save_generator(
        tmp_path, network=network, guidance_scale=3.5, num_inference_steps=7, query="mean", candidates=4
    )
    setup = build_setup(configured(start_from=start), tiny_models.identity())
    assert setup.network_config == tiny_models.size(image_size=16, layers=2)
    assert (setup.image_size, setup.autoencoder) == (16, None)
    assert setup.defaults == {
        "guidance_scale": 3.5,
        "guidance_interval": [0.0, 1.0],
        "num_inference_steps": 7,
        "query": "mean",
        "truncation": 0.86,
        "neighbours": 2,
        "trained_neighbours": 2,
        "candidates": 4,
    }
    for name, weight in setup.network.state_dict().items():
        torch.testing.assert_close(weight, network.state_dict()[name])
    assert all(parameter.requires_grad for parameter in setup.network.parameters())
    assert (
        build_setup(configured(start_from=start, guidance_scale=1.0), tiny_models.identity()).defaults["guidance_scale"]
        == 1
    )
    same = build_setup(configured(start_from=start, network=setup.network_config), tiny_models.identity())
    assert same.network_config == setup.network_config
    with pytest.raises(InputError, match=r"network differs from that of .*; omit network"):
        build_setup(configured(start_from=start, network=SMALL), tiny_models.identity())
    with pytest.raises(EncoderMismatchError, match="start from random weights"):
        build_setup(configured(start_from=start), tiny_models.identity(name="other", weights="f" * 64))


def test_build_setup_accepts_bundled_generator() -> None:
    pipeline = KNNDiffusionPipeline.open(pretrained_folder("sticker-generator"))
    setup = build_setup(configured(start_from="sticker-generator"), pipeline.identity)
    assert setup.network_config == TransformerConfig(image_size=64, patch_size=4, layers=6, heads=8, head_width=64)
    assert is_editor(setup.network)
    assert isinstance(objective_of(configured(start_from="sticker-generator"), setup), FlowMatching)
    assert isinstance(objective_of(configured(start_from="sticker-generator", editing=True), setup), Restoration)


def test_build_setup_adds_image_tokens_to_the_initial_generator(tmp_path: Path) -> None:
    start = save_generator(tmp_path / "base")
    setup = build_setup(configured(start_from=start, network=WITH_IMAGES), tiny_models.identity())
    assert takes_images(setup.network)
    assert setup.network_config == WITH_IMAGES
    again = save_generator(tmp_path / "again", network=setup.network)
    for network in (None, WITH_IMAGES):
        assert build_setup(configured(start_from=again, network=network), tiny_models.identity()).network_config == (
            WITH_IMAGES
        )
    with pytest.raises(InputError, match=r"network differs from that of .*; omit network"):
        wider = dataclasses.replace(WITH_IMAGES, heads=2)
        build_setup(configured(start_from=start, network=wider), tiny_models.identity())


def test_build_setup_for_editing_widens_the_input(tmp_path: Path) -> None:
    start = save_generator(tmp_path / "base")
    assert is_editor(build_setup(configured(start_from=start, editing=True), tiny_models.identity()).network)
    editor = save_generator(tmp_path / "editor", network=widen_input(tiny_models.network(image_size=16)))
    for editing in (False, True):
        setup = build_setup(configured(start_from=editor, editing=editing), tiny_models.identity())
        assert is_editor(setup.network), "an editor is not changed"
    unet = save_generator(
        tmp_path / "unet",
        network=build_setup(configured(network=UNetConfig(widths=(32, 32))), tiny_models.identity()).network,
    )
    with pytest.raises(InputError, match="editing needs a transformer over pixels"):
        build_setup(configured(start_from=unet, editing=True), tiny_models.identity())


def test_build_setup_from_pipeline_over_codes_uses_its_autoencoder(tmp_path: Path) -> None:
    network = build_setup(
        configured(network=CODES, autoencoder=autoencoders(tmp_path)["vq"]), tiny_models.identity()
    ).network
    assert isinstance(network, VQTransformer)
    start = save_generator(tmp_path / "start", network=network, vae=build_autoencoder(VQ, seed=0))
    setup = build_setup(configured(start_from=start), tiny_models.identity())
    assert (setup.network_config, setup.image_size) == (CODES, 16)
    assert setup.autoencoder is not None
    objective = objective_of(configured(start_from=start), setup)
    assert isinstance(objective, MaskAndReplace)
    assert (objective.transitions.codes, objective.transitions.timesteps) == (16, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": SMALL, "image_size": 32}, "image_size does not fit the network: 32 px, not 16 px"),
        ({"network": LATENTS}, "does not fit RGB images: 4 channels; set autoencoder"),
        ({"network": SMALL, "autoencoder": "kl"}, "3 channels, the latents have 4; set channels=4"),
        (
            {"network": dataclasses.replace(VQ_LATENTS, channels=8), "autoencoder": "vq"},
            "8 channels, the latents have 4",
        ),
        (
            {"network": LATENTS, "autoencoder": "kl", "image_size": 8},
            "image_size does not fit the network: 8 px, not 16 px",
        ),
        ({"network": CODES, "autoencoder": "kl"}, "needs a VQModel of 16 codes at 8 px, the autoencoder has no codes"),
        ({"network": dataclasses.replace(CODES, codes=8), "autoencoder": "vq"}, "8 codes.* has 16 codes at 16 px"),
        ({"network": dataclasses.replace(CODES, tokens=64), "autoencoder": "vq"}, "at 32 px, .* has 16 codes at 16 px"),
        ({"network": LATENTS, "autoencoder": "nowhere"}, "cannot load an autoencoder: .*nowhere"),
    ],
)
def test_build_setup_raises_for_parts_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folders = autoencoders(tmp_path) | {"nowhere": str(tmp_path / "nowhere")}
    if "autoencoder" in changes:
        changes = changes | {"autoencoder": folders[changes["autoencoder"]]}
    with pytest.raises(InputError, match=message):
        build_setup(configured(**changes), tiny_models.identity())


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_build_setup_raises_for_damaged_autoencoder(tmp_path: Path, kind: str) -> None:
    folder = autoencoders(tmp_path)[kind]
    config = configured(network=LATENTS if kind == "kl" else CODES, autoencoder=folder)
    weights = Path(folder) / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    last = "decoder.conv_out.bias"
    damaged: dict[str, dict[str, Any]] = {
        r"1 of \d+ are missing": {name: weight for name, weight in whole.items() if name != last},
        "are NaN or infinite": whole | {last: whole[last] * torch.nan},
        "size mismatch|shape": whole | {last: torch.zeros(7)},
    }
    for message, damaged_weights in damaged.items():
        save_file(damaged_weights, weights)
        with pytest.raises(InputError, match=rf"(?s)cannot load an autoencoder: .*({message})"):
            build_setup(config, tiny_models.identity())
    save_file(whole, weights)
    assert build_setup(config, tiny_models.identity()).autoencoder is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"cpus_per_worker": 0}, "cpus_per_worker"),
        ({"window_bytes": 0}, "window_bytes"),
        ({"guidance_scale": math.nan}, "guidance_scale is not finite: nan; give a number"),
        ({"network": CODES}, "folder of a VQModel"),
        ({"editing": True, "autoencoder": "x"}, "over pixels"),
        ({"network": WITH_IMAGES, "autoencoder": "x"}, "neighbour_images needs a network over pixels: 2"),
        ({"editing": True, "network": UNetConfig()}, "transformer over pixels"),
    ],
)
def test_train_config_raises_for_invalid_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
