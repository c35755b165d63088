"""Configurations of networks and of their training. Importing them needs neither torch nor diffusers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from model.errors import ModelError

Prediction = Literal["velocity", "sample"]
"""Output of a continuous network: the velocity, or the clean image."""
NEAR_DUPLICATE = 0.95
"""Minimum cosine of two images that count as variants of one image. It depends on the encoder.

Under ``sticker-clip`` the median cosine of a Twemoji and the same image shifted by 1, 2 or 4 of 64 px is 0.995, 0.990
and 0.983. That of an emoji and its nearest other skin tone is 0.956. Nine in ten emoji without skin tones have no other
image this close. The resulting copy threshold is 0.944: 98%, 98% and 91% of the shifted images are above it."""
MAX_NEIGHBOUR_IMAGES = 4
"""Maximum number of neighbour images that a network may see."""
IN_KEY_IF_SET: Mapping[str, Any] = {"in_key": "if set"}
"""Metadata of an optional field: only another value than the default is part of the key of a training."""


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ModelError(f"{name} is below 1: {getattr(config, name)}; give at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Size of the transformer, and what it predicts. Its width is heads × head_width.

    Attributes:
        kind: Kind of the network.
        image_size: Side of the denoised pixels or latents.
        channels: 3 for pixels, else the channels of the latents.
        patch_size: Side of a patch. ``image_size`` must be a multiple of it.
        layers: Number of blocks.
        heads: Attention heads of a block.
        head_width: Channels of a head.
        prediction: What the network predicts.
        neighbour_images: Images of neighbours that the network sees as tokens, at most 4; 0 for embeddings alone. Needs
            pixels, and a ``head_width`` that is a multiple of 8.
        neighbour_patch: Side of the patches of those images. ``image_size`` must be a multiple of it.
        rotary: Rotary positions in the self-attention, in addition to the absolute ones. Needs a ``head_width`` that is
            a multiple of 4.
    """

    kind: Literal["transformer"] = "transformer"  # discriminates the network configs in a flow's parameters
    image_size: int = 32
    channels: Annotated[int, Ge(1)] = 3
    patch_size: Annotated[int, Ge(1)] = 4
    layers: Annotated[int, Ge(1)] = 6
    heads: Annotated[int, Ge(1)] = 4
    head_width: Annotated[int, Ge(1)] = 32
    prediction: Prediction = "velocity"
    neighbour_images: Annotated[int, Interval(ge=0, le=MAX_NEIGHBOUR_IMAGES)] = dataclasses.field(
        default=0, metadata=IN_KEY_IF_SET
    )
    neighbour_patch: Annotated[int, Ge(1)] = dataclasses.field(default=8, metadata=IN_KEY_IF_SET)
    rotary: bool = dataclasses.field(default=False, metadata=IN_KEY_IF_SET)

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if patches do not tile the image or a size is out of range."""
        _require_positive(self, "image_size", "channels", "patch_size", "layers", "heads", "head_width")
        if self.image_size % self.patch_size:
            raise ModelError(
                f"image_size is not a multiple of patch_size: {self.image_size}, {self.patch_size}; change one of them"
            )
        if not 0 <= self.neighbour_images <= MAX_NEIGHBOUR_IMAGES:
            raise ModelError(
                f"neighbour_images is out of range: {self.neighbour_images}; give 0 to {MAX_NEIGHBOUR_IMAGES}"
            )
        if self.rotary and self.head_width % 4:
            raise ModelError(f"rotary needs a head_width that is a multiple of 4: {self.head_width}; change head_width")
        if self.neighbour_images:
            self._check_images()

    def _check_images(self) -> None:
        if self.channels != 3:
            raise ModelError(
                f"neighbour_images needs pixels: {self.channels} channels; set it to 0, or train on pixels"
            )
        if self.neighbour_patch < 1 or self.image_size % self.neighbour_patch:
            raise ModelError(
                f"image_size is not a multiple of neighbour_patch: {self.image_size}, {self.neighbour_patch}; "
                "change one of them"
            )
        if self.head_width % 8:
            raise ModelError(
                f"neighbour_images needs a head_width that is a multiple of 8: {self.head_width}; change head_width"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Size of the U-Net: one level per entry of ``widths``, each at half the resolution of the one before.

    All levels but the first have attention.

    Attributes:
        kind: Kind of the network.
        image_size: Side of the denoised pixels or latents.
        channels: 3 for pixels, else the channels of the latents.
        widths: Channels of each level, multiples of 32 and of ``head_width``.
        layers: Residual layers per level.
        head_width: Channels of an attention head.
        prediction: What the network predicts.
    """

    kind: Literal["unet"] = "unet"
    image_size: int = 64
    channels: int = 3
    widths: tuple[int, ...] = (64, 128, 192, 256)
    layers: int = 2
    head_width: Annotated[int, Ge(1)] = 32
    prediction: Prediction = "velocity"

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if the image cannot be halved, heads or norms do not fit, or a size is out of range."""
        _require_positive(self, "image_size", "channels", "layers", "head_width")
        halvings = len(self.widths) - 1
        if halvings < 1 or self.image_size % 2**halvings:
            raise ModelError(
                f"image_size cannot be halved at each level: {self.image_size}, {len(self.widths)} widths; give at "
                "least 2 widths, and an image_size that is a multiple of 2 ** (widths - 1)"
            )
        if any(width < 1 or width % 32 or width % self.head_width for width in self.widths):
            raise ModelError(
                f"widths do not fit the group norms or heads: {self.widths}; give multiples of 32 and of head_width "
                f"{self.head_width}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VQTransformerConfig:
    """Size of the transformer over the codes of an autoencoder.

    Attributes:
        kind: Kind of the network.
        codes: Number of codes, that of the autoencoder.
        tokens: Codes of an image, a square number that must match the autoencoder.
        timesteps: Steps of the diffusion process.
        layers: Number of blocks.
        heads: Attention heads of a block.
        head_width: Channels of a head.
    """

    kind: Literal["vq-transformer"] = "vq-transformer"
    codes: Annotated[int, Ge(2)] = 1024
    tokens: Annotated[int, Ge(1)] = 256
    timesteps: Annotated[int, Ge(2)] = 100
    layers: Annotated[int, Ge(1)] = 8
    heads: Annotated[int, Ge(1)] = 6
    head_width: Annotated[int, Ge(1)] = 64

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if the tokens do not form a square or a size is too small."""
        _require_positive(self, "tokens", "layers", "heads", "head_width")
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ModelError(
                f"tokens is not a square number: {self.tokens}; use (image_size / downscale)² of the autoencoder"
            )
        if self.codes < 2 or self.timesteps < 2:
            raise ModelError(f"codes or timesteps is below 2: {self.codes}, {self.timesteps}; give at least 2 of each")


NetworkConfig: TypeAlias = TransformerConfig | UNetConfig | VQTransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """Probabilities of hiding and perturbing parts of the condition in training.

    The three ``drop_`` fields are mutually exclusive probabilities per sample.

    The neighbours of a text are farther apart than those of an image. ``pool`` may therefore be larger than
    ``neighbours``: half of the samples then see a random subset of the pool instead of the nearest neighbours.
    ``fewer_neighbours`` makes k at inference independent of k in training.

    Attributes:
        neighbours: Neighbours that the network sees.
        pool: Neighbours searched for each image. Training shows ``neighbours`` of them.
        fewer_neighbours: Share of samples that see a random number of neighbours, at least 1.
        drop_all: Probability that query and neighbours are hidden.
        drop_query: Probability that only the query is hidden.
        drop_neighbours: Probability that only the neighbours are hidden.
        gap_probability: Probability that the query is mixed with a random direction, as a text differs from an image.
        gap_weight: Largest weight of the random direction.
        drop_images: Probability that only the images of the neighbours are hidden, from a network that takes them.
            They are also hidden with the neighbours.
        mean_query: Share of samples with the mean of the shown neighbours in the query's slot, as at inference.
    """

    neighbours: Annotated[int, Ge(1)] = 10
    pool: Annotated[int, Ge(1)] = 10
    fewer_neighbours: Annotated[float, Interval(ge=0, le=1)] = 0.1
    drop_all: Annotated[float, Interval(ge=0, le=1)] = 0.10
    drop_query: Annotated[float, Interval(ge=0, le=1)] = 0.15
    drop_neighbours: Annotated[float, Interval(ge=0, le=1)] = 0.10
    gap_probability: Annotated[float, Interval(ge=0, le=1)] = 0.7
    gap_weight: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    drop_images: Annotated[float, Interval(ge=0, le=1)] = dataclasses.field(default=0.3, metadata=IN_KEY_IF_SET)
    mean_query: Annotated[float, Interval(ge=0, le=1)] = dataclasses.field(default=0.0, metadata=IN_KEY_IF_SET)

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.neighbours < 1:
            raise ModelError(f"neighbours must be at least 1: {self.neighbours}; the method requires retrieval")
        if self.pool < self.neighbours:
            raise ModelError(f"pool is smaller than neighbours: {self.pool} < {self.neighbours}; increase pool")
        drops = (self.drop_all, self.drop_query, self.drop_neighbours)
        if min(drops) < 0 or sum(drops) > 1:
            raise ModelError(
                f"drop_all, drop_query and drop_neighbours must be at least 0, with a sum of at most 1: {drops}; "
                "lower one of them, because they are mutually exclusive"
            )
        for name in ("fewer_neighbours", "drop_images", "mean_query"):
            if not 0 <= getattr(self, name) <= 1:
                raise ModelError(f"{name} is not a probability: {getattr(self, name)}; give a value in [0, 1]")
        if not (0 <= self.gap_probability <= 1 and 0 <= self.gap_weight < 1):
            raise ModelError(
                f"gap_probability or gap_weight is out of range: {self.gap_probability}, {self.gap_weight}; "
                "give a value in [0, 1] and one in [0, 1)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RestorationConfig:
    """Regions to paste. Areas are shares of the image, and probabilities are per sample.

    Attributes:
        smallest_area: Smallest area of a region.
        largest_area: Largest area of a region.
        largest_aspect: Largest ratio of the sides of a region.
        second_region: Probability of a second region.
        ellipse: Probability that a region is an ellipse instead of a rectangle.
        empty: Probability that the reference is the image itself.
        whole: Probability that the reference is the whole neighbour.
        feather_px: Standard deviation of the soft edge in px.
        drop_reference: Probability of zeros as reference, for generation and for guidance on the image.
    """

    smallest_area: Annotated[float, Interval(gt=0, le=1)] = 0.06
    largest_area: Annotated[float, Interval(gt=0, le=1)] = 0.5
    largest_aspect: Annotated[float, Ge(1)] = 2.5
    second_region: Annotated[float, Interval(ge=0, le=1)] = 0.4
    ellipse: Annotated[float, Interval(ge=0, le=1)] = 0.5
    empty: Annotated[float, Interval(ge=0, le=1)] = 0.10
    whole: Annotated[float, Interval(ge=0, le=1)] = 0.20
    feather_px: Annotated[float, Ge(0)] = 1.0
    drop_reference: Annotated[float, Interval(ge=0, le=1)] = 0.10

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if a value is out of range."""
        if not 0 < self.smallest_area <= self.largest_area <= 1:
            raise ModelError(
                f"smallest_area or largest_area is out of range: {self.smallest_area}, {self.largest_area}; they must "
                "satisfy 0 < smallest_area <= largest_area <= 1"
            )
        if self.largest_aspect < 1 or self.feather_px < 0:
            raise ModelError(
                f"largest_aspect or feather_px is out of range: {self.largest_aspect}, {self.feather_px}; "
                "largest_aspect must be at least 1 and feather_px at least 0"
            )
        probabilities = (self.second_region, self.ellipse, self.empty, self.whole, self.drop_reference)
        if min(probabilities) < 0 or max(probabilities) > 1 or self.empty + self.whole > 1:
            raise ModelError(
                f"second_region, ellipse, empty, whole or drop_reference is out of range: {probabilities}; "
                "probabilities must be in [0, 1], and so must empty + whole, which are mutually exclusive"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Length, rates and intervals of a training run. Lengths are counted in images, independent of the batch size.

    Attributes:
        images: Images to train on, counted with repetitions.
        batch_size: Images per step over all workers and pieces.
        pieces: Parts of each worker's share of a batch, one after the other (gradient accumulation).
        learning_rate: Highest learning rate.
        schedule: Course of the learning rate after the warm-up.
        warmup_images: Images over which the learning rate grows from 0.
        weight_decay: Decay of the weights.
        gradient_clip: Largest norm of the gradients; inf for no clipping.
        ema_decay: Decay of the average of the weights that is saved.
        compile: Compile the network on CUDA. On a CPU compilation takes longer than it saves.
        bfloat16_copy: Train a bfloat16 copy on CUDA. False uses autocast, for objectives that write into the weights.
        sharding: With several workers: each has all weights (ddp), or a part of them (fsdp).
        checkpoint_images: Images between checkpoints.
        log_images: Images between logged metrics.
        grid_images: Images between sample grids.
        seed: Seed of weights, batches and noise.
        decay_images: Images at the end over which a constant learning rate falls linearly to 0.
    """

    images: Annotated[int, Ge(1)] = 40_000
    batch_size: Annotated[int, Ge(1)] = 32
    pieces: Annotated[int, Ge(1)] = 1
    learning_rate: Annotated[float, Gt(0)] = 3e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_images: Annotated[int, Ge(0)] = 1_600
    weight_decay: Annotated[float, Ge(0)] = 0.01
    gradient_clip: Annotated[float, Gt(0)] = 1.0
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.995
    compile: bool = True
    bfloat16_copy: bool = True
    sharding: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_images: Annotated[int, Ge(1)] = 8_000
    log_images: Annotated[int, Ge(1)] = 640
    grid_images: Annotated[int, Ge(1)] = 8_000
    seed: Annotated[int, Ge(0)] = 0
    decay_images: Annotated[int, Ge(0)] = dataclasses.field(default=0, metadata=IN_KEY_IF_SET)

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if a value is out of range."""
        if self.images < self.batch_size or self.batch_size < 1:
            raise ModelError(
                f"images or batch_size is too small: {self.images}, {self.batch_size}; images must be at least "
                "batch_size, and batch_size at least 1"
            )
        if self.pieces < 1 or self.batch_size % self.pieces:
            raise ModelError(
                f"batch_size is not a multiple of pieces: {self.batch_size}, {self.pieces}; change one of them"
            )
        if min(self.checkpoint_images, self.log_images, self.grid_images) < 1:
            raise ModelError(
                f"checkpoint_images, log_images or grid_images is below 1: {self.checkpoint_images}, "
                f"{self.log_images}, {self.grid_images}; give at least 1 of each"
            )
        if not 0 < self.learning_rate < math.inf or not 0 <= self.ema_decay < 1:
            raise ModelError(
                f"learning_rate or ema_decay is out of range: {self.learning_rate}, {self.ema_decay}; learning_rate "
                "must be above 0 and finite, and ema_decay in [0, 1)"
            )
        if not self.gradient_clip > 0:
            raise ModelError(f"gradient_clip is not above 0: {self.gradient_clip}; use inf for no clipping")
        if not 0 <= self.weight_decay < math.inf or self.warmup_images < 0:
            raise ModelError(
                f"weight_decay or warmup_images is out of range: {self.weight_decay}, {self.warmup_images}; both must "
                "be at least 0, and weight_decay finite"
            )
        if self.seed < 0:
            raise ModelError(f"seed is negative: {self.seed}; give at least 0")
        if not 0 <= self.decay_images <= self.images or (self.decay_images and self.schedule != "constant"):
            raise ModelError(
                f"decay_images is not valid: {self.decay_images} with schedule {self.schedule!r} and {self.images} "
                "images; give 0, or at most the images with the schedule 'constant'"
            )

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return self.images // self.batch_size
