"""Randomness that a step, and nothing else, decides: no state to keep, none to lose.

A step's numbers are drawn for its whole global batch and every part keeps its own rows, so how many workers share a
step, or in how many pieces one of them takes it, changes no number.
"""

import numpy as np
import torch
from torch import Tensor


class Draw:
    """What one part of one step draws, in the order it asks."""

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
        """Draw for part ``part`` of ``parts`` of ``step``; ``stream`` keeps uses apart (shuffling, noise)."""
        self._generator = torch.Generator(device).manual_seed(mixed_seed(seed, step, stream))
        self._part, self._parts = part, parts

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32; ``shape[0]`` counts the rows of this part."""
        return self._mine(torch.randn(self._whole(shape), generator=self._generator, device=self._generator.device))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform float32 in [0, 1); ``shape[0]`` counts the rows of this part."""
        return self._mine(torch.rand(self._whole(shape), generator=self._generator, device=self._generator.device))

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] * self._parts, *shape[1:])

    def _mine(self, drawn: Tensor) -> Tensor:
        return drawn.chunk(self._parts)[self._part]


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed out of several numbers."""
    low, high = np.random.SeedSequence(parts).generate_state(2, np.uint32)
    return int(high) << 31 ^ int(low)
