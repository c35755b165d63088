"""Build any of the networks from its config, and recover the config of a network."""

import dataclasses
from typing import Any, TypeAlias

from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from model.configs import NetworkConfig, Prediction, TransformerConfig, UNetConfig, VQTransformerConfig
from model.networks.denoiser import build_denoiser
from model.networks.vq_transformer import VQTransformer, build_vq_transformer

AnyNetwork: TypeAlias = PixArtTransformer2DModel | UNet2DConditionModel | VQTransformer


def build_network(config: NetworkConfig, *, embedding_dimension: int, seed: int) -> AnyNetwork:
    """Build the network of ``config`` with random initial weights from ``seed``.

    ``embedding_dimension`` is the width of the encoder's embeddings.
    """
    if isinstance(config, VQTransformerConfig):
        return build_vq_transformer(config, embedding_dimension=embedding_dimension, seed=seed)
    return build_denoiser(config, embedding_dimension=embedding_dimension, seed=seed)


def config_of_network(network: AnyNetwork, prediction: Prediction) -> NetworkConfig:
    """Return the config that builds a network of this size.

    For an editor this is the config of the network that it was widened from. ``prediction`` is copied into the config,
    because a network does not store it.
    """
    stored: Any = network.config
    if isinstance(network, VQTransformer):
        fields = [field.name for field in dataclasses.fields(VQTransformerConfig) if field.name != "kind"]
        return VQTransformerConfig(**{name: stored[name] for name in fields})
    shared = {"image_size": stored.sample_size, "channels": stored.out_channels, "prediction": prediction}
    if isinstance(network, UNet2DConditionModel):
        widths = tuple(stored.block_out_channels)
        heads = stored.attention_head_dim  # in diffusers, despite its name, the number of heads
        first = heads if isinstance(heads, int) else heads[0]
        return UNetConfig(**shared, widths=widths, layers=stored.layers_per_block, head_width=widths[0] // first)
    return TransformerConfig(
        **shared,
        patch_size=stored.patch_size,
        layers=stored.num_layers,
        heads=stored.num_attention_heads,
        head_width=stored.attention_head_dim,
        **{name: stored[name] for name in ("neighbour_images", "neighbour_patch", "rotary") if name in stored},
    )
