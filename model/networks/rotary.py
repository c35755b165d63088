"""Rotary positions in the self-attention of the transformer (RoPE, 2104.09864), on two axes.

Legend: ``B`` batch, ``n`` patches of an image, ``d`` width of a head, ``W`` width of all heads.

Half of a head's channels are rotated by the row of a patch, the other half by its column. The product of a query and a
key then depends on the distance of their patches. The absolute positions of the patches remain.
"""

import inspect
from collections.abc import Callable
from typing import Any

from diffusers import ModelMixin as ModelMixin  # a pipeline loads a class only if its module has this name
from diffusers import PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention, HunyuanAttnProcessor2_0
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

Init = Callable[..., None]


def with_parameters_of(base: type) -> Callable[[Init], Init]:
    """Add the parameters of ``base`` to the signature of an ``__init__``, in which diffusers finds a config's names."""

    def decorate(init: Init) -> Init:
        own = [one for one in inspect.signature(init).parameters.values() if one.kind is one.KEYWORD_ONLY]
        inherited = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        init.__signature__ = inspect.Signature([*inherited, *own])  # type: ignore[attr-defined]
        return init

    return decorate


class RotaryAttnProcessor(nn.Module):
    """Self-attention with rotary positions. The table is not saved with the weights."""

    def __init__(self, *, head_width: int, patches: int) -> None:
        """Compute the table for heads of ``head_width`` and images of ``patches`` × ``patches``."""
        super().__init__()
        size = (patches, patches)
        cosines, sines = get_2d_rotary_pos_embed(head_width, ((0, 0), size), size)
        self.register_buffer("cosines", cosines, persistent=False)  # (n, d)
        self.register_buffer("sines", sines, persistent=False)
        self._attend = HunyuanAttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend: tokens (B, n, W) -> (B, n, W)."""
        table = (self.cosines, self.sines)
        attended: Tensor = self._attend(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=table
        )
        return attended


class RotaryTransformer(PixArtTransformer2DModel):
    """A PixArt transformer with rotary positions. Saved pipelines name this class."""

    @register_to_config
    @with_parameters_of(PixArtTransformer2DModel)
    def __init__(self, *, rotary: bool = False, **base: Any) -> None:
        """Create the network.

        Args:
            rotary: Rotate queries and keys.
            **base: Arguments of the base class.
        """
        super().__init__(**base)
        if rotary:
            patches = self.config.sample_size // self.config.patch_size
            processor = RotaryAttnProcessor(head_width=self.config.attention_head_dim, patches=patches)
            for block in self.transformer_blocks:
                block.attn1.set_processor(processor)
