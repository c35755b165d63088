import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models

from model.encoder.clip import Encoder
from model.encoder.identity import BUNDLED_ENCODER
from model.errors import ModelError
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.saved_generator import BUNDLED_GENERATORS, contents_digest, pretrained_folder, weights_digest


def test_weights_digest_ignores_the_config(tmp_path: Path) -> None:
    for name, seed, neighbours in (("a", 0, 3), ("same", 0, 4), ("other", 1, 3)):
        network = tiny_models.network(seed=seed)
        new_pipeline(network, tiny_models.identity(), prediction="sample", neighbours=neighbours).save_pretrained(
            tmp_path / name
        )
    digests = {name: weights_digest(str(tmp_path / name)) for name in ("a", "same", "other")}
    assert digests["a"] == digests["same"] != digests["other"]
    assert len(digests["a"]) == 64


def test_contents_digest_covers_every_config(tmp_path: Path) -> None:
    new_pipeline(tiny_models.network(), tiny_models.identity(), neighbours=3).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        changed = shutil.copytree(tmp_path / "a", tmp_path / Path(name).parent.name / "other") / name
        changed.write_text(json.dumps(json.loads(changed.read_text()) | {"changed": 1}))
    folders = [path.parent for path in sorted(tmp_path.rglob("model_index.json"))]
    digests = {str(folder.relative_to(tmp_path)): contents_digest(str(folder)) for folder in folders}
    assert digests["a"] == digests.pop("same")
    assert len(set(digests.values())) == len(digests) == 4


def test_digests_without_weights_raise(tmp_path: Path) -> None:
    for digest in (weights_digest, contents_digest):
        with pytest.raises(ModelError, match=r"no weights .* found: .*or sticker-generator"):
            digest(str(tmp_path))


def test_pretrained_folder_resolves_bundled_names_and_folders(tmp_path: Path) -> None:
    assert pretrained_folder(str(tmp_path)) == tmp_path
    embedded = pretrained_folder("sticker-generator")
    assert embedded.parts[-4:] == ("model", "pretrained", "sticker-generator", "pipeline")
    assert BUNDLED_ENCODER not in embedded.parts


@pytest.mark.parametrize("name", BUNDLED_GENERATORS)
def test_bundled_generators_are_small_and_generate_and_edit(name: str, tmp_path: Path) -> None:
    weights = [file.stat().st_size for file in pretrained_folder(name).rglob("*.safetensors")]
    assert 0 < sum(weights) <= 60e6
    encoder = Encoder()
    rows = encoder.embed_texts([f"an image of {thing}" for thing in ("rain", "a dog", "a car")]).numpy()
    database = tiny_models.database(tmp_path, rows.astype(np.float16), encoder=encoder.identity)
    pipeline = KNNDiffusionPipeline.open(pretrained_folder(name), database)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    dog, car = pipeline(["a dog", "a car"], neighbours=1, num_inference_steps=2, generator=seeded()).images
    assert dog.size == (pipeline.side, pipeline.side)
    assert np.abs(np.asarray(dog).astype(int) - np.asarray(car)).mean() > 5
    options: Any = {"candidates": 2, "num_inference_steps": 2}
    (edited,) = pipeline.edit(dog, "a car", method="local", generator=seeded(), **options)
    assert (np.asarray(edited) != np.asarray(dog)).any()
    assert (np.asarray(edited) == np.asarray(dog)).all(-1).mean() > 0.2, "the rest stays"
