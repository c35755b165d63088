"""What a pipeline's network draws from condition tokens: velocities integrated to pictures, or codes sampled.

Legend: ``B`` pictures drawn, ``S`` side, ``T`` condition tokens, ``E`` their channels, ``D`` embedding width.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.diffusion.guidance import guided
from model.diffusion.solver import Told, draw_noise, draw_uniforms, in_batches, integrate
from model.diffusion.vq_diffusion import Transitions, sample_codes
from model.networks.latents import decode_latents
from model.networks.vq_autoencoder import decode_codes
from model.networks.vq_transformer import VQTransformer
from model.training.data import to_pixels

if TYPE_CHECKING:
    from model.pipeline import KNNDiffusionPipeline


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be drawn, and how.

    Attributes:
        tokens: (B, T, E), on the CPU; those of one picture's candidates stand together.
        targets: (B / candidates, D) unit rows, what each picture is to be close to.
        candidates: pictures drawn for each that is returned.
        negative: (B, T, E) to keep away from; None: the hidden condition.
        guidance_scale: 1 follows the condition as trained.
        steps: from noise to picture.
        generator: source of the noise, on the CPU.
        shared_noise: whether all start from the same.
        told: called with (step, steps) of all batches together.
    """

    tokens: Tensor
    targets: Tensor
    candidates: int
    negative: Tensor | None
    guidance_scale: float
    steps: int
    generator: torch.Generator | None
    shared_noise: bool
    told: Told | None


def draw(pipeline: "KNNDiffusionPipeline", asked: Asked) -> Tensor:
    """(B / candidates, 3, S, S) float32 in [−1, 1] on the CPU. Raises ``ModelError`` as :func:`in_batches`."""
    discrete = isinstance(pipeline.transformer, VQTransformer)
    pictures = _sampled(pipeline, asked) if discrete else _integrated(pipeline, asked)
    return pictures if asked.candidates == 1 else _closest(pipeline, pictures, asked)


def seen(pipeline: "KNNDiffusionPipeline", pixels: NDArray[np.uint8]) -> Tensor:
    """Pictures (B, S, S, 3) as the encoder sees them: unit rows (B, D). Raises ``ModelError`` as :func:`in_batches`."""
    encoder = pipeline.encoder
    return in_batches(lambda rows, _: encoder.embed_pixels(pixels[rows]), len(pixels), 1, pipeline.device, None)


def _closest(pipeline: "KNNDiffusionPipeline", pictures: Tensor, asked: Asked) -> Tensor:
    """Of each picture's candidates the one that the encoder sees closest to its target."""
    rows = seen(pipeline, to_pixels(pictures))
    cosines = (rows * asked.targets.repeat_interleave(asked.candidates, dim=0)).sum(1)
    best = cosines.reshape(-1, asked.candidates).argmax(1)
    return pictures[torch.arange(len(best)) * asked.candidates + best]


def _integrated(pipeline: "KNNDiffusionPipeline", asked: Asked) -> Tensor:
    network, device = pipeline.transformer.config, pipeline.device
    shape = (network.out_channels, network.sample_size, network.sample_size)
    noise = draw_noise(len(asked.tokens), shape, asked.generator, shared=asked.shared_noise)
    first, last = pipeline.config.guidance_interval
    interval = (float(first), float(last))

    def batch(rows: slice, step: Callable[[int], None]) -> Tensor:
        away = None if asked.negative is None else asked.negative[rows].to(device)
        denoiser = guided(pipeline.denoiser(), asked.guidance_scale, negative=away, interval=interval)
        start, condition = noise[rows].to(device), asked.tokens[rows].to(device)
        drawn = integrate(denoiser, start, condition, pipeline.scheduler, asked.steps, step)
        return (drawn if pipeline.vae is None else decode_latents(pipeline.vae, drawn)).clamp(-1, 1).float()

    return in_batches(batch, len(asked.tokens), asked.steps, device, asked.told)


def _sampled(pipeline: "KNNDiffusionPipeline", asked: Asked) -> Tensor:
    network, device = pipeline.transformer.config, pipeline.device
    shape = (asked.steps, network.tokens)
    uniforms = draw_uniforms(len(asked.tokens), shape, asked.generator, shared=asked.shared_noise)
    transitions = Transitions(codes=network.codes, timesteps=network.timesteps)

    def batch(rows: slice, step: Callable[[int], None]) -> Tensor:
        codes = sample_codes(
            pipeline.transformer.eval(),
            asked.tokens[rows].to(device),
            uniforms[rows].to(device),
            transitions=transitions,
            guidance_scale=asked.guidance_scale,
            truncation=pipeline.config.truncation,
            negative=None if asked.negative is None else asked.negative[rows].to(device),
            callback=lambda number, _: step(number + 1),
        )
        return decode_codes(pipeline.vae, codes).float()

    return in_batches(batch, len(asked.tokens), asked.steps, device, asked.told)
