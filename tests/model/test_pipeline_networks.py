"""The pipeline around each kind of network, and what a call may ask for beyond a prompt."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny_models
from torch import Tensor

from model.encoder.clip import Encoder
from model.encoder.identity import EMBEDDED
from model.errors import ModelError
from model.networks.editor import widen_input
from model.networks.unet import UNetConfig, build_unet
from model.networks.vq_transformer import VQTransformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.retrieval.database import Database
from model.saved_generator import pretrained_folder

ROWS = tiny_models.unit_rows(40)
PROMPTS = torch.nn.functional.normalize(torch.from_numpy(tiny_models.unit_rows(3, seed=1)).float())


class _OnGPU(torch.Generator):
    device = torch.device("cuda")


GPU_GENERATOR = _OnGPU()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(images: list[Image.Image]) -> NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


def drawn(pipeline: KNNDiffusionPipeline, prompts: Any = PROMPTS, **options: Any) -> NDArray[np.int64]:
    return pixels(pipeline(prompts, **{"num_inference_steps": 3, "generator": seeded()} | options).images)


def unet_pipeline() -> KNNDiffusionPipeline:
    size = UNetConfig(image_size=8, widths=(32, 32), layers=1)
    return new_pipeline(
        tiny_models.stirred(build_unet(size, embedding_dimension=8, seed=0)), tiny_models.identity(), neighbours=3
    )


def editor_pipeline() -> KNNDiffusionPipeline:
    return new_pipeline(widen_input(tiny_models.network()), tiny_models.identity(), neighbours=3)


KINDS = {
    "unet": unet_pipeline,
    "latent": tiny_models.latent_pipeline,
    "discrete": tiny_models.discrete_pipeline,
    "editor": editor_pipeline,
}


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return tiny_models.database(tmp_path / "database", ROWS)


@pytest.fixture(params=KINDS)
def pipeline(request: pytest.FixtureRequest, database: Database) -> KNNDiffusionPipeline:
    made = KINDS[request.param]()
    made.swap_database(database)
    return made


def test_every_kind_draws_pictures_of_its_side(pipeline: KNNDiffusionPipeline) -> None:
    images = drawn(pipeline)
    assert images.shape == (3, pipeline.side, pipeline.side, 3)
    assert pipeline.side == (8 if pipeline.vae is None else 16)
    assert np.abs(images[0] - images[1]).max() > 0, "other prompts, other pictures"


def test_every_kind_keeps_a_picture_whatever_its_batch(pipeline: KNNDiffusionPipeline) -> None:
    alone, among = drawn(pipeline, PROMPTS[:1]), drawn(pipeline, PROMPTS.repeat(4, 1))
    assert np.abs(alone[0] - among[0]).max() <= 1


def test_every_kind_is_saved_and_opened_as_it_was(
    pipeline: KNNDiffusionPipeline, database: Database, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", database)
    assert type(opened.transformer) is type(pipeline.transformer)
    np.testing.assert_array_equal(drawn(opened), drawn(pipeline))


def test_a_saved_folder_tells_nothing_of_where_its_parts_came_from(
    pipeline: KNNDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "first")
    KNNDiffusionPipeline.open(tmp_path / "first").save_pretrained(tmp_path / "second")
    written = {
        path.relative_to(tmp_path / "second"): path.read_bytes() for path in (tmp_path / "second").rglob("*.json")
    }
    assert written
    for name, content in written.items():
        assert content == (tmp_path / "first" / name).read_bytes()
        assert str(tmp_path).encode() not in content


def test_a_compiled_pipeline_draws_what_it_did(database: Database) -> None:
    pipeline = tiny_models.discrete_pipeline()
    pipeline.swap_database(database)
    before = drawn(pipeline)
    pipeline.compile()
    np.testing.assert_allclose(drawn(pipeline), before, atol=1)
    assert not any("orig_mod" in name for name in pipeline.transformer.state_dict())


def test_every_kind_follows_its_guidance(pipeline: KNNDiffusionPipeline) -> None:
    plain, pushed = drawn(pipeline, guidance_scale=1.0), drawn(pipeline, guidance_scale=6.0)
    assert np.abs(plain - pushed).max() > 0


def test_every_kind_keeps_away_from_a_negative_prompt(pipeline: KNNDiffusionPipeline) -> None:
    plain = drawn(pipeline, guidance_scale=4.0)
    away = drawn(pipeline, guidance_scale=4.0, negative_prompts=PROMPTS[:1])
    assert np.abs(plain - away).max() > 0
    # Away from itself: v + s·(v − v) is the conditional model, whatever the scale.
    itself = drawn(pipeline, guidance_scale=4.0, negative_prompts=PROMPTS)
    assert np.abs(itself - drawn(pipeline, guidance_scale=1.0)).max() <= 1


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_negative_prompt_that_guidance_would_not_heed_is_refused(
    pipeline: KNNDiffusionPipeline, scale: float
) -> None:
    with pytest.raises(ModelError, match=rf"negative_prompts need a guidance_scale above 1 to act, it is {scale}"):
        drawn(pipeline, negative_prompts=PROMPTS[:1], guidance_scale=scale)
    pipeline.register_to_config(guidance_scale=scale)
    with pytest.raises(ModelError, match="above 1"):
        drawn(pipeline, negative_prompts=PROMPTS[:1])


@pytest.mark.parametrize("wrong", [[seeded()], 5, GPU_GENERATOR], ids=["list", "seed", "gpu"])
def test_a_generator_is_one_on_the_cpu(pipeline: KNNDiffusionPipeline, wrong: Any) -> None:
    told = "generator must be one torch.Generator on the CPU"
    with pytest.raises(ModelError, match=told):
        drawn(pipeline, generator=wrong)
    with pytest.raises(ModelError, match=told):
        pipeline.edit(Image.new("RGB", (8, 8)), PROMPTS[:1], method="sdedit", generator=wrong)


def test_weights_that_are_no_numbers_are_told(pipeline: KNNDiffusionPipeline) -> None:
    with torch.no_grad():
        [*pipeline.transformer.parameters()][-1].view(-1)[0] = torch.nan  # of the layer that answers
    for truncation in (0.86, 1.0):  # of codes; where it keeps all, it looks at none
        pipeline.register_to_config(truncation=truncation)
        with pytest.raises(ModelError, match="no finite numbers: the weights are broken; train again"):
            drawn(pipeline)
    with pytest.raises(ModelError, match="no finite numbers: the weights are broken; train again"):
        pipeline.edit(Image.new("RGB", (8, 8)), PROMPTS[:1], method="sdedit", candidates=1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_saved_weights_that_are_no_numbers_are_not_opened(
    pipeline: KNNDiffusionPipeline, tmp_path: Path, value: float
) -> None:
    with torch.no_grad():
        next(iter(pipeline.transformer.parameters())).view(-1)[0] = value
    pipeline.save_pretrained(tmp_path / "saved")
    told = r"saved holds no usable generator \(transformer: its weights are not all finite numbers\); train it again"
    with pytest.raises(ModelError, match=told):
        KNNDiffusionPipeline.open(tmp_path / "saved")


def test_weights_of_another_config_are_not_loaded_as_diffusers_would(
    pipeline: KNNDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    network = pipeline.transformer
    again = KNNDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert [*again.transformer.state_dict()] == [*network.state_dict()]
    name, weights = [*network.state_dict()][-1], tmp_path / "saved/transformer/diffusion_pytorch_model.safetensors"
    save_file({key: weight for key, weight in load_file(weights).items() if key != name}, weights)
    with pytest.raises(ModelError, match=r"transformer: of the .* weights that its config.json asks for 1 are missing"):
        KNNDiffusionPipeline.from_pretrained(tmp_path / "saved", low_cpu_mem_usage=False)
    assert KNNDiffusionPipeline.from_pretrained(tmp_path / "saved", transformer=network).transformer is network


def test_every_kind_draws_and_edits_in_half_precision(pipeline: KNNDiffusionPipeline) -> None:
    picture = Image.effect_noise((16, 16), 80).convert("RGB")
    asked: dict[str, Any] = {"method": "sdedit", "candidates": 1, "num_inference_steps": 3}
    whole, half = [], []
    for kept in (whole, half):
        kept += [drawn(pipeline), pixels(pipeline.edit(picture, PROMPTS[:1], generator=seeded(), **asked))]
        pipeline.to(torch.float16)
    for one, other in zip(whole, half, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).mean() < 8, "but for rounding, and a code or two"


def test_an_editor_draws_as_the_network_it_was_widened_from(database: Database) -> None:
    base, editor = tiny_models.pipeline(database, prediction="velocity"), editor_pipeline()
    editor.swap_database(database)
    np.testing.assert_array_equal(drawn(editor), drawn(base))


def test_codes_do_without_a_scheduler_and_not_without_their_autoencoder() -> None:
    made = tiny_models.discrete_pipeline()
    assert made.scheduler is None
    assert isinstance(made.transformer, VQTransformer)
    with pytest.raises(ModelError, match="needs the vae"):
        new_pipeline(made.transformer, tiny_models.identity())
    with pytest.raises(ModelError, match="needs a scheduler"):
        KNNDiffusionPipeline(tiny_models.network(), encoder_identity=dataclasses.asdict(tiny_models.identity()))


def test_guidance_acts_within_its_interval_alone(database: Database) -> None:
    def with_interval(low: float, high: float) -> NDArray[np.int64]:
        made = new_pipeline(tiny_models.network(), tiny_models.identity(), neighbours=3, guidance_interval=(low, high))
        made.swap_database(database)
        return drawn(made, guidance_scale=5.0)

    nowhere, plain = (
        with_interval(2, 3),
        drawn(tiny_models.pipeline(database, prediction="velocity"), guidance_scale=1.0),
    )
    np.testing.assert_array_equal(nowhere, plain)
    assert np.abs(with_interval(0, 1) - plain).max() > 0
    assert np.abs(with_interval(0.5, 0.9) - with_interval(0, 1)).max() > 0


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
    ],
)
def test_any_flow_matching_scheduler_may_be_plugged_in(database: Database, scheduler: Any) -> None:
    made = tiny_models.pipeline(database, prediction="velocity")
    assert isinstance(made.scheduler, UniPCMultistepScheduler)
    own = drawn(made, num_inference_steps=200)
    made.register_modules(scheduler=scheduler)
    other = drawn(made, num_inference_steps=200)
    assert np.abs(own - other).mean() < 3, "both solve one equation"


def test_an_interpolation_goes_from_one_prompt_to_the_other(tmp_path: Path) -> None:
    encoder = Encoder()
    rows = encoder.embed_texts([f"a picture of {name}" for name in ("rain", "a dog", "a car", "bread")]).numpy()
    plugged = tiny_models.database(tmp_path / "texts", rows.astype(np.float16), encoder=encoder.identity)
    made = tiny_models.pipeline(plugged, prediction="velocity")
    options = {"num_inference_steps": 2, "neighbours": 2}
    between = pixels(made.interpolate("a dog", "a car", 4, generator=seeded(), **options).images)
    ends = pixels(made(["a dog", "a car"], generator=seeded(), shared_noise=True, **options).images)
    assert len(between) == 4
    assert np.abs(between[[0, -1]] - ends).max() <= 1
    assert (np.abs(np.diff(between, axis=0)).max(axis=(1, 2, 3)) > 1).all(), "every step goes on"
    with pytest.raises(ModelError, match="from one prompt to another; 1 were given"):
        made("a dog", between=3)
    with pytest.raises(ModelError, match="two ends"):
        made.interpolate("a dog", "a car", 1)


def test_pictures_and_texts_are_prompts_alike(tmp_path: Path) -> None:
    encoder = Encoder()
    picture = Image.new("RGBA", (20, 30), (255, 0, 0, 128))
    made = tiny_models.pipeline(None)
    made = new_pipeline(tiny_models.network(256), encoder.identity, neighbours=2)
    assert encoder.identity.name == EMBEDDED
    rows = made.embed(["a red flag", picture, "rain"])
    torch.testing.assert_close(rows[[0, 2]], encoder.embed_texts(["a red flag", "rain"]))
    flat = Image.new("RGB", (20, 30), (255, 127, 127))
    assert float((rows[1] * encoder.embed_images([flat])[0]).sum()) > 0.999, "transparency is white"
    with pytest.raises(ModelError, match="neither text nor picture"):
        made.embed([3.5])  # type: ignore[list-item]
    with pytest.raises(ModelError, match="prompts are NoneType; give str, PIL images or embeddings"):
        made.embed(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 2])
def test_negative_prompts_are_one_for_all_or_one_for_each(database: Database, count: int) -> None:
    made = tiny_models.pipeline(database)
    with pytest.raises(ModelError):
        made(PROMPTS, negative_prompts=PROMPTS[:count], guidance_scale=2.0)


def test_more_neighbours_than_the_database_holds_is_said_and_the_rest_is_hidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = tiny_models.database(tmp_path / "small", tiny_models.unit_rows(2))
    made = tiny_models.pipeline(small)
    with caplog.at_level(logging.WARNING):
        tokens, _, hits = made.condition(PROMPTS, 5)
    assert "holds 2 images, 5 neighbours" in caplog.text
    assert hits is not None
    assert (hits.ids[:, 2:] == -1).all()
    assert (tokens[:, 3:, :-1] == 0).all()
    assert (tokens[:, 1:3, :-1] != 0).any(dim=2).all()


def test_fewer_neighbours_than_trained_with_are_filled_up_with_hidden_ones(database: Database) -> None:
    made: KNNDiffusionPipeline = tiny_models.pipeline(database, neighbours=4)
    tokens = made.condition(PROMPTS, 1).tokens
    assert tokens.shape[1] == 5
    assert (tokens[:, 2:, :-1] == 0).all()
    made.register_to_config(neighbours=2, trained_neighbours=6)
    tokens, _, hits = made.condition(PROMPTS, made.config.neighbours)
    assert hits is not None
    assert hits.ids.shape == (3, 2)
    assert tokens.shape[1] == 7
    assert (tokens[:, 1:3, :-1] != 0).any(dim=2).all()
    assert (tokens[:, 3:, :-1] == 0).all()


def test_a_text_past_the_token_limit_is_cut_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder()
    long: Tensor = encoder.embed_texts(["one two three"])
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        long = encoder.embed_texts(["red " * 100, "rain"])
    assert caplog.text.count("is longer than") == 1
    assert long.shape == (2, encoder.identity.dimension)


def test_a_config_of_other_layers_than_its_weights_is_refused(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    layers = {"num_layers": 2, "layers": 2, "layers_per_block": 3}
    parts = [name for name in ("transformer", "vae") if getattr(pipeline, name) is not None]
    for config in (tmp_path / "saved" / name / "config.json" for name in parts):
        whole = config.read_text()
        more = {name: layers.get(name, value) for name, value in json.loads(whole).items()}
        config.write_text(json.dumps(more))
        told = rf"saved holds no usable generator \({config.parent.name}: .* [1-9]\d* are missing, and 0 others"
        with pytest.raises(ModelError, match=told):
            KNNDiffusionPipeline.open(tmp_path / "saved")
        config.write_text(whole)
    KNNDiffusionPipeline.open(tmp_path / "saved")


@pytest.mark.parametrize("shards", [False, True])
def test_weights_of_more_layers_than_the_config_are_refused(tmp_path: Path, shards: bool) -> None:
    made = new_pipeline(tiny_models.network(layers=2), tiny_models.identity())
    made.save_pretrained(tmp_path / "saved", **({"max_shard_size": "20KB"} if shards else {}))
    folder = tmp_path / "saved" / "transformer"
    assert (len(list(folder.glob("*.safetensors"))) > 1) == shards
    KNNDiffusionPipeline.open(tmp_path / "saved")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 1}))
    with pytest.raises(
        ModelError, match=r"0 are missing, and [1-9]\d* others are there; copy or download both"
    ) as told:
        KNNDiffusionPipeline.open(tmp_path / "saved")
    assert "\n" not in str(told.value)


def test_an_encoder_of_another_width_than_the_networks_is_refused(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match=r"embeddings of 8 numbers, tiny-clip \(9-d, .* the encoder that the network"):
        new_pipeline(pipeline.transformer, tiny_models.identity(9), vae=pipeline.vae)


def test_the_shipped_generator_is_whole_and_an_autoencoder_of_old_names_too(tmp_path: Path) -> None:
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
