"""The objective of VQ-Diffusion: a variational bound with importance-sampled times, plus an x_0 term.

Legend: as in :mod:`model.diffusion.vq_diffusion`.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.configs import ConditioningConfig
from model.diffusion.conditioning import training_condition
from model.diffusion.vq_diffusion import Transitions, sample_inverse_cdf, step_divergence
from model.step_random import StepRandom
from model.training.batch import Batch


class VQLosses(nn.Module):
    """Losses of the logits. They are a module of their own, so that they can be compiled into one GPU kernel."""

    def __init__(self, transitions: Transitions) -> None:
        """Use the forward process ``transitions``."""
        super().__init__()
        self.transitions = transitions

    def forward(self, logits: Tensor, clean: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_{t−1} and −log p_θ(x_0|x_t), each (B,) float32 nats per token.

        Args:
            logits: (B, n, K) of any float dtype.
            clean: (B, n) codes x_0.
            noisy: (B, n) codes x_t.
            t: (B,) times.
        """
        log_clean = logits.float().log_softmax(2)
        auxiliary = -log_clean.gather(2, clean[..., None]).mean((1, 2))
        return step_divergence(log_clean, clean, noisy, t, self.transitions), auxiliary


class MaskAndReplace(nn.Module):
    """The training objective: Σ_t L_{t−1}, estimated from one t per image, plus an x_0 term.

    t is sampled with probability p_t ∝ √E[L_t²] and its loss divided by p_t. This keeps the mean and lowers the
    variance (Nichol & Dhariwal 2102.09672, §3.3). Sampling is uniform until every t was sampled ``WARM`` times. The
    statistics are saved in the checkpoint. Only losses inside :meth:`collecting_losses` update them.

    Attributes:
        history: (T,) running mean of L_t².
        seen: (T,) number of losses at each t.
    """

    WARM = 10
    MEMORY = 0.9
    UNIFORM_SHARE = 0.01
    history: Tensor
    seen: Tensor

    def __init__(
        self, transitions: Transitions, conditioning: ConditioningConfig, *, auxiliary_weight: float = 5e-4
    ) -> None:
        """Configure the objective.

        Args:
            transitions: The forward process.
            conditioning: Probabilities of hiding and perturbing parts of the condition.
            auxiliary_weight: Weight of −log p_θ(x_0|x_t), which is added to the bound. Default: 5e-4.
        """
        super().__init__()
        self.transitions, self.conditioning, self.auxiliary_weight = transitions, conditioning, auxiliary_weight
        self.losses = VQLosses(transitions)
        self.register_buffer("history", torch.zeros(transitions.timesteps))
        self.register_buffer("seen", torch.zeros(transitions.timesteps))
        self._pending: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, network: nn.Module, batch: Batch, rng: StepRandom) -> Tensor:
        """Return the mean loss, a scalar float32: a bound on −log p(x_0) in nats per token, plus the x_0 term.

        Args:
            network: A ``CodeDenoiser``.
            batch: Its images are codes (B, n) int64 below K.
            rng: Source of all randomness, on the device of the batch.
        """
        condition = training_condition(batch.query, batch.neighbours, self.conditioning, rng)
        t, probability = self.sample_times(rng.uniform(len(batch.images)))
        noisy = self.transitions.corrupt(batch.images, t, rng.uniform(*batch.images.shape, 2))
        divergence, auxiliary = self.losses(network(noisy, t, condition), batch.images, noisy, t)
        if self._pending is not None:
            self._pending.append((t, divergence.detach()))
        loss: Tensor = (divergence + self.auxiliary_weight * auxiliary) / probability
        return loss.mean()

    @contextlib.contextmanager
    def collecting_losses(self) -> Iterator[None]:
        """Return a context for all pieces of a step: they share one history, which is updated once at the end."""
        pending: list[tuple[Tensor, Tensor]] = []
        self._pending = pending
        try:
            yield
        finally:
            self._pending = None
        times, divergences = zip(*pending, strict=True)
        self.update_history(torch.cat(times), torch.cat(divergences))

    def probabilities(self) -> Tensor:
        """Return p_t of t = 1 … T, (T,) float32."""
        uniform = torch.full_like(self.history, 1 / len(self.history))
        magnitude = self.history.sqrt() + 1e-10
        weighted = (1 - self.UNIFORM_SHARE) * magnitude / magnitude.sum() + self.UNIFORM_SHARE * uniform
        return torch.where((self.seen >= self.WARM).all(), weighted, uniform)

    def sample_times(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Sample times t (B,) int64 in 1 … T by inverse CDF of uniforms (B,); return them and their p_t (B,)."""
        probabilities = self.probabilities()
        index = sample_inverse_cdf(probabilities.expand(len(uniforms), -1), uniforms)
        return index + 1, probabilities[index]

    @torch.no_grad()
    def update_history(self, t: Tensor, divergence: Tensor) -> None:
        """Update the running E[L_t²] with losses (B,) at times t (B,), summed over all workers."""
        sums = torch.zeros(2, len(self.history), device=divergence.device)
        sums.index_add_(1, t - 1, torch.stack([torch.ones_like(divergence), divergence.square()]))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        count, squares = sums
        mean = squares / count.clamp(min=1)
        mixed = torch.where(self.seen > 0, self.MEMORY * self.history + (1 - self.MEMORY) * mean, mean)
        self.history.copy_(torch.where(count > 0, mixed, self.history))
        self.seen.add_(count)
