"""FID proper, in the space of Inception-v3, where its weights are at hand. torch-fidelity computes it."""

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
    """Refuse what a FID cannot be computed with. Raises ``ModelError`` naming the mend."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ModelError("FID needs torch-fidelity: pip install 'knn-diffusion[fid]', or leave the weights' path out")
    if not weights.is_file():
        raise ModelError(
            f"there are no Inception weights at {weights}; give the path of torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth, or leave it out"
        )
    try:  # torch-fidelity unpickles whatever it is given; this refuses anything that is not tensors
        torch.load(weights, weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(
            f"{weights} holds no Inception weights ({' '.join(str(error).split())[:120]}); "
            "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        ) from error


def inception_distance(
    first: Sequence[Image.Image], second: Sequence[Image.Image], weights: Path, *, cuda: bool = False
) -> float:
    """The Fréchet Inception distance of two sets of pictures (Heusel et al. 1706.08500): at least 0, lower is closer.

    Of every picture the centre square is taken, as training and CLIP take it, at the side of the first one, so that no
    set is told by its sharpness; torch-fidelity brings it to 299 px, as the reference code does. The estimate is biased
    upwards for few pictures (10,000 and more are usual). Raises ``ModelError`` without the package or the weights.
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
        save_cpu_ram=True,  # reads in this process: the pictures are in memory already
        verbose=False,
    )
    return max(float(scores["frechet_inception_distance"]), 0.0)


class _Images(Dataset[Any]):
    """Pictures as uint8 (3, S, S)."""

    def __init__(self, pictures: Sequence[Image.Image], side: int) -> None:
        self._pictures, self._side = pictures, side

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, number: int) -> torch.Tensor:
        pixels = image_to_array(self._pictures[number].convert("RGB"), self._side)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
