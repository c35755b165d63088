"""The objective of the VQ autoencoder: reconstruction, commitment, and restarts of dead codes.

Legend: ``B`` batch, ``S`` side of an image, ``n`` tokens of an image, ``K`` codes, ``w`` their width.

Quantization starts once the autoencoder can reconstruct without it, because codes that are trained on meaningless
latents represent outlines and ignore colours. A code that is nearest to no latent gets no gradient and remains dead.
Dead codes are therefore moved onto latents: first all of them, later those that were idle for ``patience`` steps
(random restart, Jukebox 2005.00341, §3.1). Latents far from any code are preferred, as in k-means++ (Arthur &
Vassilvitskii 2007).
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import ModelError
from model.step_random import StepRandom
from model.training.batch import Batch


def reconstruction_loss(output: Tensor, images: Tensor, *, edge_weight: float, scales: int) -> Tensor:
    """Return the mean absolute error of pixels and of their differences to the next pixel, at several resolutions.

    Args:
        output: (B, 3, S, S).
        images: (B, 3, S, S) in [−1, 1].
        edge_weight: Weight of the differences, which keep outlines sharp.
        scales: Number of resolutions. The first is S; each further one is half of the one before.

    Returns:
        A scalar float32.
    """
    error = (output - images).float()
    losses = []
    for scale in range(scales):
        error = F.avg_pool2d(error, 2) if scale else error
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        losses.append(error.abs().mean() + edge_weight * edges)
    return torch.stack(losses).mean()


class AutoencoderObjective(nn.Module):
    """The training objective: reconstruction, commitment, and a codebook without dead codes.

    Restarts end after ``restart_steps``, well before the end of training, so that the averaged weights contain no code
    that still moves. The buffers are saved in the checkpoint. Each piece of a step counts as a call.

    Attributes:
        idle: (K,) int64, the number of calls since each code was last used.
        taken: () int64, the number of calls.
    """

    idle: Tensor
    taken: Tensor

    def __init__(
        self,
        codes: int,
        *,
        commitment_weight: float = 0.25,
        edge_weight: float = 1.0,
        scales: int = 3,
        patience: int = 20,
        restart_steps: int = 1000,
        warm_steps: int = 0,
    ) -> None:
        """Configure the objective.

        Args:
            codes: Size of the codebook.
            commitment_weight: Weight of the commitment loss. Default: 0.25.
            edge_weight: Weight of pixel differences in the reconstruction loss. Default: 1.
            scales: Resolutions of the reconstruction loss. Default: 3.
            patience: Restart codes that were idle for this many steps. Default: 20.
            restart_steps: Stop restarting codes after this many steps. Default: 1000.
            warm_steps: Steps at the start in which the decoder sees unquantized latents. Default: 0.
        """
        super().__init__()
        if patience < 1:
            raise ModelError(f"patience is below 1: {patience}; give at least 1, the step that a new code needs")
        self.commitment_weight, self.edge_weight, self.scales = commitment_weight, edge_weight, scales
        self.patience, self.restart_steps, self.warm_steps = patience, restart_steps, warm_steps
        self.register_buffer("idle", torch.full((codes,), patience))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def forward(self, network: nn.Module, batch: Batch, rng: StepRandom) -> Tensor:
        """Return the loss, a scalar float32.

        Hooks run on the quantizer, so it cannot be compiled.

        Args:
            network: A ``VQModel``, or a wrapper that holds one as ``module``.
            batch: Its images are (B, 3, S, S) in [−1, 1].
            rng: Source of the positions of restarted codes, on the device of the batch.
        """
        quantizer: Any = getattr(network, "module", network).quantize

        def restart_dead(_: nn.Module, inputs: tuple[Tensor]) -> None:
            (latents,) = inputs
            scores = rng.uniform(len(latents), latents[0, 0].numel())
            self.restart(quantizer.embedding.weight, latents, scores.flatten())

        def count_used(_: nn.Module, inputs: tuple[Tensor], output: tuple[Any, ...]) -> None:
            self.count(output[2][2])

        def bypass(_: nn.Module, inputs: tuple[Tensor], output: tuple[Any, ...]) -> tuple[Any, ...]:
            self.taken.add_(1)
            return inputs[0], 0 * output[1], output[2]

        if self.warm_steps and self.taken < self.warm_steps:  # the comparison synchronises with the device
            hooks: tuple[Any, ...] = (quantizer.register_forward_hook(bypass),)
        else:
            hooks = (quantizer.register_forward_pre_hook(restart_dead), quantizer.register_forward_hook(count_used))
        try:
            output, commitment = network(batch.images, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        loss = reconstruction_loss(output, batch.images, edge_weight=self.edge_weight, scales=self.scales)
        loss += self.commitment_weight * commitment.float()
        return loss

    @torch.no_grad()
    def restart(self, codebook: Tensor, latents: Tensor, scores: Tensor) -> None:
        """Move dead codes of the codebook (K, w) onto latents (B, w, h, w').

        Latents are sampled without replacement (Efraimidis & Spirakis 2006). Their weight is the squared distance to
        the nearest live code; all weights are equal if no code is live.

        Args:
            codebook: (K, w), changed in place.
            latents: (B, w, h, w').
            scores: (B·n,) uniform in [0, 1), the randomness of the sample.
        """
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2).to(codebook.dtype)
        idle = self.idle >= self.patience
        nearest = torch.cdist(rows.float(), codebook.float()).masked_fill(idle, math.inf).amin(dim=1)
        weight = torch.where(nearest.isfinite(), nearest.square(), 1.0).clamp(min=1e-12)
        order = (scores.clamp(min=1e-12).log() / weight).argsort(descending=True)
        chosen = rows[order[(idle.cumsum(0) - 1).clamp(min=0) % len(rows)]]  # each dead code takes the next latent
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(chosen, src=0)  # all workers share one codebook: use the latents of the first
        dead = idle & (self.taken < self.restart_steps)
        codebook.copy_(torch.where(dead[:, None], chosen, codebook))
        self.idle.masked_fill_(dead, 0)

    @torch.no_grad()
    def count(self, codes: Tensor) -> None:
        """Record which codes were used, by any worker."""
        used = torch.zeros_like(self.idle).index_fill_(0, codes.flatten(), 1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
        self.idle.add_(1).masked_fill_(used > 0, 0)
        self.taken.add_(1)
