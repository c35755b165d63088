"""Construction of the continuous networks, and their common call signature.

Legend: ``B`` batch, ``C S S`` image or latent, ``T`` condition tokens, ``E`` their channels.
"""

from typing import Any, TypeAlias

from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from model.configs import Prediction, TransformerConfig, UNetConfig
from model.diffusion.flow_matching import Denoiser, to_velocity
from model.networks.dit import build_transformer
from model.networks.image_tokens import ShownImages, takes_images
from model.networks.unet import build_unet

Network: TypeAlias = PixArtTransformer2DModel | UNet2DConditionModel
NetworkConfig = TransformerConfig | UNetConfig

TIMESTEPS = 1000
"""Scale of timesteps: the networks' sinusoidal embedding expects 0 … 1000, so their timestep is σ × 1000."""


def build_denoiser(config: NetworkConfig, *, embedding_dimension: int, seed: int) -> Network:
    """Build the network of ``config`` with random initial weights from ``seed``."""
    match config:
        case TransformerConfig():
            return build_transformer(config, embedding_dimension=embedding_dimension, seed=seed)
        case UNetConfig():
            return build_unet(config, embedding_dimension=embedding_dimension, seed=seed)


def as_denoiser(network: nn.Module, prediction: Prediction, images: ShownImages | None = None) -> Denoiser:
    """Wrap ``network`` as a function of (x_σ (B, C, S, S), σ (B,), tokens (B, T, E)) to velocity (B, C, S, S) float32.

    x_σ and the tokens are cast to the dtype of the weights, so a bfloat16 network needs no autocast.

    Args:
        network: A transformer or U-Net.
        prediction: Type of the network's output.
        images: Images of neighbours for a network that encodes them at every call, as in training. Default: None.
    """
    inner = unwrap(network)
    # PixArt requires these arguments, but only its 1024-px models use them.
    extra: dict[str, Any] = {} if isinstance(inner, UNet2DConditionModel) else {"added_cond_kwargs": _NO_SIZES}
    if takes_images(inner):
        extra["images"] = images

    def denoise(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        dtype = inner.dtype
        (output,) = network(
            noisy.to(dtype),
            timestep=sigma * TIMESTEPS,
            encoder_hidden_states=condition.to(dtype),
            return_dict=False,
            **extra,
        )
        return to_velocity(output.float(), noisy[:, : output.shape[1]], sigma, prediction)

    return denoise


def unwrap(network: nn.Module) -> Any:
    """Return the network inside a DistributedDataParallel wrapper, or the network itself."""
    return getattr(network, "module", network)


_NO_SIZES = {"resolution": None, "aspect_ratio": None}
