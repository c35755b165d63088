"""The denoiser with a picture to restore in extra input channels.

Legend: ``B`` batch, ``S`` side, ``T`` condition tokens, ``E`` their channels.

    network([x_σ, reference] (B, 6, S, S), σ, tokens) -> (B, 3, S, S)

A reference of zeros stands for none, and training shows it at times, so one network both draws and edits.
"""

import copy

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from model.diffusion.flow_matching import Denoiser
from model.errors import ModelError

EDITOR_CHANNELS = 6
"""Three of the noisy picture, three of the reference."""


def widen_input(network: PixArtTransformer2DModel, in_channels: int = EDITOR_CHANNELS) -> PixArtTransformer2DModel:
    """A copy of the network with more input channels, whose weights are zero: its first output is the base's.

    The copy's config says ``in_channels``, so it is saved and loaded like any other. Raises ``ModelError`` when the
    network takes as many channels already.
    """
    had = network.config.in_channels
    if in_channels <= had:
        raise ModelError(f"the network takes {had} channels already, {in_channels} are no more; widen the base once")
    wide = copy.deepcopy(network)
    narrow: nn.Conv2d = network.pos_embed.proj
    weight = narrow.weight.new_zeros(len(narrow.weight), in_channels, *narrow.kernel_size)
    weight[:, :had] = narrow.weight.detach()
    wide.pos_embed.proj.in_channels = in_channels
    wide.pos_embed.proj.weight = nn.Parameter(weight, requires_grad=narrow.weight.requires_grad)
    wide.register_to_config(in_channels=in_channels, out_channels=network.out_channels)
    return wide


def is_editor(network: nn.Module) -> bool:
    """Whether a transformer takes a reference beside the noisy picture."""
    config = getattr(network, "config", None)
    return getattr(config, "in_channels", 0) == EDITOR_CHANNELS and getattr(config, "out_channels", 0) == 3


def with_reference(denoiser: Denoiser, reference: Tensor | None) -> Denoiser:
    """A denoiser of six input channels as one of three, that always sees ``reference`` (B, 3, S, S), or none.

    A batch that is a multiple of the reference's (that of guidance) sees it as often as it needs.
    """

    def denoise(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        if reference is None:
            shown = torch.zeros_like(noisy)
        else:
            shown = reference.repeat(len(noisy) // len(reference), 1, 1, 1)
        return denoiser(torch.cat([noisy, shown], dim=1), sigma, condition)

    return denoise
