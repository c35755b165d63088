"""Saving and opening pipelines with each kind of network."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny_models

from model.errors import ModelError
from model.networks.vq_transformer import VQTransformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.retrieval.database import Database
from model.saved_generator import pretrained_folder

ROWS = tiny_models.unit_rows(40)
PROMPTS = torch.nn.functional.normalize(torch.from_numpy(tiny_models.unit_rows(3, seed=1)).float())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(images: list[Image.Image]) -> NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


def generated(pipeline: KNNDiffusionPipeline, prompts: Any = PROMPTS, **options: Any) -> NDArray[np.int64]:
    return pixels(pipeline(prompts, **{"num_inference_steps": 3, "generator": seeded()} | options).images)


KINDS = {
    "unet": tiny_models.unet_pipeline,
    "latent": tiny_models.latent_pipeline,
    "discrete": tiny_models.discrete_pipeline,
    "editor": tiny_models.editor_pipeline,
}


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return tiny_models.database(tmp_path / "database", ROWS)


@pytest.fixture(params=KINDS)
def pipeline(request: pytest.FixtureRequest, database: Database) -> KNNDiffusionPipeline:
    made = KINDS[request.param]()
    made.swap_database(database)
    return made


def test_open_every_kind_gives_identical_images(
    pipeline: KNNDiffusionPipeline, database: Database, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", database)
    assert type(opened.transformer) is type(pipeline.transformer)
    np.testing.assert_array_equal(generated(opened), generated(pipeline))


def test_save_pretrained_omits_source_paths(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "first")
    KNNDiffusionPipeline.open(tmp_path / "first").save_pretrained(tmp_path / "second")
    written = {
        path.relative_to(tmp_path / "second"): path.read_bytes() for path in (tmp_path / "second").rglob("*.json")
    }
    assert written
    for name, content in written.items():
        assert content == (tmp_path / "first" / name).read_bytes()
        assert str(tmp_path).encode() not in content


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_open_non_finite_weights_raises(pipeline: KNNDiffusionPipeline, tmp_path: Path, value: float) -> None:
    with torch.no_grad():
        next(iter(pipeline.transformer.parameters())).view(-1)[0] = value
    pipeline.save_pretrained(tmp_path / "saved")
    message = r"saved \(transformer: some weights are NaN or infinite; .*\); train or download it again"
    with pytest.raises(ModelError, match=message):
        KNNDiffusionPipeline.open(tmp_path / "saved")


def test_from_pretrained_missing_weights_raises(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    network = pipeline.transformer
    again = KNNDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert [*again.transformer.state_dict()] == [*network.state_dict()]
    name, weights = [*network.state_dict()][-1], tmp_path / "saved/transformer/diffusion_pytorch_model.safetensors"
    save_file({key: weight for key, weight in load_file(weights).items() if key != name}, weights)
    with pytest.raises(ModelError, match=r"transformer: weights do not match config.json: 1 of \d+ are missing"):
        KNNDiffusionPipeline.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False)
    assert KNNDiffusionPipeline.from_pretrained(tmp_path / "saved", transformer=network).transformer is network


def test_pipeline_missing_component_raises() -> None:
    made = tiny_models.discrete_pipeline()
    assert made.scheduler is None
    assert isinstance(made.transformer, VQTransformer)
    with pytest.raises(ModelError, match="the vae is missing"):
        new_pipeline(made.transformer, tiny_models.identity())
    with pytest.raises(ModelError, match="the scheduler is missing"):
        KNNDiffusionPipeline(tiny_models.network(), encoder_identity=dataclasses.asdict(tiny_models.identity()))


def test_open_config_with_more_layers_raises(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    layers = {"num_layers": 2, "layers": 2, "layers_per_block": 3}
    parts = [name for name in ("transformer", "vae") if getattr(pipeline, name) is not None]
    for config in (tmp_path / "saved" / name / "config.json" for name in parts):
        whole = config.read_text()
        more = {name: layers.get(name, value) for name, value in json.loads(whole).items()}
        config.write_text(json.dumps(more))
        message = rf"saved \({config.parent.name}: weights .*: [1-9]\d* of \d+ are missing, 0 are unexpected"
        with pytest.raises(ModelError, match=message):
            KNNDiffusionPipeline.open(tmp_path / "saved")
        config.write_text(whole)
    KNNDiffusionPipeline.open(tmp_path / "saved")


@pytest.mark.parametrize("shards", [False, True])
def test_open_weights_with_more_layers_raises(tmp_path: Path, shards: bool) -> None:
    made = new_pipeline(tiny_models.network(layers=2), tiny_models.identity())
    made.save_pretrained(tmp_path / "saved", **({"max_shard_size": "20KB"} if shards else {}))
    folder = tmp_path / "saved" / "transformer"
    assert (len(list(folder.glob("*.safetensors"))) > 1) == shards
    KNNDiffusionPipeline.open(tmp_path / "saved")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 1}))
    with pytest.raises(
        ModelError, match=r"0 of \d+ are missing, [1-9]\d* are unexpected; copy or download both"
    ) as caught:
        KNNDiffusionPipeline.open(tmp_path / "saved")
    assert "\n" not in str(caught.value)


def test_pipeline_encoder_of_other_width_raises(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match=r"width 8, but the encoder is tiny-clip \(9-d, .*; name the encoder"):
        new_pipeline(pipeline.transformer, tiny_models.identity(9), vae=pipeline.vae)


def test_open_bundled_generator_and_old_attention_names_work(tmp_path: Path) -> None:
    KNNDiffusionPipeline.open(pretrained_folder("sticker-generator"))
    tiny_models.latent_pipeline().save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "vae" / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in load_file(file).items():
        for now, then in new.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        old[name] = value
    assert any(".query." in name for name in old)
    save_file(old, file)
    KNNDiffusionPipeline.open(tmp_path / "saved")
