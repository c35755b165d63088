"""Settings of an evaluation."""

import dataclasses
from typing import Annotated

from annotated_types import Ge, Interval

from infra import uris
from infra.errors import ConfigError, InputError
from model.configs import NEAR_DUPLICATE

SAMPLES = "samples"
MIN_COMPARED = 4
"""Minimum number of images in each compared set: precision and recall use the third neighbour of each image."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Settings of an evaluation: which images are generated, and which metrics are computed.

    Attributes:
        prompts: Texts to generate from. Default: images of the database as prompts.
        prompt_urls: URL of the image that each prompt describes, if known.
        samples: Images per condition.
        steps: Sampling steps. Default: those of the pipeline.
        guidance: Guidance scale. Default: that of the pipeline.
        seed: Seed of the noise.
        seeds: Images per prompt for the diversity.
        diversity_prompts: Prompts for the diversity.
        ablations: Also evaluate without neighbours, with each query mode, and with 1, 4, 10 and 20 neighbours.
        bootstrap: Resamples per interval. 0 computes no intervals.
        copy_percentile: Percentile of the cosines between real images. A sample above it is a copy.
        near_duplicate: Minimum cosine of real pairs that are variants of one image. They are left out.
        inception_weights: File of torch-fidelity's Inception weights, local or remote. Default: no FID.
        use_gpu: Generate on a GPU.
    """

    prompts: tuple[str, ...] = ()
    prompt_urls: tuple[str, ...] = ()
    samples: Annotated[int, Ge(MIN_COMPARED)] = 256
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    seeds: Annotated[int, Ge(2)] = 4
    diversity_prompts: Annotated[int, Ge(1)] = 16
    ablations: bool = False
    bootstrap: Annotated[int, Ge(0)] = 200
    copy_percentile: Annotated[float, Interval(gt=0, lt=100)] = 95.0
    near_duplicate: Annotated[float, Interval(gt=0, le=1)] = NEAR_DUPLICATE
    inception_weights: str | None = None
    use_gpu: bool = False

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for values out of range."""
        uris.hide_fields(self, "inception_weights")
        if self.samples < MIN_COMPARED:
            raise ConfigError(
                f"too few samples: {self.samples}; give at least {MIN_COMPARED}, because precision and recall use the "
                "third neighbour"
            )
        if self.seeds < 2 or self.diversity_prompts < 1:
            raise ConfigError(
                f"too few images for the diversity: seeds {self.seeds}, diversity_prompts {self.diversity_prompts}; "
                "give at least 2 seeds and 1 prompt"
            )
        if self.bootstrap < 0:
            raise ConfigError(
                f"bootstrap is negative: {self.bootstrap}; give a number of resamples, or 0 for no intervals"
            )
        if not 0 < self.copy_percentile < 100:
            raise ConfigError(f"copy_percentile is out of range: {self.copy_percentile}; give a value in (0, 100)")
        if not 0 < self.near_duplicate <= 1:
            raise ConfigError(f"near_duplicate is out of range: {self.near_duplicate}; give a cosine in (0, 1]")
        if self.prompt_urls and len(self.prompt_urls) != len(self.prompts):
            raise ConfigError(
                f"numbers of prompt_urls and prompts differ: {len(self.prompt_urls)}, {len(self.prompts)}; "
                "give one URL per prompt, or none"
            )


def check_weights(config: EvaluateConfig) -> None:
    """Raise ``InputError`` if the config names a local file of weights that does not exist."""
    weights = config.inception_weights
    if weights is not None and uris.is_local(weights) and not uris.local_path(weights).is_file():
        raise InputError(f"evaluate.inception_weights does not exist: {weights}; give the file of torch-fidelity")
