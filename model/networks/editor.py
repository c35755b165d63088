"""The editor: a denoiser with extra input channels for the image to restore.

Legend: ``B`` batch, ``S`` side, ``T`` condition tokens, ``E`` their channels.

    network([x_σ, reference] (B, 6, S, S), σ, tokens) -> (B, 3, S, S)

A reference of zeros means no reference. Training includes such samples, so one network both generates and edits.
"""

import copy

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from model.configs import Prediction
from model.diffusion.flow_matching import Denoiser
from model.errors import ModelError
from model.networks.denoiser import as_denoiser, unwrap
from model.networks.image_tokens import ShownImages

EDITOR_CHANNELS = 6
"""Input channels of an editor: three of the noisy image, three of the reference."""


def widen_input(network: PixArtTransformer2DModel, in_channels: int = EDITOR_CHANNELS) -> PixArtTransformer2DModel:
    """Copy the network and add input channels with zero weights, so that the outputs are unchanged.

    The copy's config has the new ``in_channels``, so it is saved and loaded like any other network.

    Raises:
        ModelError: The network already has ``in_channels`` input channels or more.
    """
    had = network.config.in_channels
    if in_channels <= had:
        raise ModelError(f"cannot widen {had} input channels to {in_channels}; widen the base network, and only once")
    wide = copy.deepcopy(network)
    narrow: nn.Conv2d = network.pos_embed.proj
    weight = narrow.weight.new_zeros(len(narrow.weight), in_channels, *narrow.kernel_size)
    weight[:, :had] = narrow.weight.detach()
    wide.pos_embed.proj.in_channels = in_channels
    wide.pos_embed.proj.weight = nn.Parameter(weight, requires_grad=narrow.weight.requires_grad)
    wide.register_to_config(in_channels=in_channels, out_channels=network.out_channels)
    return wide


def is_editor(network: nn.Module) -> bool:
    """Return True if the network takes a reference in addition to the noisy image."""
    config = getattr(network, "config", None)
    return getattr(config, "in_channels", 0) == EDITOR_CHANNELS and getattr(config, "out_channels", 0) == 3


def generating(network: nn.Module, prediction: Prediction, images: ShownImages | None = None) -> Denoiser:
    """Return the denoiser of a network that generates: as :func:`as_denoiser`, for an editor without a reference."""
    denoiser = as_denoiser(network, prediction, images)
    return with_reference(denoiser, None) if is_editor(unwrap(network)) else denoiser


def with_reference(denoiser: Denoiser, reference: Tensor | None, *, above: float = 0.0) -> Denoiser:
    """Fix the reference channels of a six-channel denoiser to ``reference`` (B, 3, S, S). Return one of three channels.

    The reference is repeated for batches that are a multiple of B, as in guidance. None means no reference: zeros.
    At noise levels σ of at most ``above`` the reference is hidden; 0 shows it always.
    """

    def denoise(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        # Reading σ waits for a GPU, so training, which shows the reference always, must not do it.
        if reference is None or (above > 0 and float(sigma[0]) <= above):
            channels = torch.zeros_like(noisy)
        else:
            channels = reference.repeat(len(noisy) // len(reference), 1, 1, 1)
        return denoiser(torch.cat([noisy, channels], dim=1), sigma, condition)

    return denoise
