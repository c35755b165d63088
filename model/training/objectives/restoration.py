"""The objective of editing without a mask: restore a picture into which a region of its neighbour was pasted.

Legend: ``B`` batch, ``S`` side, ``m`` mask, 1 where the neighbour shows, ``σ`` share of noise.

    y = (1 − m̃)·x + m̃·x′        x′ the first neighbour aligned to x, m̃ the region m with a soft edge
    L = E ‖v̂(x_σ, y, σ, c(x)) − (ε − x)‖²     flow matching on the clean x, with y in the extra channels

The condition is of the clean picture, so what the network learns is to find what disagrees with it, to redraw that,
and to leave the rest. At inference y is the picture to edit and the text is what it should agree with. Three things
keep it from looking for seams instead: the edge is soft, some references are the whole neighbour, which has no seam,
and some are the picture itself, where nothing is to be done.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.diffusion.conditioning import ConditioningConfig, training_condition
from model.diffusion.flow_matching import Prediction, flow_matching_loss, sample_sigmas
from model.errors import ModelError
from model.networks.denoiser import as_denoiser
from model.networks.editor import with_reference
from model.step_random import StepRandom
from model.training.batch import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RestorationConfig:
    """What is pasted. Areas are shares of the picture; probabilities are per sample."""

    smallest_area: float = 0.06
    largest_area: float = 0.5
    largest_aspect: float = 2.5
    second_region: float = 0.4
    ellipse: float = 0.5
    empty: float = 0.10  # the reference is the picture itself
    whole: float = 0.20  # the reference is the whole neighbour
    feather_px: float = 1.0  # standard deviation of the edge
    drop_reference: float = 0.10  # zeros in the reference's place: drawing, and the guidance of the picture

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if not 0 < self.smallest_area <= self.largest_area <= 1:
            raise ValueError(
                "areas must satisfy 0 < smallest_area <= largest_area <= 1: they are shares of the picture"
            )
        if self.largest_aspect < 1 or self.feather_px < 0:
            raise ValueError("largest_aspect must be at least 1 and feather_px at least 0")
        shares = (self.second_region, self.ellipse, self.empty, self.whole, self.drop_reference)
        if min(shares) < 0 or max(shares) > 1 or self.empty + self.whole > 1:
            raise ValueError("probabilities must lie in [0, 1], and empty + whole too: they exclude each other")


class PasteRandomness(NamedTuple):
    """What decides where a neighbour shows, uniform in [0, 1): ``kind`` (B,), ``shapes`` (B, 2, 6), ``second`` (B,)."""

    kind: Tensor
    shapes: Tensor
    second: Tensor


def draw_chances(rng: StepRandom, batch: int) -> PasteRandomness:
    """Those of a batch, float32 on the draw's device."""
    return PasteRandomness(rng.uniform(batch), rng.uniform(batch, 2, 6), rng.uniform(batch))


def regions(chances: PasteRandomness, side: int, config: RestorationConfig) -> Tensor:
    """Where the neighbour is to show: (B, 1, S, S) float32 in {0, 1}.

    A region is a turned rectangle or ellipse, or two of them; its area is log-uniform before the rim cuts it.
    """
    shapes = _shapes(chances.shapes, side, config)  # (B, 2, S, S)
    second = chances.second < config.second_region
    shown = shapes[:, 0] | (shapes[:, 1] & second[:, None, None])
    empty = chances.kind < config.empty
    whole = ~empty & (chances.kind < config.empty + config.whole)
    shown = (shown & ~empty[:, None, None]) | whole[:, None, None]
    return shown[:, None].float()


def feather(mask: Tensor, feather_px: float) -> Tensor:
    """The mask (B, 1, S, S) with a Gaussian edge; empty and whole masks stay what they are."""
    if feather_px == 0:
        return mask
    reach = math.ceil(2 * feather_px)
    offsets = torch.arange(-reach, reach + 1, device=mask.device, dtype=mask.dtype)
    kernel = torch.softmax(-offsets.square() / (2 * feather_px**2), dim=0)
    padded = F.pad(mask, [reach] * 4, mode="replicate")
    # Sums of shifted masks, no convolution: autocast would make it bfloat16, which does not mix with the pictures.
    across = (padded.unfold(3, len(kernel), 1) * kernel).sum(-1)
    return (across.unfold(2, len(kernel), 1) * kernel).sum(-1).clamp(0, 1)


def paste_region(images: Tensor, aligned: Tensor, mask: Tensor, *, feather_px: float = 0.0) -> Tensor:
    """The pictures with the region of their aligned neighbours pasted in.

    Args:
        images: (B, 3, S, S) in [−1, 1].
        aligned: (B, 3, S, S) in [−1, 1].
        mask: (B, 1, S, S), 1 where the neighbour shows.
        feather_px: standard deviation of the soft edge; 0 cuts.

    Returns:
        (B, 3, S, S) in [−1, 1].
    """
    return torch.lerp(images, aligned, feather(mask, feather_px))


class Reference(nn.Module):
    """What a picture is restored from: itself with regions of its neighbour, or nothing."""

    def __init__(self, config: RestorationConfig) -> None:
        """Paste as ``config`` says."""
        super().__init__()
        self.config = config

    def forward(self, images: Tensor, aligned: Tensor, chances: PasteRandomness, hidden: Tensor) -> Tensor:
        """(B, 3, S, S) of both and ``hidden`` uniform (B,) -> (B, 3, S, S)."""
        mask = regions(chances, images.shape[-1], self.config)
        corrupted = paste_region(images, aligned, mask, feather_px=self.config.feather_px)
        return corrupted.masked_fill((hidden < self.config.drop_reference)[:, None, None, None], 0)


class Restoration(nn.Module):
    """The loss of a network of six input channels on one batch."""

    def __init__(self, conditioning: ConditioningConfig, config: RestorationConfig, *, prediction: Prediction) -> None:
        """Hide parts of the condition as ``conditioning`` says, and paste as ``config`` says."""
        super().__init__()
        self.conditioning, self.prediction = conditioning, prediction
        self.reference = Reference(config)

    def forward(self, network: nn.Module, batch: Batch, rng: StepRandom) -> Tensor:
        """Mean loss of ``batch``, a scalar. Raises ``ModelError`` when it holds no references of its shape."""
        if batch.reference is None:
            raise ModelError("the batch holds no reference pictures; align the first neighbours before training")
        if batch.images.shape != batch.reference.shape:
            raise ModelError(
                f"pictures {tuple(batch.images.shape)} and references {tuple(batch.reference.shape)} differ; editing "
                "is trained on pixels, so give the pictures themselves"
            )
        images, count = batch.images, len(batch.images)
        condition = training_condition(batch.query, batch.neighbours, self.conditioning, rng)
        sigma = sample_sigmas(count, rng)
        noise = rng.normal(*images.shape)
        chances, hidden = draw_chances(rng, count), rng.uniform(count)
        reference = self.reference(images, batch.reference, chances, hidden)
        denoiser = with_reference(as_denoiser(network, self.prediction), reference)
        return flow_matching_loss(denoiser, images, condition, sigma, noise)


def _shapes(chances: Tensor, side: int, config: RestorationConfig) -> Tensor:
    """Two shapes a sample: (B, 2, 6) in [0, 1) to (B, 2, S, S) bool."""
    area, aspect, angle, x, y, round_ = chances.unbind(-1)
    area = config.smallest_area * (config.largest_area / config.smallest_area) ** area
    aspect = config.largest_aspect ** (2 * aspect - 1)
    elliptic = round_ < config.ellipse
    # Half-axes in sides: a rectangle covers 4·a·b of the picture, an ellipse π·a·b.
    product = area / torch.where(elliptic, math.pi, 4.0)
    across, along = (product * aspect).sqrt(), (product / aspect).sqrt()
    ticks = (torch.arange(side, device=area.device) + 0.5) / side
    dx = ticks - _centre(x)[..., None]  # (B, 2, S)
    dy = ticks - _centre(y)[..., None]
    cosine, sine = (part[..., None, None] for part in (torch.cos(angle * math.pi), torch.sin(angle * math.pi)))
    u = (cosine * dx[:, :, None, :] + sine * dy[:, :, :, None]) / across[..., None, None]
    v = (cosine * dy[:, :, :, None] - sine * dx[:, :, None, :]) / along[..., None, None]
    inside_ellipse = u.square() + v.square() < 1
    inside_rectangle = torch.maximum(u.abs(), v.abs()) < 1
    return torch.where(elliptic[..., None, None], inside_ellipse, inside_rectangle)


def _centre(uniform: Tensor) -> Tensor:
    """Centres keep off the rim, where pictures are background."""
    return 0.15 + 0.7 * uniform
