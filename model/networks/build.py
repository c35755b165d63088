"""All networks behind one choice: built from a size, and the size of one that is there."""

import dataclasses
from typing import Any, TypeAlias

from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from model.diffusion.flow_matching import Prediction
from model.networks.denoiser import build_denoiser
from model.networks.dit import TransformerConfig
from model.networks.unet import UNetConfig
from model.networks.vq_transformer import VQTransformer, VQTransformerConfig, build_vq_transformer

AnyNetwork: TypeAlias = PixArtTransformer2DModel | UNet2DConditionModel | VQTransformer
NetworkConfig = TransformerConfig | UNetConfig | VQTransformerConfig


def build_network(config: NetworkConfig, *, embedding_dimension: int, seed: int) -> AnyNetwork:
    """The network of ``config`` with weights drawn from ``seed``."""
    if isinstance(config, VQTransformerConfig):
        return build_vq_transformer(config, embedding_dimension=embedding_dimension, seed=seed)
    return build_denoiser(config, embedding_dimension=embedding_dimension, seed=seed)


def config_of_network(network: AnyNetwork, prediction: Prediction) -> NetworkConfig:
    """The config that a network was built from, or would be. An editor's is that of the network it was widened from."""
    held: Any = network.config
    if isinstance(network, VQTransformer):
        fields = [field.name for field in dataclasses.fields(VQTransformerConfig) if field.name != "kind"]
        return VQTransformerConfig(**{name: held[name] for name in fields})
    drawn = {"image_size": held.sample_size, "channels": held.out_channels, "prediction": prediction}
    if isinstance(network, UNet2DConditionModel):
        widths = tuple(held.block_out_channels)
        heads = held.attention_head_dim  # diffusers' name for their number
        first = heads if isinstance(heads, int) else heads[0]
        return UNetConfig(**drawn, widths=widths, layers=held.layers_per_block, head_width=widths[0] // first)
    return TransformerConfig(
        **drawn,
        patch_size=held.patch_size,
        layers=held.num_layers,
        heads=held.num_attention_heads,
        head_width=held.attention_head_dim,
    )
