"""Monitoring: metrics in the log and a file, the loss on an unseen style, and grids of samples."""

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import VQModel
from numpy.typing import NDArray
from torch import Tensor, nn

from model.configs import MAX_NEIGHBOUR_IMAGES, Prediction
from model.diffusion.conditioning import append_image_tokens, condition_tokens, null_condition
from model.diffusion.flow_matching import add_noise, flow_matching_loss, sample_sigmas
from model.diffusion.vq_diffusion import Transitions, sample_codes, step_divergence
from model.images import image_grid, to_model_range, to_pil
from model.networks.editor import generating
from model.networks.image_tokens import choose_distinct, takes_images
from model.networks.vq_autoencoder import decode_codes, encode_codes
from model.step_random import StepRandom
from sticker_recipe.data import NEIGHBOURS, nearest

LEVELS = (0.5, 0.7, 0.9)
"""Noise levels at which the effect of the condition is measured."""
log = logging.getLogger("sticker-generator")


class ConditionLosses(NamedTuple):
    """Losses (L, N) of N unseen images at L noise levels, with the condition and with a hidden one."""

    levels: tuple[float, ...]
    shown: Tensor
    hidden: Tensor

    @property
    def gap(self) -> Tensor:
        """The loss with the condition minus the loss without (L, N); it is negative where the condition helps."""
        return self.shown - self.hidden

    def table(self) -> dict[str, dict[str, float]]:
        """Return the means by noise level, and the standard error of the gap."""
        errors = self.gap.std(dim=1) / self.gap.shape[1] ** 0.5
        means = (part.mean(dim=1) for part in (self.shown, self.hidden, self.gap))
        rows = torch.stack([*means, errors], dim=1).tolist()
        names = ("shown", "hidden", "gap", "gap_error")
        return {f"{level:g}": dict(zip(names, row, strict=True)) for level, row in zip(self.levels, rows, strict=True)}


Watch = Callable[[int, nn.Module, ConditionLosses], None]
"""Called with the images, the average and its losses at every grid."""


class Log:
    """Metrics as log lines and in ``metrics.jsonl``; samples as image grids."""

    def __init__(self, folder: Path, unseen: "Unseen | None", watch: Sequence[Watch] = ()) -> None:
        """Write to ``folder``; evaluate the ``unseen`` domain, if given, and pass its losses to each of ``watch``."""
        self._folder, self._unseen, self._watch = folder, unseen, watch

    def log(self, *, images: int, values: dict[str, float]) -> None:
        """Log metrics as one line."""
        log.info("%9d images  %s", images, "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"images": images, **values}) + "\n")

    def grid(self, *, images: int, average: nn.Module) -> None:
        """Write a grid of samples for the unseen domain and log the loss on it."""
        if self._unseen is None:
            return
        self._unseen.save_grid(average, self._folder / f"samples-{images:09d}.png")
        self.log(images=images, values={"unseen_loss": self._unseen.loss(average)})
        if self._watch:
            losses = self._unseen.condition_losses(average)
            self.log(images=images, values={"unseen_gap": float(losses.gap.mean())})
            for watch in self._watch:
                watch(images, average, losses)


class Unseen:
    """Images of a domain that is not trained on, with their neighbours, to monitor training."""

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        rows: NDArray[np.float16],
        device: str,
        count: int = 512,
        *,
        prediction: Prediction = "velocity",
    ) -> None:
        """Select ``count`` of the images (N, S, S, 3) with rows (N, D), each with its neighbours among the others.

        ``prediction`` is the output of the networks to evaluate.
        """
        self._prediction = prediction
        chosen = np.random.default_rng(0).permutation(len(rows))[:count]
        ids = nearest(rows, min(NEIGHBOURS, len(rows) - 1), device)[chosen]
        query, near = (torch.from_numpy(part).float().to(device) for part in (rows[chosen], rows[ids]))
        self._images = to_model_range(torch.from_numpy(pixels[chosen]).to(device))
        self._tokens = condition_tokens(query, near, dimension=rows.shape[1], batch=len(chosen))
        cosines = (query[:, None] * near).sum(2)
        first, self._shown = choose_distinct(cosines, torch.ones_like(cosines, dtype=torch.bool), MAX_NEIGHBOUR_IMAGES)
        shown = torch.from_numpy(pixels[np.take_along_axis(ids, first.cpu().numpy(), axis=1)]).to(device)
        self._neighbours = to_model_range(shown.flatten(0, 1)).reshape(*shown.shape[:2], 3, *shown.shape[2:4])

    @torch.inference_mode()
    def loss(self, network: nn.Module) -> float:
        """Return the flow matching loss with the full condition and the same noise at every call."""
        rng = StepRandom(0, 0, device=self._images.device)
        sigma, noise = sample_sigmas(len(self._images), rng), rng.normal(*self._images.shape)
        condition, denoiser = self._condition(network), generating(network, self._prediction)
        return float(flow_matching_loss(denoiser, self._images, condition, sigma, noise, self._prediction))

    @torch.inference_mode()
    def condition_losses(self, network: nn.Module) -> ConditionLosses:
        """Return the loss of every image with and without the condition, with the same noise at every call."""
        device, losses = self._images.device, []
        denoiser = generating(network, self._prediction)
        shown, hidden = self._condition(network), null_condition(self._tokens)
        rng = StepRandom(1, 0, device=device)
        for level in LEVELS:
            sigma, noise = torch.full((len(hidden),), level, device=device), rng.normal(*self._images.shape)
            noisy, target = add_noise(self._images, noise, sigma), noise - self._images
            for tokens in (shown, hidden):
                error = denoiser(noisy, sigma, tokens) - target
                losses.append(error.square().mean((1, 2, 3)).cpu())
        return ConditionLosses(LEVELS, torch.stack(losses[::2]), torch.stack(losses[1::2]))

    @torch.inference_mode()
    def save_grid(self, network: nn.Module, path: Path) -> None:
        """Write a grid of samples, 8 per row."""
        image_grid(to_pil(self.samples(network))).save(path)

    @torch.inference_mode()
    def samples(self, network: nn.Module) -> Tensor:
        """Return samples (64, 3, S, S) in [−1, 1] on the CPU, the same noise at every call."""
        return self.sample(network, self._condition(network)[:64]).cpu()

    def _condition(self, network: nn.Module) -> Tensor:
        """Return the condition of every image, with image tokens if the network takes them."""
        if not takes_images(network):
            return self._tokens
        count = network.config.neighbour_images
        images = network.encode_images(self._neighbours[:, :count], self._shown[:, :count])
        return append_image_tokens(self._tokens, images.float())

    def sample(self, network: nn.Module, tokens: Tensor, steps: int = 20) -> Tensor:
        """Sample images (B, 3, S, S) in [−1, 1] for tokens (B, T, E) by Euler steps without guidance."""
        image, denoiser = self._noise(len(tokens)), generating(network, self._prediction)
        levels = torch.linspace(1, 0, steps + 1, device=tokens.device)
        levels = 2 * levels / (1 + levels)  # shift 2
        for now, following in itertools.pairwise(levels):
            image += (following - now) * denoiser(image, now.expand(len(image)), tokens)
        return image.clamp(-1, 1)

    def _noise(self, count: int) -> Tensor:
        """Return the noise (count, 3, S, S) that samples start from, the same at every call."""
        shape = (count, *self._images.shape[1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._images.device)


class UnseenCodes(Unseen):
    """Unseen images for the discrete generator."""

    def __init__(self, pixels: NDArray[np.uint8], rows: NDArray[np.float16], device: str, vae: VQModel) -> None:
        """Take the arguments of :class:`Unseen` and the autoencoder of the codes."""
        super().__init__(pixels, rows, device)
        self._vae, self._codes = vae, encode_codes(vae, self._images)
        self._transitions = Transitions(codes=vae.config.num_vq_embeddings)

    @torch.inference_mode()
    def loss(self, network: nn.Module) -> float:
        """Return the bound on −log p(x_0) in nats per token, with the full condition and fixed t and noise."""
        rng = StepRandom(0, 0, device=self._codes.device)
        t = (rng.uniform(len(self._codes)) * self._transitions.timesteps).long() + 1
        noisy = self._transitions.corrupt(self._codes, t, rng.uniform(*self._codes.shape, 2))
        log_clean = network(noisy, t, self._tokens).float().log_softmax(2)
        divergence = step_divergence(log_clean, self._codes, noisy, t, self._transitions)
        return float(divergence.mean()) * self._transitions.timesteps

    def sample(self, network: nn.Module, tokens: Tensor, steps: int = 20) -> Tensor:
        """Sample images for tokens in ``steps`` strides without guidance."""
        shape = (len(tokens), steps, self._codes.shape[1])
        uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(tokens.device)
        return decode_codes(self._vae, sample_codes(network, tokens, uniforms, transitions=self._transitions))
