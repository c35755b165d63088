"""The objective of mask-free editing: restore an image into which a region of its neighbour was pasted.

Legend: ``B`` batch, ``S`` side, ``m`` mask, 1 where the neighbour is visible, ``σ`` share of noise.

    y = (1 − m̃)·x + m̃·x′        x′ the first neighbour aligned to x, m̃ the region m with a soft edge
    L = E ‖v̂(x_σ, y, σ, c(x)) − (ε − x)‖²     flow matching on the clean x, with y in the extra channels

The condition is that of the clean image. The network learns to find the parts that contradict the condition, to
regenerate them, and to keep the rest. At inference y is the image to edit, and the condition is that of the text.

The network must not detect the seams of pasted regions instead. Therefore the edge is soft. Some references are the
whole neighbour, which has no seam, and some are the image itself, which must not change.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.configs import ConditioningConfig, Prediction, RestorationConfig
from model.diffusion.conditioning import sample_condition
from model.diffusion.flow_matching import LOGIT_NORMAL, NoiseLevels, flow_matching_loss, sample_sigmas
from model.errors import ModelError
from model.networks.denoiser import as_denoiser
from model.networks.editor import with_reference
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.shown_images import shown_images


class PasteRandomness(NamedTuple):
    """Random numbers in [0, 1) that determine the regions: ``kind`` (B,), ``shapes`` (B, 2, 6), ``second`` (B,)."""

    kind: Tensor
    shapes: Tensor
    second: Tensor


def sample_randomness(rng: StepRandom, batch: int) -> PasteRandomness:
    """Sample the randomness of ``batch`` regions, float32 on the device of ``rng``."""
    return PasteRandomness(rng.uniform(batch), rng.uniform(batch, 2, 6), rng.uniform(batch))


def regions(randomness: PasteRandomness, side: int, config: RestorationConfig) -> Tensor:
    """Return masks (B, 1, S, S) float32 in {0, 1}, 1 where the neighbour is visible.

    A region is one or two rotated rectangles or ellipses. Their area is log-uniform before the image border cuts them.
    """
    shapes = _shapes(randomness.shapes, side, config)  # (B, 2, S, S)
    second = randomness.second < config.second_region
    visible = shapes[:, 0] | (shapes[:, 1] & second[:, None, None])
    empty = randomness.kind < config.empty
    whole = ~empty & (randomness.kind < config.empty + config.whole)
    visible = (visible & ~empty[:, None, None]) | whole[:, None, None]
    return visible[:, None].float()


def feather(mask: Tensor, feather_px: float) -> Tensor:
    """Blur the edges of masks (B, 1, S, S) with a Gaussian. Empty and full masks do not change."""
    if feather_px == 0:
        return mask
    reach = math.ceil(2 * feather_px)
    offsets = torch.arange(-reach, reach + 1, device=mask.device, dtype=mask.dtype)
    kernel = torch.softmax(-offsets.square() / (2 * feather_px**2), dim=0)
    padded = F.pad(mask, [reach] * 4, mode="replicate")
    # Sum shifted masks instead of a convolution, which autocast would compute in bfloat16 while images are float32.
    across = (padded.unfold(3, len(kernel), 1) * kernel).sum(-1)
    return (across.unfold(2, len(kernel), 1) * kernel).sum(-1).clamp(0, 1)


def paste_region(images: Tensor, aligned: Tensor, mask: Tensor, *, feather_px: float = 0.0) -> Tensor:
    """Paste a region of the aligned neighbours into the images.

    Args:
        images: (B, 3, S, S) in [−1, 1].
        aligned: (B, 3, S, S) in [−1, 1].
        mask: (B, 1, S, S), 1 where the neighbour is visible.
        feather_px: Standard deviation of the soft edge in pixels. Default: 0, a hard edge.

    Returns:
        (B, 3, S, S) in [−1, 1].
    """
    return torch.lerp(images, aligned, feather(mask, feather_px))


class Reference(nn.Module):
    """The reference to restore an image from: the image with regions of its neighbour, or zeros."""

    def __init__(self, config: RestorationConfig) -> None:
        """Use the regions of ``config``."""
        super().__init__()
        self.config = config

    def forward(self, images: Tensor, aligned: Tensor, randomness: PasteRandomness, hidden: Tensor) -> Tensor:
        """Create references: images and aligned (B, 3, S, S), ``hidden`` uniform (B,) -> (B, 3, S, S)."""
        mask = regions(randomness, images.shape[-1], self.config)
        corrupted = paste_region(images, aligned, mask, feather_px=self.config.feather_px)
        return corrupted.masked_fill((hidden < self.config.drop_reference)[:, None, None, None], 0)


class Restoration(nn.Module):
    """The restoration loss of an editor, a network with six input channels."""

    def __init__(
        self,
        conditioning: ConditioningConfig,
        config: RestorationConfig,
        *,
        prediction: Prediction,
        levels: NoiseLevels = LOGIT_NORMAL,
    ) -> None:
        """Configure the objective.

        Args:
            conditioning: Probabilities of hiding and perturbing parts of the condition.
            config: Regions to paste.
            prediction: Output of the network.
            levels: Distribution of the noise levels. Default: the standard logit-normal one.
        """
        super().__init__()
        self.conditioning, self.prediction, self.levels = conditioning, prediction, levels
        self.reference = Reference(config)

    def forward(self, network: nn.Module, batch: Batch, rng: StepRandom) -> Tensor:
        """Return the mean loss of ``batch``, a scalar float32.

        Raises:
            ModelError: The batch has no references, or they differ in shape from the images.
        """
        if batch.reference is None:
            raise ModelError("the batch has no reference images; align the first neighbours before training")
        if batch.images.shape != batch.reference.shape:
            raise ModelError(
                f"images and references differ in shape: {tuple(batch.images.shape)}, {tuple(batch.reference.shape)}; "
                "give pixels, because editing is not trained on latents or codes"
            )
        images, count = batch.images, len(batch.images)
        condition = sample_condition(batch.query, batch.neighbours, self.conditioning, rng)
        sigma = sample_sigmas(count, rng, self.levels)
        noise = rng.normal(*images.shape)
        randomness, hidden = sample_randomness(rng, count), rng.uniform(count)
        reference = self.reference(images, batch.reference, randomness, hidden)
        shown = shown_images(network, batch, condition, self.conditioning, rng)
        denoiser = with_reference(as_denoiser(network, self.prediction, shown), reference)
        return flow_matching_loss(denoiser, images, condition.tokens, sigma, noise, self.prediction)


def _shapes(uniforms: Tensor, side: int, config: RestorationConfig) -> Tensor:
    """Rasterise two shapes per sample: (B, 2, 6) in [0, 1) to (B, 2, S, S) bool."""
    area, aspect, angle, x, y, round_ = uniforms.unbind(-1)
    area = config.smallest_area * (config.largest_area / config.smallest_area) ** area
    aspect = config.largest_aspect ** (2 * aspect - 1)
    elliptic = round_ < config.ellipse
    # Half-axes a, b in units of the side: a rectangle covers 4·a·b of the image, an ellipse π·a·b.
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
    """Map a uniform number in [0, 1) to a coordinate in [0.15, 0.85): near the border images are mostly background."""
    return 0.15 + 0.7 * uniform
