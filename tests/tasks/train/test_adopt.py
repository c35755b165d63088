"""Adopting a saved pipeline as a generator."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from infra.errors import InputError
from tasks.references.domain_folder import DomainFolder
from tasks.references.generator import PIPELINE, generator_folder
from tasks.train.adopt import adopt


@pytest.fixture
def saved(domain: Any, tmp_path: Path) -> Path:
    """A copy of the small domain's pipeline, saved by ``save_pretrained``."""
    folder = tmp_path / "saved"
    shutil.copytree(Path(domain.result.trained.generator.reference.uri) / PIPELINE, folder)
    return folder


def test_adopt_copies_pipeline_once_and_records_encoder_and_origin(saved: Path, domain: Any, tmp_path: Path) -> None:
    from tasks.references.types import encoder_of

    first, again = (adopt(str(saved), DomainFolder(uri=str(tmp_path / "base"))) for _ in range(2))
    assert (first.skipped, again.skipped) == (False, True)
    assert first.reference == again.reference
    manifest = first.reference.manifest()
    assert encoder_of(manifest) == encoder_of(domain.result.embeddings.reference.manifest())
    assert manifest.info["adopted"] == manifest.inputs[PIPELINE]["uri"] == str(saved)
    assert (manifest.rows, "images_seen" in manifest.info) == (0, False)
    copied = generator_folder(first.reference, tmp_path)
    for path in (path for path in saved.rglob("*") if path.is_file()):
        assert (copied / path.relative_to(saved)).read_bytes() == path.read_bytes()


def test_adopt_key_depends_on_defaults_but_not_on_location(saved: Path, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    first = adopt(str(saved), DomainFolder(uri=base)).reference
    moved = saved.rename(tmp_path / "moved")
    assert adopt(str(moved), DomainFolder(uri=base)).reference == first
    index = moved / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"guidance_scale": 1.5}))
    assert adopt(str(moved), DomainFolder(uri=base)).reference.digest != first.digest


def test_adopt_raises_for_missing_or_damaged_pipeline(saved: Path, tmp_path: Path) -> None:
    from model.errors import ModelError

    with pytest.raises(InputError, match=r"not a saved pipeline: .*none; give sticker-generator"):
        adopt(str(tmp_path / "none"), DomainFolder(uri=str(tmp_path)))
    for weights in saved.rglob("*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(ModelError, match="cannot load a generator"):
        adopt(str(saved), DomainFolder(uri=str(tmp_path)))
    assert not list(tmp_path.glob("generator/*/manifest.json"))


def test_new_domain_config_raises_for_train_together_with_generator() -> None:
    from flows.new_domain import NewDomainConfig
    from tasks.train.config import TrainConfig

    with pytest.raises(ValueError, match=r"train and generator are both given; .* train\.start_from"):
        NewDomainConfig(domain="a", urls="a.txt", train=TrainConfig(), generator="sticker-generator")


def test_generator_signature_uses_defaults_of_saved_pipeline(saved: Path) -> None:
    from tasks.register import generator_signature

    index = saved / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"guidance_scale": 3, "num_inference_steps": 7, "neighbours": 4})
    )
    params = {param.name: param.default for param in generator_signature(saved).params}
    assert params == {"seed": 0, "steps": 7, "guidance": 3.0, "candidates": 1, "k": 4, "database": ""}
