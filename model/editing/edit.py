"""Editing a picture by a text, without a mask (Sheynin et al., text-only image manipulation).

Legend: ``B`` pictures, ``S`` side, ``T`` condition tokens, ``E`` their channels, ``σ`` share of noise.

    x_s = (1 − s)·source + s·ε                     s the strength: 1 starts from noise alone
    σ from s to 0:  v = v̂(x_σ, reference = source, text and its neighbours), guided

Three methods. ``local`` finds regions where text and source disagree, draws one of them anew, and leaves the rest
(:mod:`model.editing.regions`); it needs no special training. ``restore`` is for a network trained
(:mod:`model.training.objectives.restoration`) to redraw what disagrees with the condition and to leave the rest, so the
picture itself is the reference.
``sdedit`` is the baseline. Each may draw several candidates and keep one. Noise and guidance still shift every pixel a
little; ``keep_unchanged`` puts the source's pixels back where the edit hardly differs.
:mod:`model.editing.edit_metrics` measures.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.diffusion.conditioning import null_condition
from model.diffusion.flow_matching import Denoiser, add_noise
from model.diffusion.guidance import guided
from model.diffusion.solver import draw_noise, draw_uniforms, in_batches, is_count
from model.editing.discrete_canvas import NOISING, CodeCanvas
from model.editing.edit_metrics import difference
from model.editing.regions import (
    CONTRAST_DRAWS,
    cells_of,
    choose,
    draw_inside,
    laid_over,
    propose_regions,
    text_contrast,
)
from model.errors import ModelError
from model.generation.sampling import seen
from model.images import on_white
from model.networks.denoiser import as_denoiser
from model.networks.editor import is_editor, with_reference
from model.networks.latents import decode_latents, encode_latents
from model.networks.vq_transformer import VQTransformer
from model.training.data import picture_to_array, to_model_range, to_pixels

if TYPE_CHECKING:
    from model.pipeline import KNNDiffusionPipeline, Prompts

logger = logging.getLogger(__name__)

KEPT_BELOW, CHANGED_ABOVE = 0.06, 0.16
"""Differences, as shares of the range, below which the source's pixels return, and above which the edited ones stay."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EditConfig:
    """How to edit.

    The defaults were measured with the embedded generator on 24 edits of Twemoji and OpenMoji, which it has never seen:
    the CLIP score towards the text rose from 0.315 to 0.355, and outside of the changed region all kept 25 dB. One draw
    alone does not raise it (0.299 in the first region): the choice among eight does. ``tests/benchmarks/edit.py``
    measures ten edits more.

    Attributes:
        method: ``restore`` needs a network trained for editing; ``local`` and ``sdedit``, the baseline, take any.
        strength: the noise level to start from, in (0, 1]; small ones return the source. Of codes, a share of times.
        steps: Euler steps, whatever the strength; of codes strides, no more than the strength has times.
        guidance_scale: how strongly to follow the text; 1 as trained.
        image_guidance_scale: how strongly to follow the source; 1 as trained. ``restore`` alone.
        contrast: push away from what the source shows, instead of from an empty condition.
        keep: whether the source's pixels return where the edit hardly differs. Not ``sdedit``.
        candidates: edits drawn of each picture, at so many times the cost. The one closest to the text, as the encoder
            sees it, is kept among those that keep the rest. ``local`` draws two each in half as many regions.
        kept_db: PSNR outside of the changed region from which on the rest counts as kept.
        largest_region: share of the picture that a region may cover, in (0, 1]. ``local`` alone; 1 lets an object
            change that fills the picture.
        shift: of the noise levels towards noise, as new generators are drawn with.
    """

    method: Literal["local", "restore", "sdedit"] = "local"
    strength: float = 1.0
    steps: int = 12
    guidance_scale: float = 4.0
    image_guidance_scale: float = 1.0
    contrast: bool = False
    keep: bool = True
    candidates: int = 8
    kept_db: float = 25.0
    largest_region: float = 0.4
    shift: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.method not in ("local", "restore", "sdedit"):
            raise ModelError(f"method={self.method!r}: write 'local', 'restore' or 'sdedit'")
        if not 0 < self.strength <= 1:
            raise ModelError(f"strength is {self.strength}; give a number above 0, and at most 1")
        if not is_count(self.steps) or not 0 < self.shift < math.inf:
            raise ModelError(
                f"steps is {self.steps} and shift {self.shift}; give at least 1 step, in whole numbers, and a finite "
                "shift above 0"
            )
        if not (math.isfinite(self.guidance_scale) and math.isfinite(self.image_guidance_scale)):
            raise ModelError("guidance_scale and image_guidance_scale must be finite numbers")
        if not is_count(self.candidates):
            raise ModelError(f"candidates is {self.candidates}; give a whole number, at least 1")
        if not 0 < self.largest_region <= 1:
            raise ModelError(f"largest_region is {self.largest_region}; give a share above 0, and at most 1")
        if math.isnan(self.kept_db):
            raise ModelError("kept_db must be a number")


def edit_levels(config: EditConfig) -> Tensor:
    """The noise levels (steps + 1,) float32 from the strength down to 0, spaced as the drawing's shifted ones."""
    even = torch.linspace(1, 0, config.steps + 1)
    return config.strength * config.shift * even / (1 + (config.shift - 1) * even)


def edit_guided(denoiser: Denoiser, source: Tensor, config: EditConfig, *, negative: Tensor | None = None) -> Denoiser:
    """A denoiser of six input channels that sees the source and is pushed towards the text and towards the source.

    v = v(y, c−) + a·(v(y, c) − v(y, c−)) + (b − 1)·(v(y, ∅) − v(0, ∅)), with y the source (after InstructPix2Pix
    2211.09800, eq. 3), a ``guidance_scale`` and b ``image_guidance_scale``, which costs two more network calls a step
    unless it is 1. c− is ``negative`` (B, T, E), or ∅ where None.
    """
    shown = with_reference(denoiser, source)
    towards_text = guided(shown, config.guidance_scale, negative=negative)
    if config.image_guidance_scale == 1:
        return towards_text
    unshown = with_reference(denoiser, None)

    def call(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        nothing = null_condition(condition)
        towards_source = shown(noisy, sigma, nothing) - unshown(noisy, sigma, nothing)
        return towards_text(noisy, sigma, condition) + (config.image_guidance_scale - 1) * towards_source

    return call


def edit_pictures(
    denoiser: Denoiser,
    source: Tensor,
    condition: Tensor,
    noise: Tensor,
    config: EditConfig,
    *,
    negative: Tensor | None = None,
) -> Tensor:
    """Pictures edited by a network that was trained to restore.

    Args:
        denoiser: of six input channels, its output a velocity.
        source: (B, 3, S, S) in [−1, 1].
        condition: (B, T, E) tokens of the text and its neighbours.
        noise: (B, 3, S, S) standard normal.
        config: how.
        negative: (B, T, E) tokens to push away from, those of the source say.

    Returns:
        (B, 3, S, S) float32 in [−1, 1].
    """
    restored = _integrate(edit_guided(denoiser, source, config, negative=negative), source, condition, noise, config)
    edited = restored.clamp(-1, 1)
    return keep_unchanged(edited, source) if config.keep else edited


def sdedit_pictures(
    denoiser: Denoiser,
    source: Tensor,
    condition: Tensor,
    noise: Tensor,
    config: EditConfig,
    *,
    negative: Tensor | None = None,
) -> Tensor:
    """The baseline (SDEdit, 2108.01073): noise the source, denoise it under the text. Arguments as above.

    The denoiser is the base's, of C input channels, and works on pixels or latents (B, C, s, s), which it returns
    unclamped; nothing but the noise level keeps the source.
    """
    return _integrate(guided(denoiser, config.guidance_scale, negative=negative), source, condition, noise, config)


def keep_unchanged(edited: Tensor, source: Tensor) -> Tensor:
    """The edited pictures with the source's pixels where the two hardly differ: (B, 3, S, S) in [−1, 1].

    The difference is averaged over 5×5 pixels; around what changed, 2 pixels of the edit stay and 2 more blend.
    """
    smooth = F.avg_pool2d(difference(edited, source), 5, stride=1, padding=2, count_include_pad=False)
    changed = ((smooth - KEPT_BELOW) / (CHANGED_ABOVE - KEPT_BELOW)).clamp(0, 1)
    widened = F.max_pool2d(changed, 5, stride=1, padding=2)
    return torch.lerp(source, edited, F.avg_pool2d(widened, 5, stride=1, padding=2, count_include_pad=False))


@torch.inference_mode()
def edit(
    pipeline: "KNNDiffusionPipeline",
    images: Image.Image | Sequence[Image.Image],
    prompts: "Prompts",
    config: EditConfig,
    *,
    generator: torch.Generator | None = None,
    neighbours: int | None = None,
    retrieve: bool = True,
) -> list[Image.Image]:
    """Edit pictures by texts.

    Args:
        pipeline: a generator with a database plugged in.
        images: what to edit. Transparency becomes white; the centre square is taken, at the generator's size.
        prompts: what the pictures should show afterwards: a text for all or one for each, or embeddings (B, D).
        config: how.
        generator: source of the noise, on the CPU; the same seed gives the same pictures whatever the batch.
        neighbours: K; as many as training has shown where None, which is what the defaults were measured with.
        retrieve: False hides the neighbours.

    Returns:
        An RGB picture each, of the generator's size.

    Raises:
        ModelError: the generator was not trained for editing, pictures and prompts do not fit, memory is out, or the
            weights draw no finite numbers.
    """
    network = pipeline.transformer.eval()
    if config.method == "restore" and not is_editor(network):
        raise ModelError("this generator was not trained for editing; train one that is, or ask for method='local'")
    k = pipeline.config.trained_neighbours if neighbours is None else neighbours
    if not is_count(k):
        raise ModelError(f"neighbours is {k}; give a whole number, at least 1")
    fitted = fit_images([images] if isinstance(images, Image.Image) else images, pipeline.side)
    targets = _one_each(pipeline.embed(prompts), len(fitted))
    database = pipeline.database if retrieve else None  # another may be swapped in meanwhile
    tokens = pipeline.condition(targets, k, retrieve=retrieve, database=database).tokens
    shown = None
    if config.contrast or config.method == "local":
        shown = pipeline.condition(seen(pipeline, fitted), k, retrieve=retrieve, database=database).tokens
    sources = to_model_range(torch.from_numpy(fitted))
    draws = config.candidates + (CONTRAST_DRAWS if config.method == "local" else 0)
    noise = _noise(pipeline, len(fitted) * draws, config.steps, generator)
    noise = noise.reshape(len(fitted), draws, *noise.shape[1:])

    def draw(rows: slice, step: Callable[[int], None]) -> Tensor:
        itself = None if shown is None else shown[rows]
        edited = _candidates(pipeline, sources[rows], tokens[rows], noise[rows], config, itself)
        if len(edited) == 1:
            return edited[0]
        scores = [(pipeline.encoder.embed_pixels(to_pixels(one)) * targets[rows]).sum(1) for one in edited]
        return choose(sources[rows], edited, torch.stack(scores), kept_db=config.kept_db)

    pictures = to_pixels(in_batches(draw, len(fitted), config.steps, pipeline.device, None))
    if same := int((pictures == fitted).all((1, 2, 3)).sum()):
        logger.warning("%d of %d pictures are left as they were; say it otherwise, or allow more", same, len(fitted))
    return [Image.fromarray(picture) for picture in pictures]


def fit_images(images: Sequence[Image.Image], side: int) -> NDArray[np.uint8]:
    """Pictures of any mode and size to (B, side, side, 3) uint8: on white, the centre square, resized.

    Logs how many were no squares of that side. Raises ``ModelError`` when there is none, or one is no picture or
    has no pixels.
    """
    if not len(images) or not all(isinstance(image, Image.Image) for image in images):
        raise ModelError("there is no picture to edit; give at least one PIL image")
    other = sum(image.size != (side, side) for image in images)
    if other:
        logger.warning(
            "%d of %d pictures are cut to their centre square and resized to %d px", other, len(images), side
        )
    return np.stack([picture_to_array(on_white(image), side) for image in images])


def _candidates(
    pipeline: "KNNDiffusionPipeline",
    source: Tensor,
    condition: Tensor,
    noise: Tensor,
    config: EditConfig,
    shown: Tensor | None,
) -> list[Tensor]:
    """The candidates of one batch, drawn on the pipeline's device: each (B, 3, S, S) in [−1, 1] on the CPU."""
    source, condition, noise = (part.to(pipeline.device) for part in (source, condition, noise))
    shown = None if shown is None else shown.to(pipeline.device)
    negative = shown if config.contrast else None
    draws = noise[:, : config.candidates].unbind(1)
    if config.method == "restore":
        denoiser = as_denoiser(pipeline.transformer, pipeline.config.prediction)
        return [edit_pictures(denoiser, source, condition, one, config, negative=negative).cpu() for one in draws]
    kind = CodeCanvas if isinstance(pipeline.transformer, VQTransformer) else FieldCanvas
    canvas: Canvas = kind(pipeline, source, condition, config, negative)
    if config.method == "sdedit":
        return [canvas.whole(one).cpu() for one in draws]
    assert shown is not None  # noqa: S101 - the caller describes the source for this method
    contrast = canvas.contrast(shown, noise[:, config.candidates :])
    if contrast.shape[-1] != source.shape[-1]:  # of latents or codes
        contrast = F.interpolate(contrast, size=source.shape[-2:], mode="bilinear")
    regions = propose_regions(contrast, math.ceil(config.candidates / 2), largest=config.largest_region).unbind(1)
    edited = [canvas.inside(region, one) for region, one in zip(itertools.cycle(regions), draws, strict=False)]
    return [(keep_unchanged(one, source) if config.keep else one).cpu() for one in edited]


class Canvas(Protocol):
    """What pictures are to a generator that edits them: pixels, latents or codes."""

    def contrast(self, shown: Tensor, noises: Tensor) -> Tensor:
        """Where the text and what the source shows (B, T, E) disagree: (B, 1, s, s), at least 0."""
        ...

    def whole(self, noise: Tensor) -> Tensor:
        """The pictures drawn anew from the strength on: (B, 3, S, S) float32 in [−1, 1]."""
        ...

    def inside(self, region: Tensor, noise: Tensor) -> Tensor:
        """The pictures with a region (B, 1, S, S) in [0, 1] drawn anew: (B, 3, S, S) float32 in [−1, 1]."""
        ...


class FieldCanvas:
    """Pixels or latents, which velocities move."""

    def __init__(
        self,
        pipeline: "KNNDiffusionPipeline",
        source: Tensor,
        condition: Tensor,
        config: EditConfig,
        negative: Tensor | None,
    ) -> None:
        """Of sources (B, 3, S, S) in [−1, 1] and what they should show (B, T, E), on the pipeline's device."""
        self._vae, self._denoiser, self._condition = pipeline.vae, pipeline.denoiser(), condition
        self._config, self._negative, self._source = config, negative, source
        self._field = source if self._vae is None else encode_latents(self._vae, source)

    def contrast(self, shown: Tensor, noises: Tensor) -> Tensor:
        """As :class:`Canvas`; noises (B, N, C, s, s)."""
        return text_contrast(self._denoiser, self._field, self._condition, shown, noises)

    def whole(self, noise: Tensor) -> Tensor:
        """As :class:`Canvas`; noise (B, C, s, s)."""
        return self._decoded(
            sdedit_pictures(self._denoiser, self._field, self._condition, noise, self._config, negative=self._negative)
        )

    def inside(self, region: Tensor, noise: Tensor) -> Tensor:
        """As :class:`Canvas`; noise (B, C, s, s)."""
        pushed = guided(self._denoiser, self._config.guidance_scale, negative=self._negative)
        cells, levels = cells_of(region, self._field.shape[-1]), edit_levels(self._config).to(noise.device)
        drawn = self._decoded(draw_inside(pushed, self._field, cells, self._condition, noise, levels))
        return drawn if self._vae is None else laid_over(self._source, drawn, cells)

    def _decoded(self, field: Tensor) -> Tensor:
        return (field if self._vae is None else decode_latents(self._vae, field)).clamp(-1, 1)


def _noise(pipeline: "KNNDiffusionPipeline", count: int, steps: int, generator: torch.Generator | None) -> Tensor:
    """What draws need: standard normal (count, C, s, s), or uniforms (count, NOISING + steps, n) for codes."""
    network = pipeline.transformer.config
    if isinstance(pipeline.transformer, VQTransformer):
        return draw_uniforms(count, (NOISING + steps, network.tokens), generator, shared=False)
    return draw_noise(count, (network.out_channels, network.sample_size, network.sample_size), generator)


def _one_each(embeddings: Tensor, count: int) -> Tensor:
    if len(embeddings) not in (1, count):
        raise ModelError(f"{len(embeddings)} prompts for {count} pictures; give one for all, or one for each")
    return embeddings.expand(count, -1).contiguous()


def _integrate(denoiser: Denoiser, source: Tensor, condition: Tensor, noise: Tensor, config: EditConfig) -> Tensor:
    """Euler along the levels, from the noised source on: (B, C, s, s) float32."""
    levels = edit_levels(config).to(source.device)
    picture = add_noise(source, noise, levels[:1].expand(len(source)))
    for level, following in itertools.pairwise(levels):
        picture = picture + (following - level) * denoiser(picture, level.expand(len(picture)), condition)
    return picture.float()
