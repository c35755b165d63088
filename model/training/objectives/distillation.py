"""The objective of few steps: learn the mean velocity of a guided teacher between the levels of a fixed grid.

Legend: ``B`` batch, ``C S S`` image or latent, ``T`` condition tokens, ``E`` their channels.

    v̄ = Σ_j v̂_guided(x_j, σ_j) / m,   x_(j+1) = x_j − (σ − τ)/m · v̂_guided(x_j, σ_j)      m sub-steps from σ to τ
    L = mean over the levels of E ‖u(x_σ, σ) − v̄‖²

The student u has the teacher's network and starts from its weights. One step of it replaces m sub-steps of the teacher
(progressive distillation, Salimans & Ho 2202.00512, section 3). Guidance is part of the target, so the student needs
none (Meng et al. 2210.03142, section 3). The grid is in :mod:`model.diffusion.few_steps`.

x follows the teacher from pure noise through all levels, as in sampling: guided samples leave the path of noised
images. A share of the samples restarts in every interval from a noised image at a random level, so that the student
also works from images with noise (phased consistency, Wang et al. 2405.18407, has the same targets inside an interval).
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.configs import ConditioningConfig, Prediction
from model.diffusion.conditioning import append_image_tokens, null_condition, sample_condition
from model.diffusion.few_steps import check_levels, intervals
from model.diffusion.flow_matching import add_noise
from model.diffusion.guidance import FULL_INTERVAL
from model.networks.denoiser import Network
from model.networks.editor import generating
from model.networks.image_tokens import ShownImages, hide_images, takes_images
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.shown_images import shown_images

SUBSTEPS = 6
"""Steps of the teacher for one of the student."""
RESTARTS = 0.25
"""Share of the samples that restart in every interval."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A guided network. Its weights do not change, and are not part of a checkpoint.

    Attributes:
        network: The network, in evaluation mode on the training device.
        prediction: Its output.
        guidance_scale: 1 is the network itself.
        guidance_interval: Noise levels σ at which guidance acts.
        guide: Weaker network to guide by; None for the network itself.
    """

    network: Network
    prediction: Prediction = "velocity"
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = FULL_INTERVAL
    guide: Network | None = None

    @torch.no_grad()
    def tokens(self, tokens: Tensor, shown: ShownImages | None) -> Tensor:
        """Return tokens (B, T, E) with those of the shown images, which are thus encoded once."""
        if shown is None or not takes_images(self.network):
            return tokens
        return append_image_tokens(tokens, self.network.encode_images(shown.pixels, shown.shown))

    def velocity(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Return guided velocities (B, C, S, S). Unlike in sampling, the noise levels (B,) may differ."""
        conditional = generating(self.network, self.prediction)(noisy, sigma, tokens)
        if self.guidance_scale == 1:
            return conditional
        weaker = generating(self.guide or self.network, self.prediction)
        hidden = null_condition(tokens)
        unconditional = weaker(noisy, sigma, hidden if self.guide is None else hide_images(self.network, hidden))
        first, last = self.guidance_interval
        scale = torch.where((first <= sigma) & (sigma <= last), self.guidance_scale, 1.0)
        return unconditional + scale[:, None, None, None] * (conditional - unconditional)

    @torch.no_grad()
    def mean_velocity(self, noisy: Tensor, sigma: Tensor, lower: float, tokens: Tensor, substeps: int) -> Tensor:
        """Return the mean velocity (B, C, S, S) from noise levels (B,) down to ``lower``, in Euler sub-steps."""
        length = (sigma - lower) / substeps
        velocities, point = [], noisy
        for number in range(substeps):
            velocities.append(self.velocity(point, sigma - number * length, tokens))
            point = point - length[:, None, None, None] * velocities[-1]
        return torch.stack(velocities).mean(0)


class Distillation(nn.Module):
    """The loss of a student against the mean velocity of a teacher. An editor gets no reference: it generates.

    The loss keeps a graph of the student for each level. As many ``pieces`` as levels in the training's config limit
    the memory to that of flow matching with the whole batch.
    """

    def __init__(
        self,
        conditioning: ConditioningConfig,
        teacher: Teacher,
        levels: Sequence[float],
        *,
        substeps: int = SUBSTEPS,
        restarts: float = RESTARTS,
    ) -> None:
        """Configure the objective.

        Args:
            conditioning: Probabilities of hiding and perturbing parts of the condition.
            teacher: The guided network to learn from.
            levels: The grid of noise levels, as of :func:`model.diffusion.few_steps.few_step_levels`.
            substeps: Steps of the teacher for one of the student.
            restarts: Share of the samples that restart in every interval from a noised image.

        Raises:
            ModelError: ``levels`` is not a grid.
        """
        super().__init__()
        check_levels(levels)
        self.conditioning, self.teacher, self.levels = conditioning, teacher, tuple(levels)
        self.substeps, self.restarts = substeps, restarts

    def forward(self, network: nn.Module, batch: Batch, rng: StepRandom) -> Tensor:
        """Return the mean loss of ``batch``, a scalar float32."""
        condition = sample_condition(batch.query, batch.neighbours, self.conditioning, rng)
        shown = shown_images(network, batch, condition, self.conditioning, rng)
        tokens = self.teacher.tokens(condition.tokens, shown)
        student = generating(network, self.teacher.prediction, shown)
        images, count = batch.images, len(batch.images)
        noisy, losses = rng.normal(*images.shape), []
        for start, lower in intervals(self.levels):
            restarted, share = rng.uniform(count) < self.restarts, rng.uniform(count)
            sigma = torch.where(restarted, lower + (start - lower) * share, start)
            noised = add_noise(images, rng.normal(*images.shape), sigma)
            noisy = torch.where(restarted[:, None, None, None], noised, noisy)
            target = self.teacher.mean_velocity(noisy, sigma, lower, tokens, self.substeps)
            losses.append((student(noisy, sigma, condition.tokens) - target).square().mean())
            noisy = noisy + (lower - sigma)[:, None, None, None] * target
        return torch.stack(losses).mean()
