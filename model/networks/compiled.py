"""How a network is made fast on a GPU, alike for training and for drawing.

Legend: ``B`` batch, ``n`` tokens of a picture, ``T`` condition tokens, ``W`` width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel, VQModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from model.errors import ModelError
from model.networks.vq_transformer import VQTransformer

GRAPHS = 8
"""Of one compiled block: for a batch of 1, of a fixed size, of any; with gradients, and without."""


class JoinedProjections:
    """Attention of a PixArt block whose queries, keys and values come of one product.

    Three of a third of its size read their input three times, and their gradients are added up in two more passes.
    The weights stay where they are: what is saved, loaded and stepped does not change.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """(B, n, W) tokens, (B, T, W) context (None: the tokens themselves) -> (B, n, W).

        Raises ``ModelError`` for a mask: no condition here has one.
        """
        if attention_mask is not None:
            raise ModelError("joined projections take no attention mask; call the network before it is compiled")

        def projected(source: Tensor, *projections: nn.Linear) -> list[Tensor]:
            weight = torch.cat([projection.weight for projection in projections])
            return [
                part.view(*part.shape[:2], attn.heads, -1).transpose(1, 2)
                for part in F.linear(source, weight).chunk(len(projections), dim=2)
            ]

        if encoder_hidden_states is None:
            query, key, value = projected(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            (query,) = projected(hidden_states, attn.to_q)
            key, value = projected(encoder_hidden_states, attn.to_k, attn.to_v)
        seen = F.scaled_dot_product_attention(query, key, value)
        answer: Tensor = attn.to_out[0](seen.transpose(1, 2).flatten(2))
        return answer


def join_projections(network: nn.Module) -> None:
    """Let a PixArt transformer's attention project at once, in place.

    One with biases, dropout, or something in a projection's place (an adapter, say) stays as it is, as do others.
    """
    if not isinstance(network, PixArtTransformer2DModel) or network.config.attention_bias or network.config.dropout:
        return
    attentions = [part for part in network.modules() if isinstance(part, Attention)]
    if all(type(part) is nn.Linear for attn in attentions for part in (attn.to_q, attn.to_k, attn.to_v)):
        network.set_attn_processor(JoinedProjections())


def compile_in_place(network: nn.Module, *, whole: bool = True) -> None:
    """``torch.compile`` a network where it stands, its saved names unchanged.

    A transformer is compiled as a whole, which fuses its ends too; with ``whole=False`` (weights that hooks gather
    block by block) and for a U-Net, whose whole takes minutes, its blocks are. An autoencoder stays as it is: the
    objective that trains it hooks into its quantizer.
    """
    join_projections(network)
    if whole and isinstance(network, PixArtTransformer2DModel | VQTransformer):
        network.compile()
    elif not isinstance(network, VQModel):
        blocks = repeated(network)
        # The blocks of one code share its limit of graphs, though a U-Net's have shapes of their own; past it, they run
        # as if they were not compiled.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS * len(blocks))
        for block in blocks:
            block.compile()


def repeated(network: nn.Module) -> list[nn.Module]:
    """The blocks of the same code."""
    return [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
