"""A look at a network while it learns: a few pictures, few steps, no guidance.

Legend: ``B`` pictures, ``S`` side.
"""

import torch
from torch import Tensor

from model.diffusion.conditioning import condition_tokens
from model.diffusion.flow_matching import Prediction
from model.diffusion.solver import draw_noise, draw_uniforms, integrate, new_scheduler
from model.diffusion.vq_diffusion import Transitions, sample_codes
from model.networks.build import AnyNetwork
from model.networks.denoiser import as_denoiser
from model.networks.editor import is_editor, with_reference
from model.networks.latents import Autoencoder, decode_latents
from model.networks.vq_autoencoder import decode_codes
from model.networks.vq_transformer import VQTransformer
from model.training.data import Batch

STEPS = 8


@torch.no_grad()
def draw_preview(
    network: AnyNetwork, batch: Batch, *, prediction: Prediction, autoencoder: Autoencoder | None, seed: int = 0
) -> Tensor:
    """What ``network`` draws for the queries and neighbours of ``batch``, from the same noise at every call.

    The network is left in evaluation mode.

    Returns:
        (B, 3, S, S) in [−1, 1] on the CPU.
    """
    network, count = network.eval(), len(batch.query)
    tokens = condition_tokens(batch.query, batch.neighbours, dimension=batch.query.shape[1], batch=count)
    generator, config = torch.Generator().manual_seed(seed), network.config
    if isinstance(network, VQTransformer):
        steps = min(STEPS, config.timesteps)
        uniforms = draw_uniforms(count, (steps, config.tokens), generator, shared=False).to(tokens.device)
        transitions = Transitions(codes=config.codes, timesteps=config.timesteps)
        drawn = sample_codes(network, tokens, uniforms, transitions=transitions)
    else:
        denoiser = as_denoiser(network, prediction)
        if is_editor(network):
            denoiser = with_reference(denoiser, None)
        shape = (config.out_channels, config.sample_size, config.sample_size)
        noise = draw_noise(count, shape, generator).to(tokens.device)
        drawn = integrate(denoiser, noise, tokens, new_scheduler(), STEPS, lambda _: None)
    return to_pictures(drawn, autoencoder)


@torch.no_grad()
def to_pictures(stored: Tensor, autoencoder: Autoencoder | None) -> Tensor:
    """Pixels, latents (B, C, s, s) or codes (B, n) as pictures (B, 3, S, S) in [−1, 1] on the CPU."""
    if stored.ndim == 2:
        stored = decode_codes(autoencoder, stored)
    elif autoencoder is not None:
        stored = decode_latents(autoencoder, stored)
    return stored.float().clamp(-1, 1).cpu()
