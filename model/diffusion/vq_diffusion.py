"""VQ-Diffusion (Gu et al. 2111.14822): codes are masked or replaced step by step, and a network reverses the process.

Legend: ``B`` batch, ``n`` tokens of an image, ``K`` codes ([MASK] is code K), ``T E`` condition tokens and their
channels, ``x_0`` clean codes, ``x_t`` noisy ones, ``s < t`` two times (s = t − 1 in training, smaller when sampling
in strides), ``α β γ`` the probabilities to keep a code, to replace it by one given code, to replace it by [MASK].

    q(x_t|x_s):  keep α, each code β, [MASK] γ, α + K·β + γ = 1;  [MASK] stays [MASK]               (matrix Q)
    ᾱ_t = Π α,  γ̄_t = 1 − Π (1 − γ),  β̄_t = (1 − ᾱ_t − γ̄_t)/K                                       (eq. 8)
    q(x_s|x_t,x_0) = q(x_t|x_s)·q(x_s|x_0) / q(x_t|x_0)                                              (eq. 5)
    p_θ(x_s|x_t) = Σ_x̃ q(x_s|x_t,x̃)·p_θ(x̃|x_t),  the network giving p_θ(x̃|x_t) over clean codes     (eq. 11)

The matrices are never built: each has only three distinct entries, so every formula costs O(K) per token. With
w(x̃) = p_θ(x̃|x_t)/q(x_t|x̃) and W = Σ w, eq. 11 becomes

    p_θ(x_s = j|x_t) = q(x_t|j)·(ᾱ_s·w(j) + β̄_s·W),    p_θ(x_s = [MASK]|x_t) = q(x_t|[MASK])·γ̄_s·W

For a one-hot p_θ this is eq. 5. Everything is computed in logarithms and float32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.diffusion.conditioning import null_condition
from model.diffusion.unmasking import masked_share, unmask_surest
from model.errors import ModelError

LOG_ZERO = -70.0
"""Logarithm of an impossible event: finite, so that gradients stay finite; e⁻⁷⁰ is negligible in every sum."""

_MASKED = 0.99  # least share of [MASK] at T for a start from [MASK] only

Order = Literal["random", "surest"]
"""Order in which sampling unmasks tokens."""
CodeDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(codes (B, n) int64 in 0 … K, t (B,) int64 in 1 … T, condition (B, T, E)) -> logits (B, n, K) of the clean codes."""


class Rates(NamedTuple):
    """α, β, γ between two times, each (B,) float64."""

    stay: Tensor
    replace: Tensor
    mask: Tensor


class KnownCodes(NamedTuple):
    """Codes of an image to start sampling from, and which of them to keep.

    Attributes:
        codes: (B, n) int64 below K, the clean codes x_0.
        free: (B, n) bool, the tokens to regenerate. The others follow q(x_t|x_0) at the time of each step.
        first: Start time 1 … T: sampling starts from q(x_t|x_0) at t = ``first``. At T all free tokens are [MASK].
        uniforms: (B, n, 2) in [0, 1), the randomness of q(x_t|x_0).
    """

    codes: Tensor
    free: Tensor
    first: int
    uniforms: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Transitions:
    """Schedule of masking and replacing codes: ᾱ_t and γ̄_t are linear from t = 1 to t = T.

    The defaults are those of the paper's public code: nearly all noise is [MASK], one in a million tokens is replaced.
    A code that sampling has unmasked is then never revised. The paper's own schedule replaces a tenth of the tokens
    (``mask_last`` 0.9).
    """

    codes: int = 1024
    timesteps: int = 100
    stay_first: float = 0.99999
    stay_last: float = 9e-6
    mask_first: float = 9e-6
    mask_last: float = 0.99999

    def __post_init__(self) -> None:
        """Raise ``ModelError`` unless all probabilities are valid."""
        if self.codes < 2 or self.timesteps < 2:
            raise ModelError(f"codes or timesteps is below 2: {self.codes}, {self.timesteps}; give at least 2 of each")
        if not 0 < self.mask_last < 1:
            raise ModelError(f"mask_last is out of range: {self.mask_last}; give a value in (0, 1)")
        if not (0 <= self.mask_first < self.mask_last and 0 < self.stay_last < self.stay_first < 1):
            raise ModelError(
                "stay_first, stay_last, mask_first or mask_last is out of range: "
                f"{self.stay_first}, {self.stay_last}, {self.mask_first}, {self.mask_last}; "
                "give values in (0, 1) that fall for stay and rise for mask"
            )
        steps = torch.arange(1, self.timesteps + 1)
        replace = min(self.cumulative(steps).replace.min(), self.between(steps - 1, steps).replace.min())
        if replace < -1e-12:
            raise ModelError(
                f"the probability of replacement is negative: {float(replace):.3g}; lower stay_first or mask_last"
            )

    @property
    def mask(self) -> int:
        """The code of [MASK]."""
        return self.codes

    def cumulative(self, t: Tensor) -> Rates:
        """Return ᾱ, β̄, γ̄ at times t (B,) int64 in 0 … T, where 0 is no noise (eq. 8)."""
        share = (t.double() - 1) / (self.timesteps - 1)
        stay = torch.where(t == 0, 1.0, self.stay_first + (self.stay_last - self.stay_first) * share)
        mask = torch.where(t == 0, 0.0, self.mask_first + (self.mask_last - self.mask_first) * share)
        return Rates(stay, (1 - stay - mask) / self.codes, mask)

    def between(self, s: Tensor, t: Tensor) -> Rates:
        """Return α, β, γ of all steps from s to t combined, 0 ≤ s < t ≤ T, both (B,): a ratio of eq. 8."""
        earlier, later = self.cumulative(s), self.cumulative(t)
        stay, unmasked = later.stay / earlier.stay, (1 - later.mask) / (1 - earlier.mask)
        return Rates(stay, (unmasked - stay) / self.codes, 1 - unmasked)

    def starts_masked(self) -> bool:
        """Return True if the process ends in [MASK] so nearly only that sampling may start from [MASK] only."""
        return self.mask_last >= _MASKED

    def prior(self, uniforms: Tensor) -> Tensor:
        """Sample x_T (B, n), [MASK] or any code, from uniforms (B, n, 2) in [0, 1)."""
        random = (uniforms[..., 1].double() * self.codes).long()
        return torch.where(uniforms[..., 0] < self.mask_last / (1 - self.stay_last), self.mask, random)

    def corrupt(self, codes: Tensor, t: Tensor, uniforms: Tensor) -> Tensor:
        """Sample x_t from q(x_t|x_0) (eq. 8): codes (B, n) int64, t (B,), uniforms (B, n, 2) in [0, 1)."""
        rates = self.cumulative(t)
        mask, replace = rates.mask[:, None], self.codes * rates.replace[:, None]
        chance, choice = uniforms.double().unbind(2)
        noisy = torch.where(chance < mask + replace, (choice * self.codes).long(), codes)
        return torch.where(chance < mask, self.mask, noisy)


def log_likelihood(noisy: Tensor, rates: Rates, codes: int) -> Tensor:
    """Return log q(x_t = noisy | x_s = j) of each class j = 0 … K, a row of the matrix Q: (B, n, K + 1) float32.

    Args:
        noisy: (B, n) int64 codes x_t.
        rates: Rates from s to t.
        codes: K.
    """
    masked = noisy == codes
    other = torch.where(masked, _log(rates.mask), _log(rates.replace))[..., None]
    same = torch.where(masked, 0.0, _log(rates.stay + rates.replace))[..., None]
    from_mask = torch.where(masked, 0.0, LOG_ZERO)[..., None]
    classes = torch.arange(codes + 1, device=noisy.device)
    return torch.where(classes == noisy[..., None], same, torch.where(classes == codes, from_mask, other))


def log_reverse(log_clean: Tensor, noisy: Tensor, s: Tensor, t: Tensor, transitions: Transitions) -> Tensor:
    """Return log p_θ(x_s|x_t) of one reverse step or stride: eq. 11 with eq. 5 inside, summed in closed form.

    Args:
        log_clean: (B, n, K) log p_θ(x_0|x_t). A ``log_one_hot`` gives the posterior itself, eq. 5.
        noisy: (B, n) codes x_t.
        s: (B,) earlier times, 0 ≤ s < t.
        t: (B,) times, at most T.
        transitions: The forward process.

    Returns:
        (B, n, K + 1) float32, normalised.
    """
    earlier = transitions.cumulative(s)
    weight = log_clean - log_likelihood(noisy, transitions.cumulative(t), transitions.codes)[..., :-1]
    total = weight.logsumexp(2, keepdim=True)
    stayed, replaced, mask = (_log(rate)[..., None] for rate in earlier)
    before = torch.cat([torch.logaddexp(stayed + weight, replaced + total), mask + total], dim=2)
    return before + log_likelihood(noisy, transitions.between(s, t), transitions.codes)


def log_one_hot(codes: Tensor, classes: int) -> Tensor:
    """Return one-hot log-probabilities (B, n, classes) float32 of codes (B, n) int64."""
    return torch.where(torch.arange(classes, device=codes.device) == codes[..., None], 0.0, LOG_ZERO)


def step_divergence(log_clean: Tensor, clean: Tensor, noisy: Tensor, t: Tensor, transitions: Transitions) -> Tensor:
    """Return L_{t−1} = KL(q(x_{t−1}|x_t,x_0) ‖ p_θ(x_{t−1}|x_t)), which at t = 1 is L_0 = −log p_θ(x_0|x_1).

    Args:
        log_clean: (B, n, K) log p_θ(x_0|x_t).
        clean: (B, n) codes x_0.
        noisy: (B, n) codes x_t.
        t: (B,) times.
        transitions: The forward process.

    Returns:
        (B,) nats per token.
    """
    with torch.no_grad():
        target = log_reverse(log_one_hot(clean, transitions.codes), noisy, t - 1, t, transitions)
    predicted = log_reverse(log_clean, noisy, t - 1, t, transitions)
    return F.kl_div(predicted, target, reduction="none", log_target=True).sum(2).mean(1)


def truncate_probabilities(log_clean: Tensor, mass: float) -> Tensor:
    """Keep the smallest set of most likely codes whose probabilities reach ``mass``, and renormalise (top-p).

    ``log_clean`` are log-probabilities (B, n, K). A ``mass`` of 1 keeps all codes.
    """
    if mass >= 1:
        return log_clean
    ordered, order = log_clean.sort(2, descending=True)
    probabilities = ordered.exp()
    in_order = probabilities.cumsum(2) - probabilities < mass
    kept = in_order.scatter(2, order, in_order)
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
    known: KnownCodes | None = None,
    prior: Tensor | None = None,
    order: Order = "random",
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample codes, from [MASK] or from the prior: one stride for each step of ``uniforms`` (x_0 reparameterisation).

    Each image has its own row of ``uniforms``, so it does not depend on its batch.

    Args:
        network: The denoiser of codes.
        condition: (B, T, E) tokens.
        uniforms: (B, steps, n) in [0, 1), with steps ≤ T.
        transitions: The process that the network was trained for.
        guidance_scale: 1 is the conditional model itself; other values double the batch of each call. Default: 1.
        truncation: Probability mass kept per token; 1 keeps all. Default: 0.86.
        negative: (B, T, E) tokens to push away from. Default: the null condition.
        known: Codes to start from or to keep in part. Default: none.
        prior: (B, n, 2) in [0, 1), the randomness of x_T. Default: start from [MASK] only.
        order: Order in which masked tokens are unmasked: "random", as in the process, or "surest" first, which starts
            from [MASK] only. Default: "random".
        on_step: Called with the number of each finished step, from 1.

    Returns:
        (B, n) int64 codes below K.

    Raises:
        ModelError: The number of steps is out of range, the process needs a prior, or the network's output is NaN.
    """
    batch, steps, tokens = uniforms.shape
    first = transitions.timesteps if known is None else known.first
    if not 1 <= steps <= first:
        raise ModelError(f"the number of steps is out of range: {steps}; give 1 to {first}")

    if order == "surest" and (known is not None or prior is not None):
        raise ModelError("the order 'surest' starts from [MASK] only; use 'random' with known codes or a prior")

    def times(left: int) -> Tensor:
        return torch.full((batch,), round(first * left / steps), device=uniforms.device)

    if known is not None:
        codes = transitions.corrupt(known.codes, times(steps), known.uniforms)
    elif prior is not None:
        codes = transitions.prior(prior)
    elif transitions.starts_masked():
        codes = torch.full((batch, tokens), transitions.mask, device=uniforms.device)
    else:
        raise ModelError(f"mask_last is below {_MASKED}: {transitions.mask_last}; pass the uniform numbers of a prior")
    denoise = _guided_log_clean(network, condition, negative, guidance_scale)
    for step in range(steps):
        t, s = times(steps - step), times(steps - step - 1)
        if order == "surest":
            t = torch.full_like(t, max(1, round(first * masked_share(step, steps))))
        guided = denoise(codes, t)
        log_clean = truncate_probabilities(guided, truncation)
        if order == "surest":
            chosen = sample_inverse_cdf(log_clean.exp(), uniforms[:, step])
            codes = unmask_surest(
                log_clean, chosen, codes, uniforms[:, step], step=step, steps=steps, mask=transitions.mask
            )
        else:
            codes = sample_inverse_cdf(log_reverse(log_clean, codes, s, t, transitions).exp(), uniforms[:, step])
        if known is not None:
            codes = torch.where(known.free, codes, transitions.corrupt(known.codes, s, known.uniforms))
        if on_step is not None:
            on_step(step + 1)
    # Samples of NaN probabilities look like valid codes. Checked once, because the check synchronises with a GPU.
    if guided.isnan().any():
        raise ModelError(
            "sampling produced NaN or infinite values: the weights are corrupt; retrain or download the generator again"
        )
    return codes


def apply_guidance(log_conditional: Tensor, log_unconditional: Tensor, scale: float) -> Tensor:
    """Guide log-probabilities (B, n, K): log p∅ + scale·(log p_c − log p∅), and renormalise (2207.12598, eq. 6)."""
    return torch.lerp(log_unconditional, log_conditional, scale).log_softmax(2)


def _guided_log_clean(
    network: CodeDenoiser, condition: Tensor, negative: Tensor | None, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (codes (B, n), t (B,)) -> guided log p_θ(x_0|x_t) (B, n, K)."""
    if scale == 1:
        return lambda codes, t: network(codes, t, condition).float().log_softmax(2)
    both = torch.cat([condition, null_condition(condition) if negative is None else negative])

    def call(codes: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = network(codes.repeat(2, 1), t.repeat(2), both).float().log_softmax(2).chunk(2)
        return apply_guidance(conditional, unconditional, scale)

    return call


def sample_inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return the class (…) that each uniform (…) in [0, 1) selects from probabilities (…, classes)."""
    edges = probabilities.double().cumsum(-1)
    found = torch.searchsorted(edges, uniforms.double()[..., None] * edges[..., -1:], right=True).squeeze(-1)
    return found.clamp(max=probabilities.shape[-1] - 1)  # NaN probabilities would select a class out of range


def _log(rate: Tensor) -> Tensor:
    """Return the logarithm of a rate (B,) as (B, 1) float32, at least ``LOG_ZERO``."""
    return rate.clamp(min=math.exp(LOG_ZERO)).log().float()[:, None]
