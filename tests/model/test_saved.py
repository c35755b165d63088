import json
import shutil
from pathlib import Path

import pytest
import tiny

from model.clip import EMBEDDED
from model.errors import ModelError
from model.pipeline import new_pipeline
from model.saved import contents_digest, pretrained_folder, weights_digest


def test_the_weights_digest_is_of_the_weights_alone(tmp_path: Path) -> None:
    for name, seed, neighbours in (("a", 0, 3), ("same", 0, 4), ("other", 1, 3)):
        network = tiny.network(seed=seed)
        new_pipeline(network, tiny.identity(), prediction="sample", neighbours=neighbours).save_pretrained(
            tmp_path / name
        )
    digests = {name: weights_digest(str(tmp_path / name)) for name in ("a", "same", "other")}
    assert digests["a"] == digests["same"] != digests["other"]
    assert len(digests["a"]) == 64


def test_the_contents_digest_is_of_the_settings_too_wherever_they_are(tmp_path: Path) -> None:
    new_pipeline(tiny.network(), tiny.identity(), neighbours=3).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        changed = shutil.copytree(tmp_path / "a", tmp_path / Path(name).parent.name / "other") / name
        changed.write_text(json.dumps(json.loads(changed.read_text()) | {"changed": 1}))
    folders = [path.parent for path in sorted(tmp_path.rglob("model_index.json"))]
    digests = {str(folder.relative_to(tmp_path)): contents_digest(str(folder)) for folder in folders}
    assert digests["a"] == digests.pop("same")
    assert len(set(digests.values())) == len(digests) == 4


def test_a_folder_without_weights_has_no_digest(tmp_path: Path) -> None:
    for digest in (weights_digest, contents_digest):
        with pytest.raises(ModelError, match=r"holds no weights .*or sticker-generator"):
            digest(str(tmp_path))


def test_a_name_is_a_folder_but_for_the_embedded_one(tmp_path: Path) -> None:
    assert pretrained_folder(str(tmp_path)) == tmp_path
    embedded = pretrained_folder("sticker-generator")
    assert embedded.parts[-4:] == ("model", "pretrained", "sticker-generator", "pipeline")
    assert EMBEDDED not in embedded.parts
