"""Images of neighbours as tokens: a patch encoder, and a second cross-attention in every block of the transformer.

Legend: ``B`` batch, ``I`` images of a sample, ``S`` side, ``n`` patches of an image, ``N`` = I·n image tokens, ``T``
condition tokens, ``E`` their channels, ``D`` = E − 1 channels of an image token.

    tokens' = encoder(images), zero where an image is hidden
    x += A(x, tokens) + A'(x, tokens')                         A' has no biases

An embedding describes what an image shows, but not where and how. The images of the nearest neighbours supply both.

Tokens of hidden images are zero, and A' maps zeros to zeros. A network whose images are hidden is therefore the network
without images. The output projections of A' are initialised to zero: a trained network that gains image tokens starts
with unchanged outputs.
"""

import inspect
from typing import Any, NamedTuple, TypeGuard

import torch
from diffusers import ModelMixin as ModelMixin  # a pipeline loads a class only if its module has this name
from diffusers import PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from model.configs import NEAR_DUPLICATE
from model.diffusion.conditioning import MARKER_CHANNELS, split_image_tokens
from model.errors import ModelError
from model.networks.fused_attention import FoldedAttnProcessor, use_fused_attention
from model.networks.rotary import RotaryTransformer, with_parameters_of

_BASE_PARAMETERS = inspect.signature(RotaryTransformer.__init__).parameters


class ShownImages(NamedTuple):
    """Images of neighbours for a training batch.

    Attributes:
        pixels: (B, I, 3, S, S) in [−1, 1], nearest first.
        shown: (B, I) bool, False for a hidden image.
    """

    pixels: Tensor
    shown: Tensor


def choose_distinct(cosines: Tensor, visible: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose the nearest visible neighbours that are not near-duplicates of the query. Used in training and generation.

    The image of a near-duplicate would reveal the target.

    Args:
        cosines: (B, K) of each query and its neighbours, nearest first.
        visible: (B, K) bool, False for neighbours that are hidden or missing.
        count: Maximum number of neighbours to choose, I.

    Returns:
        Positions (B, min(I, K)) int64, nearest first, and bool (B, min(I, K)), False where there is no such neighbour.
    """
    shown = visible & (cosines < NEAR_DUPLICATE)
    first = (~shown).long().argsort(dim=1, stable=True)[:, :count]
    return first, shown.gather(1, first)


class ImageEncoder(nn.Module):
    """Patches of images with their position and the rank of their neighbour, and one block of self-attention."""

    def __init__(self, *, side: int, patch: int, images: int, heads: int, head_width: int, channels: int) -> None:
        """Create the encoder.

        Args:
            side: Image side in px (S).
            patch: Side of a patch; ``side`` must be a multiple of it.
            images: Maximum number of images per sample.
            heads: Attention heads of the block.
            head_width: Channels of a head.
            channels: D.
        """
        super().__init__()
        width = heads * head_width
        self.patches = PatchEmbed(height=side, width=side, patch_size=patch, in_channels=3, embed_dim=width)
        self.rank_embedding = nn.Parameter(torch.zeros(images, 1, width))  # three dimensions: not a matrix for Muon
        self.blocks = nn.ModuleList(
            [BasicTransformerBlock(width, heads, head_width, activation_fn="gelu-approximate", attention_bias=False)]
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, channels, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, I, 3, S, S): (B, N, D)."""
        batch, count = images.shape[:2]
        tokens = self.patches(images.flatten(0, 1)).unflatten(0, (batch, count)) + self.rank_embedding[:count]
        tokens = tokens.flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        encoded: Tensor = self.out(self.norm(tokens)).unflatten(0, (batch, count)).flatten(1, 2)
        return encoded


class ImageAttnProcessor(nn.Module):
    """Attention to the condition tokens, and to image tokens with weights of its own."""

    def __init__(self, attn: Attention, channels: int) -> None:
        """Extend the cross-attention ``attn`` to image tokens of ``channels`` channels."""
        super().__init__()
        self.images = Attention(
            attn.query_dim,
            cross_attention_dim=channels,
            heads=attn.heads,
            dim_head=attn.inner_dim // attn.heads,
            out_bias=False,
            qk_norm="rms_norm",  # PixArt does not normalise the queries of its cross-attention
        )

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Attend: tokens (B, n, W), context (B, T, W), image tokens (B, N, D) or None -> (B, n, W).

        diffusers passes an argument of the name ``ip_hidden_states`` to the processors that accept it, and to no other.
        """
        attended = _WITHOUT_IMAGES(attn, hidden_states, encoder_hidden_states, attention_mask)
        return attended if ip_hidden_states is None else attended + self.images(hidden_states, ip_hidden_states)


class NeighbourImageTransformer(RotaryTransformer):
    """A transformer that also attends to the images of neighbours. Saved pipelines name this class."""

    @register_to_config
    @with_parameters_of(RotaryTransformer)
    def __init__(self, *, neighbour_images: int = 1, neighbour_patch: int = 8, **base: Any) -> None:
        """Create the network.

        Args:
            neighbour_images: Maximum number of images per sample.
            neighbour_patch: Side of their patches.
            **base: Arguments of the base class.
        """
        super().__init__(**base)
        config = self.config
        channels = config.caption_channels - MARKER_CHANNELS
        self.image_encoder = ImageEncoder(
            side=config.sample_size,
            patch=neighbour_patch,
            images=neighbour_images,
            heads=config.num_attention_heads,
            head_width=config.attention_head_dim // 2,
            channels=channels,
        )
        for block in self.transformer_blocks:
            block.attn2.set_processor(ImageAttnProcessor(block.attn2, channels))

    @property
    def image_tokens(self) -> int:
        """N for the largest number of images."""
        return int(self.config.neighbour_images * (self.config.sample_size // self.config.neighbour_patch) ** 2)

    def encode_images(self, images: Tensor, shown: Tensor) -> Tensor:
        """Encode images (B, I, 3, S, S) in [−1, 1] of which ``shown`` (B, I) are visible: (B, N, D).

        Raises ``ModelError`` for more images than the network takes, or images of another side.
        """
        expected = (self.config.neighbour_images, 3, self.config.sample_size, self.config.sample_size)
        if images.shape[1] > expected[0] or images.shape[2:] != expected[1:]:
            raise ModelError(
                f"neighbours' images have the wrong shape: {tuple(images.shape[1:])}; give at most {expected}"
            )
        encoded = self.image_encoder(images.to(self.dtype)).unflatten(1, (images.shape[1], -1))
        encoded = torch.where(shown[:, :, None, None], encoded, 0).flatten(1, 2)
        return nn.functional.pad(encoded, (0, 0, 0, self.image_tokens - encoded.shape[1]))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        images: ShownImages | None = None,
        **options: Any,
    ) -> Any:
        """Predict as the base class does.

        Args:
            hidden_states: (B, C, S, S).
            encoder_hidden_states: (B, T, E) tokens, or (B, T + N, E + 1) tokens with image tokens.
            timestep: (B,).
            added_cond_kwargs: See the base class.
            images: Images to encode, in training. Sampling encodes them once, and passes their tokens.
            **options: Further arguments of the base class.
        """
        tokens, encoded = split_image_tokens(
            encoder_hidden_states, channels=self.config.caption_channels, count=self.image_tokens
        )
        if images is not None:
            encoded = self.encode_images(images.pixels, images.shown)
        shown = None if encoded is None else {"ip_hidden_states": encoded}
        return super().forward(
            hidden_states, tokens, timestep, added_cond_kwargs, cross_attention_kwargs=shown, **options
        )


def takes_images(network: Any) -> TypeGuard[NeighbourImageTransformer]:
    """Return True if the network attends to the images of neighbours."""
    return isinstance(network, NeighbourImageTransformer)


def hide_images(network: Any, condition: Tensor) -> Tensor:
    """Remove the image tokens of a condition for ``network``, if it has any: (B, T, E)."""
    if not takes_images(network):
        return condition
    return split_image_tokens(condition, channels=network.config.caption_channels, count=network.image_tokens)[0]


def add_image_tokens(
    network: PixArtTransformer2DModel, *, images: int = 1, patch: int = 8, seed: int = 0
) -> NeighbourImageTransformer:
    """Copy the network and add image tokens whose effect is zero, so that the outputs are unchanged.

    Args:
        network: A transformer or editor over pixels.
        images: Maximum number of images per sample.
        patch: Side of their patches.
        seed: Seed of the new weights.

    Raises:
        ModelError: The network already has image tokens, denoises latents, or has weights that its config does not
            name, e.g. of an adapter.
    """
    if takes_images(network):
        raise ModelError("the network already has image tokens; add them once")
    config = {name: value for name, value in network.config.items() if name in _BASE_PARAMETERS}
    if config["out_channels"] != 3:
        raise ModelError(f"image tokens need a network over pixels: {config['out_channels']} channels; choose another")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extended: NeighbourImageTransformer = NeighbourImageTransformer(
            neighbour_images=images, neighbour_patch=patch, **config
        )
        _initialise(extended)
    _, unknown = extended.load_state_dict(network.state_dict(), strict=False)
    if unknown:
        raise ModelError(f"the network has weights of no known layer: {unknown[0]}; merge its adapters first")
    use_fused_attention(extended)
    nn.Module.to(extended, network.device, network.dtype)  # diffusers' own `to` warns about dtypes
    extended.train(network.training)
    return extended


def _initialise(network: NeighbourImageTransformer) -> None:
    """Initialise the new layers in place: Xavier matrices, zero output projections of the attention."""
    attentions = [block.attn2.processor for block in network.transformer_blocks]
    for part in (network.image_encoder, *attentions):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    nn.init.normal_(network.image_encoder.rank_embedding, std=0.02)
    for attention in attentions:
        nn.init.zeros_(attention.images.to_out[0].weight)


_WITHOUT_IMAGES = FoldedAttnProcessor()
