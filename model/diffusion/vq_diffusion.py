"""VQ-Diffusion (Gu et al. 2111.14822): codes are masked or replaced step by step, and a network learns the way back.

Legend: ``B`` batch, ``n`` tokens of a picture, ``K`` codes ([MASK] is code K), ``T E`` condition tokens and their
channels, ``x_0`` clean codes, ``x_t`` noisy ones, ``s < t`` two times (s = t − 1 in training, less when sampling
strides), ``α β γ`` the probabilities to stay, to turn into each one code, to turn into [MASK].

    q(x_t|x_s):  stay α, any code β each, [MASK] γ, α + K·β + γ = 1;  [MASK] stays [MASK]         (matrix Q)
    ᾱ_t = Π α,  γ̄_t = 1 − Π (1 − γ),  β̄_t = (1 − ᾱ_t − γ̄_t)/K                                       (eq. 8)
    q(x_s|x_t,x_0) = q(x_t|x_s)·q(x_s|x_0) / q(x_t|x_0)                                              (eq. 5)
    p_θ(x_s|x_t) = Σ_x̃ q(x_s|x_t,x̃)·p_θ(x̃|x_t),  the network giving p_θ(x̃|x_t) over clean codes     (eq. 11)

The matrices are never made: each has three different numbers, so every formula costs O(K) a token. The sum of eq. 11
with w(x̃) = p_θ(x̃|x_t)/q(x_t|x̃), W = Σ w is

    p_θ(x_s = j|x_t) = q(x_t|j)·(ᾱ_s·w(j) + β̄_s·W),    p_θ(x_s = [MASK]|x_t) = q(x_t|[MASK])·γ̄_s·W

and a certain p_θ turns it into eq. 5. All of it is in logarithms and float32.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.diffusion.conditioning import ConditioningConfig, null_condition, training_condition
from model.errors import ModelError
from model.step_random import Draw
from model.training.data import Batch

LOG_ZERO = -70.0
"""The logarithm of an impossible event: finite, so that no gradient is lost, and e⁻⁷⁰ vanishes beside anything."""

CodeDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(codes (B, n) int64 in 0 … K, t (B,) int64 in 1 … T, condition (B, T, E)) -> logits (B, n, K) of the clean codes."""


class Rates(NamedTuple):
    """α, β, γ between two times, each (B,) float64."""

    stay: Tensor
    replace: Tensor
    mask: Tensor


class Known(NamedTuple):
    """A picture that sampling starts from, and what of it is to stay.

    Attributes:
        codes: (B, n) int64 below K, its codes x_0.
        free: (B, n) bool, the tokens that are drawn anew; around them x_0 is shown at the noise of each step.
        first: the time 1 … T to start from, at x_t of q(x_t|x_0): T keeps nothing of the free ones.
        uniforms: (B, n, 2) in [0, 1), of that noise.
    """

    codes: Tensor
    free: Tensor
    first: int
    uniforms: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Transitions:
    """How fast codes are masked and replaced: ᾱ_t and γ̄_t run straight from t = 1 to t = T.

    The defaults are those of the paper's public code: nearly all noise is [MASK], a millionth is a wrong code.
    """

    codes: int = 1024
    timesteps: int = 100
    stay_first: float = 0.99999
    stay_last: float = 9e-6
    mask_first: float = 9e-6
    mask_last: float = 0.99999

    def __post_init__(self) -> None:
        """Refuse what is no process, or none that ends in [MASK] alone."""
        if self.codes < 2 or self.timesteps < 2:
            raise ValueError("codes and timesteps must be at least 2")
        if not 0.99 <= self.mask_last < 1:
            raise ValueError("mask_last must lie in [0.99, 1): sampling starts from [MASK] alone")
        if not (0 <= self.mask_first < self.mask_last and 0 < self.stay_last < self.stay_first < 1):
            raise ValueError("stay_first must lie above stay_last and mask_first below mask_last, all inside (0, 1)")
        steps = torch.arange(1, self.timesteps + 1)
        if min(self.cumulative(steps).replace.min(), self.between(steps - 1, steps).replace.min()) < -1e-12:
            raise ValueError("some step would replace with a negative probability; lower stay_first or mask_last")

    @property
    def mask(self) -> int:
        """The code that stands for [MASK]."""
        return self.codes

    def cumulative(self, t: Tensor) -> Rates:
        """ᾱ, β̄, γ̄ at times t (B,) int64 in 0 … T, where 0 is no noise at all (eq. 8)."""
        way = (t.double() - 1) / (self.timesteps - 1)
        stay = torch.where(t == 0, 1.0, self.stay_first + (self.stay_last - self.stay_first) * way)
        mask = torch.where(t == 0, 0.0, self.mask_first + (self.mask_last - self.mask_first) * way)
        return Rates(stay, (1 - stay - mask) / self.codes, mask)

    def between(self, s: Tensor, t: Tensor) -> Rates:
        """α, β, γ of all steps from s to t together, 0 ≤ s < t ≤ T, both (B,): eq. 8 divided by itself."""
        earlier, later = self.cumulative(s), self.cumulative(t)
        stay, unmasked = later.stay / earlier.stay, (1 - later.mask) / (1 - earlier.mask)
        return Rates(stay, (unmasked - stay) / self.codes, 1 - unmasked)

    def corrupt(self, codes: Tensor, t: Tensor, uniforms: Tensor) -> Tensor:
        """Draw x_t from q(x_t|x_0) (eq. 8): codes (B, n) int64, t (B,), uniforms (B, n, 2) in [0, 1)."""
        rates = self.cumulative(t)
        mask, replace = rates.mask[:, None], self.codes * rates.replace[:, None]
        chance, choice = uniforms.double().unbind(2)
        noisy = torch.where(chance < mask + replace, (choice * self.codes).long(), codes)
        return torch.where(chance < mask, self.mask, noisy)


def log_likelihood(noisy: Tensor, rates: Rates, codes: int) -> Tensor:
    """What each class j = 0 … K makes of the codes seen, log q(x_t = noisy | x_s = j): its rows in the matrix Q.

    Of noisy (B, n) int64, rates from s to t and K codes: (B, n, K + 1) float32.
    """
    masked = noisy == codes
    other = torch.where(masked, _log(rates.mask), _log(rates.replace))[..., None]
    same = torch.where(masked, 0.0, _log(rates.stay + rates.replace))[..., None]
    from_mask = torch.where(masked, 0.0, LOG_ZERO)[..., None]
    classes = torch.arange(codes + 1, device=noisy.device)
    return torch.where(classes == noisy[..., None], same, torch.where(classes == codes, from_mask, other))


def log_reverse(log_clean: Tensor, noisy: Tensor, s: Tensor, t: Tensor, transitions: Transitions) -> Tensor:
    """One step back or a stride of them, log p_θ(x_s|x_t): eq. 11 with eq. 5 inside, summed in closed form.

    Of log_clean (B, n, K), log p_θ(x_0|x_t), codes x_t (B, n), times 0 ≤ s < t ≤ T (B,): (B, n, K + 1) float32,
    normalised. A ``log_one_hot`` for log_clean gives the posterior itself, eq. 5.
    """
    earlier = transitions.cumulative(s)
    weight = log_clean - log_likelihood(noisy, transitions.cumulative(t), transitions.codes)[..., :-1]
    total = weight.logsumexp(2, keepdim=True)
    stayed, replaced, mask = (_log(rate)[..., None] for rate in earlier)
    before = torch.cat([torch.logaddexp(stayed + weight, replaced + total), mask + total], dim=2)
    return before + log_likelihood(noisy, transitions.between(s, t), transitions.codes)


def log_one_hot(codes: Tensor, classes: int) -> Tensor:
    """The logarithm (B, n, classes) float32 of certainty in codes (B, n) int64."""
    return torch.where(torch.arange(classes, device=codes.device) == codes[..., None], 0.0, LOG_ZERO)


def step_divergence(log_clean: Tensor, clean: Tensor, noisy: Tensor, t: Tensor, transitions: Transitions) -> Tensor:
    """L_{t−1} = KL(q(x_{t−1}|x_t,x_0) ‖ p_θ(x_{t−1}|x_t)), which at t = 1 is L_0 = −log p_θ(x_0|x_1).

    Of log_clean (B, n, K), log p_θ(x_0|x_t), codes clean x_0 and noisy x_t (B, n), t (B,): (B,) nats per token.
    """
    with torch.no_grad():
        certain = log_one_hot(clean, transitions.codes)
        target = log_reverse(certain, noisy, t - 1, t, transitions)
    predicted = log_reverse(log_clean, noisy, t - 1, t, transitions)
    return F.kl_div(predicted, target, reduction="none", log_target=True).sum(2).mean(1)


class CodeLosses(nn.Module):
    """What the objective takes from the logits, as a module of its own, so that a GPU computes it in one pass."""

    def __init__(self, transitions: Transitions) -> None:
        """Of the process ``transitions``."""
        super().__init__()
        self.transitions = transitions

    def forward(self, logits: Tensor, clean: Tensor, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """L_{t−1} and −log p_θ(x_0|x_t), each (B,) float32 nats per token.

        Of logits (B, n, K) of any float dtype, codes clean x_0 and noisy x_t (B, n), t (B,).
        """
        log_clean = logits.float().log_softmax(2)
        auxiliary = -log_clean.gather(2, clean[..., None]).mean((1, 2))
        return step_divergence(log_clean, clean, noisy, t, self.transitions), auxiliary


class MaskAndReplace(nn.Module):
    """The training objective: Σ_t L_{t−1} from one t per picture, drawn where the loss is large, and an x_0 term.

    t is drawn with a probability p_t ∝ √E[L_t²] and its loss divided by p_t, which leaves the mean as it is and
    lowers the variance (Nichol & Dhariwal 2102.09672, §3.3); uniformly until each t was seen ``WARM`` times. The
    statistics are buffers, so that a resumed run goes on with them; they are of what :meth:`one_step` surrounds.
    """

    WARM = 10
    MEMORY = 0.9
    UNIFORM_SHARE = 0.01
    history: Tensor
    seen: Tensor

    def __init__(
        self, transitions: Transitions, conditioning: ConditioningConfig, *, auxiliary_weight: float = 5e-4
    ) -> None:
        """Train for ``transitions``; ``auxiliary_weight`` is that of −log p_θ(x_0|x_t) beside the bound."""
        super().__init__()
        self.transitions, self.conditioning, self.auxiliary_weight = transitions, conditioning, auxiliary_weight
        self.losses = CodeLosses(transitions)
        self.register_buffer("history", torch.zeros(transitions.timesteps))
        self.register_buffer("seen", torch.zeros(transitions.timesteps))
        self._told: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, network: nn.Module, batch: Batch, draw: Draw) -> Tensor:
        """The mean loss, a scalar float32: a bound on −log p(x_0) in nats per token, plus the x_0 term.

        ``network`` is a ``CodeDenoiser``; the batch's images are codes (B, n) int64 below K; all is on one device.
        """
        condition = training_condition(batch.query, batch.neighbours, self.conditioning, draw)
        t, probability = self.draw_times(draw.uniform(len(batch.images)))
        noisy = self.transitions.corrupt(batch.images, t, draw.uniform(*batch.images.shape, 2))
        divergence, auxiliary = self.losses(network(noisy, t, condition), batch.images, noisy, t)
        if self._told is not None:
            self._told.append((t, divergence.detach()))
        loss: Tensor = (divergence + self.auxiliary_weight * auxiliary) / probability
        return loss.mean()

    @contextlib.contextmanager
    def one_step(self) -> Iterator[None]:
        """Around a step's calls: all draw t by one history, which takes in what they told once they are done."""
        told: list[tuple[Tensor, Tensor]] = []
        self._told = told
        try:
            yield
        finally:
            self._told = None
        times, divergences = zip(*told, strict=True)
        self.remember(torch.cat(times), torch.cat(divergences))

    def probabilities(self) -> Tensor:
        """The p_t of t = 1 … T, (T,) float32."""
        uniform = torch.full_like(self.history, 1 / len(self.history))
        size = self.history.sqrt() + 1e-10
        important = (1 - self.UNIFORM_SHARE) * size / size.sum() + self.UNIFORM_SHARE * uniform
        return torch.where((self.seen >= self.WARM).all(), important, uniform)

    def draw_times(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Times t (B,) int64 in 1 … T by inverse CDF of uniforms (B,), and their p_t (B,)."""
        probabilities = self.probabilities()
        index = _inverse_cdf(probabilities.expand(len(uniforms), -1), uniforms)
        return index + 1, probabilities[index]

    @torch.no_grad()
    def remember(self, t: Tensor, divergence: Tensor) -> None:
        """Take the losses (B,) of times t (B,) into the running E[L_t²]; workers share theirs."""
        fresh = torch.zeros(2, len(self.history), device=divergence.device)
        fresh.index_add_(1, t - 1, torch.stack([torch.ones_like(divergence), divergence.square()]))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(fresh)
        count, squares = fresh
        mean = squares / count.clamp(min=1)
        mixed = torch.where(self.seen > 0, self.MEMORY * self.history + (1 - self.MEMORY) * mean, mean)
        self.history.copy_(torch.where(count > 0, mixed, self.history))
        self.seen.add_(count)


def truncate(log_clean: Tensor, mass: float) -> Tensor:
    """Keep the likeliest codes (B, n, K) that together reach ``mass`` and renormalise; 1 keeps all."""
    if mass >= 1:
        return log_clean
    ordered, order = log_clean.sort(2, descending=True)
    likely = ordered.exp()
    needed = likely.cumsum(2) - likely < mass
    kept = needed.scatter(2, order, needed)
    return log_clean.masked_fill(~kept, LOG_ZERO).log_softmax(2)


@torch.no_grad()
def sample_codes(
    network: CodeDenoiser,
    condition: Tensor,
    uniforms: Tensor,
    *,
    transitions: Transitions,
    guidance_scale: float = 1.0,
    truncation: float = 0.86,
    negative: Tensor | None = None,
    known: Known | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Codes from [MASK] alone, in as many strides as there are uniforms (the x_0 reparameterisation makes strides).

    A picture's randomness is its own row of ``uniforms``: whoever shares its batch changes nothing.

    Args:
        network: the denoiser of codes.
        condition: (B, T, E) tokens.
        uniforms: (B, steps, n) in [0, 1), with steps ≤ T.
        transitions: the process that the network was trained for.
        guidance_scale: 1 is the conditional model itself; anything else costs a call of twice the batch.
        truncation: the probability mass kept of every token; 1 keeps all.
        negative: (B, T, E) tokens to be guided away from, in place of the null condition.
        known: codes to start from or to keep some of, in place of [MASK] alone.
        callback: told the number of each step (0 …) and its codes (B, n).

    Returns:
        (B, n) int64 codes below K.

    Raises:
        ModelError: no step or more than the process has, or the network answers with no finite numbers.
    """
    batch, steps, tokens = uniforms.shape
    first = transitions.timesteps if known is None else known.first
    if not 1 <= steps <= first:
        raise ModelError(f"{steps} steps asked of a process of {first}; ask for 1 to that many")

    def times(left: int) -> Tensor:
        return torch.full((batch,), round(first * left / steps), device=uniforms.device)

    if known is None:
        codes = torch.full((batch, tokens), transitions.mask, device=uniforms.device)
    else:
        codes = transitions.corrupt(known.codes, times(steps), known.uniforms)
    denoise = _guided(network, condition, negative, guidance_scale)
    for step in range(steps):
        t, s = times(steps - step), times(steps - step - 1)
        answer = denoise(codes, t)
        log_clean = truncate(answer, truncation)
        codes = _inverse_cdf(log_reverse(log_clean, codes, s, t, transitions).exp(), uniforms[:, step])
        if known is not None:
            codes = torch.where(known.free, codes, transitions.corrupt(known.codes, s, known.uniforms))
        if callback is not None:
            callback(step, codes)
    if answer.isnan().any():  # asked once, for a GPU waits for it; what is sampled of no numbers looks like codes
        raise ModelError(
            "the network answers with no finite numbers: the weights are broken; train again, or pull them anew"
        )
    return codes


def guide(log_conditional: Tensor, log_unconditional: Tensor, scale: float) -> Tensor:
    """Push log-probabilities (B, n, K), log p∅ + scale·(log p_c − log p∅), and renormalise (2207.12598, eq. 6)."""
    return torch.lerp(log_unconditional, log_conditional, scale).log_softmax(2)


def _guided(
    network: CodeDenoiser, condition: Tensor, negative: Tensor | None, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """(codes (B, n), t (B,)) -> guided log p_θ(x_0|x_t) (B, n, K)."""
    if scale == 1:
        return lambda codes, t: network(codes, t, condition).float().log_softmax(2)
    both = torch.cat([condition, null_condition(condition) if negative is None else negative])

    def call(codes: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = network(codes.repeat(2, 1), t.repeat(2), both).float().log_softmax(2).chunk(2)
        return guide(conditional, unconditional, scale)

    return call


def _inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The class (…) that each uniform (…) in [0, 1) falls into, of probabilities (…, classes)."""
    edges = probabilities.double().cumsum(-1)
    found = torch.searchsorted(edges, uniforms.double()[..., None] * edges[..., -1:], right=True).squeeze(-1)
    return found.clamp(max=probabilities.shape[-1] - 1)  # of no numbers it finds none


def _log(rate: Tensor) -> Tensor:
    """The logarithm of a rate (B,) as (B, 1) float32, no less than ``LOG_ZERO``."""
    return rate.clamp(min=math.exp(LOG_ZERO)).log().float()[:, None]
