"""Settings of an evaluation."""

import dataclasses

from infra import uris
from infra.errors import ConfigError
from model.metrics import embedding_metrics

SAMPLES = "samples"
MIN_COMPARED = 4
"""Minimum number of images in each compared set: precision and recall use the third neighbour of each image."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Settings of an evaluation: the images to generate, and the metrics to compute."""

    prompts: tuple[str, ...] = ()
    prompt_urls: tuple[str, ...] = ()  # the image that each prompt describes, if known
    samples: int = 256
    steps: int | None = None  # None: the pipeline's default
    guidance: float | None = None  # None: the pipeline's default
    seed: int = 0
    seeds: int = 4  # images per prompt for the diversity
    diversity_prompts: int = 16
    ablations: bool = False  # also without neighbours, with each query mode, with 1, 4, 10 and 20 neighbours
    bootstrap: int = 200  # resamples per interval; 0: no intervals
    copy_percentile: float = 95.0  # percentile of cosines between real images, above which a sample is a copy
    near_duplicate: float = embedding_metrics.NEAR_DUPLICATE  # minimum cosine of variants; that percentile omits them
    inception_weights: str | None = None  # torch-fidelity's file, local or remote; None: no FID
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
