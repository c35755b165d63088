import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import ModelError
from model.metrics.inception import inception_distance, require_inception


def images(*, seed: int, count: int = 3, side: int = 32) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def test_require_inception_missing_file_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match=r"Inception weights not found: .*none\.pth; pass the path of torch-fidelity"):
        require_inception(tmp_path / "none.pth")


def test_inception_distance_missing_package_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'knn-diffusion\[fid\]'"):
        inception_distance(images(seed=0), images(seed=1), tmp_path / "none.pth")


class Harmful:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


@pytest.mark.parametrize("content", ["text", "code"])
def test_require_inception_invalid_file_raises_without_unpickling(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    if content == "text":
        file.write_text("no weights")
    else:
        torch.save(Harmful(), file)
    with pytest.raises(ModelError, match=r"not an Inception weights file: .*weights\.pth"):
        require_inception(file)
    assert not (tmp_path / "harmed").exists()


def test_inception_distance_identical_sets_is_zero(tmp_path: Path) -> None:
    """Random weights suffice: only the conversion of images for torch-fidelity is tested."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(inception.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Keep the random weights."""

    empty, weights = tmp_path / "empty.pth", tmp_path / "inception.pth"
    torch.save({}, empty)
    torch.manual_seed(0)
    untrained = Untrained("untrained", ["2048"], feature_extractor_weights_path=str(empty))
    torch.save(untrained.state_dict(), weights)
    first = images(seed=0)
    far = [Image.fromarray(255 - np.asarray(image) // 4) for image in images(seed=1, side=48)]
    near = inception_distance(first, first, weights)
    assert near < 1e-3 * inception_distance(first, far, weights)
