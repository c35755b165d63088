"""Stateless random numbers: a function of seed, step and stream only, so a resumed run restores no state.

Each step generates the numbers of its whole global batch, and each part keeps its own rows. The numbers therefore do
not depend on how many workers share a step, nor on how many pieces a worker splits its share into.
"""

import numpy as np
import torch
from torch import Tensor


class StepRandom:
    """Random numbers for one part of one training step; each call continues the sequence."""

    def __init__(
        self,
        seed: int,
        step: int,
        *,
        stream: int = 0,
        part: int = 0,
        parts: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Seed the generator.

        Args:
            seed: Seed of the training run.
            step: Number of the step.
            stream: Number of the stream. Streams are independent, e.g. that of shuffling and that of noise. Default: 0.
            part: Part of the global batch whose rows are returned. Default: 0.
            parts: Number of parts of the global batch. Default: 1.
            device: Device of the generator and of the numbers. Default: CPU.
        """
        self._generator = torch.Generator(device).manual_seed(mix_seeds(seed, step, stream))
        self._part, self._parts = part, parts

    def normal(self, *shape: int) -> Tensor:
        """Sample standard normal float32; ``shape[0]`` counts the rows of this part."""
        return self._own_rows(torch.randn(self._global(shape), generator=self._generator, device=self._device))

    def uniform(self, *shape: int) -> Tensor:
        """Sample uniform float32 in [0, 1); ``shape[0]`` counts the rows of this part."""
        return self._own_rows(torch.rand(self._global(shape), generator=self._generator, device=self._device))

    @property
    def _device(self) -> torch.device:
        return self._generator.device

    def _global(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] * self._parts, *shape[1:])

    def _own_rows(self, numbers: Tensor) -> Tensor:
        return numbers.chunk(self._parts)[self._part]


def mix_seeds(*seeds: int) -> int:
    """Combine several numbers into one 63-bit seed."""
    low, high = np.random.SeedSequence(seeds).generate_state(2, np.uint32)
    return int(high) << 31 ^ int(low)
