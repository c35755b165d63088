"""Flow matching: the straight path from an image to noise, and the loss along it.

Legend: ``B`` batch, ``C H W`` an image or latent, images in [−1, 1], ``σ`` in [0, 1] the share of noise.

    x_σ = (1 − σ)·x + σ·ε,   ε ~ N(0, I)          (Lipman et al. 2210.02747, with the path of rectified flow)
    v   = dx_σ/dσ = ε − x                         the velocity; the sampler integrates it from σ = 1 to 0
    L   = E ‖v̂ − v‖²,  σ = sigmoid(z), z ~ N(0, 1)  (logit-normal: Esser et al. 2403.03206, eq. 19)

The network predicts either the velocity or the clean image x̂, which is converted to v̂ = (x_σ − x̂)/σ. The loss is on v̂
in both cases (JiT, 2511.13720, whose lower bound of σ is also 0.05).
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.configs import Prediction
from model.errors import ModelError
from model.step_random import StepRandom

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_σ (B, C, H, W), σ (B,), condition (B, T, E)) -> v̂ (B, C, H, W)."""

MIN_SIGMA = 0.05
"""Lower bound of the divisor σ: without it, errors of a predicted clean image would be amplified without limit."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NoiseLevels:
    """Distribution of the noise levels in training: σ = sigmoid(mean + deviation·z), z ~ N(0, 1).

    Attributes:
        mean: Above 0 for more samples at high noise, where the shapes are decided.
        deviation: Width of the distribution before the sigmoid.
    """

    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if a value is out of range."""
        if not math.isfinite(self.mean) or not 0 < self.deviation < math.inf:
            raise ModelError(
                f"mean or deviation of the noise levels is out of range: {self.mean}, {self.deviation}; mean must be "
                "finite, and deviation above 0 and finite"
            )


LOGIT_NORMAL = NoiseLevels()
"""The standard logit-normal distribution."""


def add_noise(images: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the point x_σ = (1 − σ)·x + σ·ε on the path, for images and noise (B, C, H, W), sigma (B,)."""
    return torch.lerp(images, noise, sigma[:, None, None, None])


def to_velocity(output: Tensor, noisy: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """Convert the network's output to a velocity (B, C, H, W)."""
    if prediction == "velocity":
        return output
    return (noisy - output) / sigma[:, None, None, None].clamp(min=MIN_SIGMA)


def sample_sigmas(batch: int, rng: StepRandom, levels: NoiseLevels = LOGIT_NORMAL) -> Tensor:
    """Sample logit-normal noise levels (B,) float32 in (0, 1)."""
    return torch.sigmoid(levels.mean + levels.deviation * rng.normal(batch))


def flow_matching_loss(
    denoiser: Denoiser,
    images: Tensor,
    condition: Tensor,
    sigma: Tensor,
    noise: Tensor,
    prediction: Prediction = "velocity",
) -> Tensor:
    """Return the mean squared error of the velocity, a scalar.

    Args:
        denoiser: Network whose output is a velocity.
        images: (B, C, H, W) in [−1, 1].
        condition: (B, T, E) tokens.
        sigma: (B,) noise levels.
        noise: (B, C, H, W) standard normal.
        prediction: Output of the network inside the denoiser. For a predicted clean image the target's divisor has the
            same lower bound as the velocity's, so that the clean image itself has the loss 0 at any σ.
    """
    noisy = add_noise(images, noise, sigma)
    target = noise - images if prediction == "velocity" else to_velocity(images, noisy, sigma, prediction)
    return (denoiser(noisy, sigma, condition) - target).float().square().mean()
