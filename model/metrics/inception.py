"""Fréchet Inception distance (FID), computed by torch-fidelity with local Inception-v3 weights."""

import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from model.errors import ModelError
from model.images import image_to_array


def require_inception(weights: Path) -> None:
    """Raise ``ModelError`` unless torch-fidelity is installed and ``weights`` is a readable weights file."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ModelError(
            "torch-fidelity is not installed, and FID needs it; run pip install 'knn-diffusion[fid]', or omit the path "
            "of the Inception weights"
        )
    if not weights.is_file():
        raise ModelError(
            f"Inception weights not found: {weights}; pass the path of torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth, or omit it"
        )
    try:  # torch-fidelity unpickles any file; weights_only=True rejects files that contain more than tensors
        torch.load(weights, weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(
            f"not an Inception weights file: {weights} ({' '.join(str(error).split())[:120]}); "
            "pass torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        ) from error


def inception_distance(
    first: Sequence[Image.Image], second: Sequence[Image.Image], weights: Path, *, cuda: bool = False
) -> float:
    """Return the Fréchet Inception distance of two sets of images (Heusel et al. 1706.08500): at least 0, 0 if equal.

    The centre square of every image is resized to the width of the first image, so that the sets do not differ in
    sharpness; training and CLIP use the same crop. torch-fidelity then resizes it to 299 px like the reference code.
    The estimate is biased upwards for few images (10,000 and more are usual). Raises ``ModelError`` if torch-fidelity
    or the weights are missing.
    """
    require_inception(weights)
    from torch_fidelity import calculate_metrics  # type: ignore[import-untyped, unused-ignore]

    scores = calculate_metrics(
        input1=_Images(first, first[0].width),
        input2=_Images(second, first[0].width),
        fid=True,
        feature_extractor_weights_path=str(weights),
        cuda=cuda,
        cache=False,
        batch_size=16,
        save_cpu_ram=True,  # no worker processes: the images are already in memory
        verbose=False,
    )
    return max(float(scores["frechet_inception_distance"]), 0.0)


class _Images(Dataset[Any]):
    """A dataset of images as uint8 (3, S, S)."""

    def __init__(self, images: Sequence[Image.Image], side: int) -> None:
        self._images, self._side = images, side

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> torch.Tensor:
        pixels = image_to_array(self._images[number].convert("RGB"), self._side)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
