"""Validation of training inputs before the first stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.new_domain import new_domain
from flows.train_generator import TrainGeneratorConfig
from infra.errors import EncoderMismatchError, InputError
from model.encoder.identity import EncoderIdentity
from model.saved_generator import BUNDLED_GENERATOR, pretrained_folder
from tasks.evaluate.config import EvaluateConfig, check_weights
from tasks.train.config import TrainConfig
from tasks.train.inputs import check_inputs


def identity_of(name: str) -> EncoderIdentity:
    return EncoderIdentity(**json.loads((pretrained_folder(name) / "model_index.json").read_text())["encoder_identity"])


def test_check_inputs_accepts_the_bundled_generator_and_its_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    train = TrainConfig(start_from=BUNDLED_GENERATOR, autoencoder=str(tmp_path))
    check_inputs(train, identity_of(BUNDLED_GENERATOR))
    check_weights(EvaluateConfig(inception_weights="s3://bucket/weights"))


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"start_from": "/absent"}, "start_from is not a saved pipeline: /absent; give sticker-generator"),
        ({"autoencoder": "/absent"}, "autoencoder is not an AutoencoderKL or VQModel: /absent"),
    ],
)
def test_check_inputs_with_wrong_path_fails_with_reason(train: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_inputs(TrainConfig(**train))


def test_check_inputs_with_absent_weights_or_other_encoder_fails() -> None:
    with pytest.raises(InputError, match=r"inception_weights does not exist: /absent"):
        check_weights(EvaluateConfig(inception_weights="/absent"))
    other = EncoderIdentity(name="other", weights_digest="0" * 64, preprocess_digest="0" * 64, dimension=256)
    with pytest.raises(EncoderMismatchError, match="encoders differ: sticker-generator"):
        check_inputs(TrainConfig(start_from=BUNDLED_GENERATOR), other)


def test_new_domain_with_a_wrong_generator_fails_before_the_download(tmp_path: Path) -> None:
    config = {"domain": "a", "urls": "/absent", "root": str(tmp_path), "train": {"start_from": "/absent"}}
    with pytest.raises(InputError, match="start_from is not a saved pipeline"):
        new_domain.fn(**new_domain.validate_parameters({"config": config}))
    assert not any(tmp_path.iterdir())


def test_train_generator_with_a_wrong_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="must be lower-case"):
        TrainGeneratorConfig(domain="A B", database="d")
