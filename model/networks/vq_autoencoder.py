"""The autoencoder: a picture as a square of codes from a learned codebook, and back (VQ-VAE, 1711.00937).

Legend: ``B`` batch, ``S`` side of a picture, ``n`` tokens = (S / downscale)², ``K`` codes, ``w`` their width.

It is diffusers' ``VQModel`` as it stands. What is ours: its size, its loss, and how its codebook is made and kept.
Quantizing begins once the autoencoder can draw without: codes that start among latents without meaning settle on
outlines and leave colours out. A code that no patch is nearest to gets no gradient and stays dead, so such codes are
put where patches are: at first all of them, later those that were not used for a while (random restart, Jukebox
2005.00341, §3.1), and rather where patches are far from any code, as k-means++ seeds (Arthur & Vassilvitskii 2007).
"""

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor, nn

from model.step_random import Draw
from model.training.data import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Size of the network: ``channels`` of each resolution from the picture's down, each half of the one before."""

    image_size: int = 64
    downscale: int = 4
    codes: int = 1024
    code_width: int = 8
    channels: tuple[int, ...] = (64, 128, 128)
    layers: int = 1

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if self.downscale != 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"channels name {len(self.channels)} resolutions, each half of the one before, but downscale is "
                f"{self.downscale}; name one more than its power of two"
            )
        if self.image_size % self.downscale:
            raise ValueError(f"image_size {self.image_size} is no multiple of downscale {self.downscale}")
        if self.codes < 2 or min(self.code_width, self.layers, *self.channels) < 1:
            raise ValueError("codes must be at least 2; code_width, layers and channels at least 1")

    @property
    def tokens(self) -> int:
        """How many codes a picture becomes, n."""
        return (self.image_size // self.downscale) ** 2


def build_autoencoder(config: AutoencoderConfig, *, seed: int) -> VQModel:
    """The network with weights drawn from ``seed``; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VQModel(
            down_block_types=("DownEncoderBlock2D",) * len(config.channels),
            up_block_types=("UpDecoderBlock2D",) * len(config.channels),
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            latent_channels=config.channels[-1],
            sample_size=config.image_size,
            num_vq_embeddings=config.codes,
            norm_num_groups=math.gcd(32, *config.channels),
            vq_embed_dim=config.code_width,
            scaling_factor=1.0,
        )


@torch.no_grad()
def encode_codes(autoencoder: VQModel, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in [−1, 1] to the nearest codes (B, n) int64, row by row."""
    latents = autoencoder.encode(pictures.to(autoencoder.dtype)).latents
    rows = latents.permute(0, 2, 3, 1).flatten(1, 2)
    # In float32, whatever the rest computes in: distances are not there in others, nor would they be fine enough.
    return torch.cdist(rows.float(), autoencoder.quantize.embedding.weight.float()).argmin(2)


@torch.no_grad()
def decode_codes(autoencoder: VQModel, codes: Tensor) -> Tensor:
    """Codes (B, n) int64 below K to pictures (B, 3, S, S) in [−1, 1]."""
    side = math.isqrt(codes.shape[1])
    shape = (len(codes), side, side, autoencoder.config.vq_embed_dim)
    latents = autoencoder.quantize.get_codebook_entry(codes.flatten(), shape)
    pictures: Tensor = autoencoder.decode(latents, force_not_quantize=True).sample.clamp(-1, 1)
    return pictures


def reconstruction_loss(output: Tensor, pictures: Tensor, *, edge_weight: float, scales: int) -> Tensor:
    """Mean absolute error of pixels and, weighted, of their differences to the next, over halved resolutions.

    Args:
        output: (B, 3, S, S).
        pictures: (B, 3, S, S) in [−1, 1].
        edge_weight: of the differences, which keep outlines sharp where a mean would blur them.
        scales: how many resolutions, from S down.

    Returns:
        A scalar float32.
    """
    error = (output - pictures).float()
    losses = []
    for scale in range(scales):
        error = F.avg_pool2d(error, 2) if scale else error
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        losses.append(error.abs().mean() + edge_weight * edges)
    return torch.stack(losses).mean()


class AutoencoderObjective(nn.Module):
    """The training objective: reconstruction, commitment, and a codebook without dead codes.

    Its buffers, how many steps each code has been idle and how many have been taken, belong in a checkpoint; a piece of
    a step counts as one. The restarts end after ``restart_steps``, well before the end of training, so that averaged
    weights hold no code in motion.
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
        """For a codebook of ``codes``: a code idle for ``patience`` steps is restarted in the first restart_steps.

        In the first ``warm_steps`` the decoder sees the latents themselves.
        """
        super().__init__()
        if patience < 1:
            raise ValueError("patience must be at least 1 step: a code cannot be used before it is there")
        self.commitment_weight, self.edge_weight, self.scales = commitment_weight, edge_weight, scales
        self.patience, self.restart_steps, self.warm_steps = patience, restart_steps, warm_steps
        self.register_buffer("idle", torch.full((codes,), patience))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def forward(self, network: nn.Module, batch: Batch, draw: Draw) -> Tensor:
        """The loss, a scalar float32. To compile, compile the encoder and the decoder: the quantizer has hooks here.

        Args:
            network: a ``VQModel``, or a wrapper that holds one as ``module``.
            batch: its images are pictures (B, 3, S, S) in [−1, 1].
            draw: where restarted codes go, on the device of the batch.
        """
        quantizer: Any = getattr(network, "module", network).quantize

        def before(_: nn.Module, inputs: tuple[Tensor]) -> None:
            (latents,) = inputs
            scores = draw.uniform(len(latents), latents[0, 0].numel())
            self.restart(quantizer.embedding.weight, latents, scores.flatten())

        def after(_: nn.Module, inputs: tuple[Tensor], output: tuple[Any, ...]) -> None:
            self.count(output[2][2])

        def pass_on(_: nn.Module, inputs: tuple[Tensor], output: tuple[Any, ...]) -> tuple[Any, ...]:
            self.taken.add_(1)
            return inputs[0], 0 * output[1], output[2]

        if self.warm_steps and self.taken < self.warm_steps:  # asked of the device only where there are any
            hooks: tuple[Any, ...] = (quantizer.register_forward_hook(pass_on),)
        else:
            hooks = (quantizer.register_forward_pre_hook(before), quantizer.register_forward_hook(after))
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
        """Put dead codes of the codebook (K, w) onto latents (B, w, h, w') that scores (B·n,) in [0, 1) choose.

        A latent is drawn with a weight of its squared distance to the nearest code that lives (without replacement, by
        Efraimidis & Spirakis 2006); all alike where none does.
        """
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2).to(codebook.dtype)
        idle = self.idle >= self.patience
        nearest = torch.cdist(rows.float(), codebook.float()).masked_fill(idle, math.inf).amin(dim=1)
        weight = torch.where(nearest.isfinite(), nearest.square(), 1.0).clamp(min=1e-12)
        order = (scores.clamp(min=1e-12).log() / weight).argsort(descending=True)
        chosen = rows[order[(idle.cumsum(0) - 1).clamp(min=0) % len(rows)]]  # the dead in turn
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(chosen, src=0)  # one codebook for all workers: the first one's latents
        dead = idle & (self.taken < self.restart_steps)
        codebook.copy_(torch.where(dead[:, None], chosen, codebook))
        self.idle.masked_fill_(dead, 0)

    @torch.no_grad()
    def count(self, codes: Tensor) -> None:
        """Note which codes were used, by any worker."""
        used = torch.zeros_like(self.idle).index_fill_(0, codes.flatten(), 1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
        self.idle.add_(1).masked_fill_(used > 0, 0)
        self.taken.add_(1)
