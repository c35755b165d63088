"""A transformer's layers in fewer operations than they are written in: what they compute and their weights stay.

Legend: ``B`` batch, ``n`` tokens of a picture, ``T`` condition tokens, ``h`` heads of width ``d``, ``W`` = h·d.

A condition is few tokens, the query and k neighbours. So cross-attention costs less from their side: the projections
of the queries, Q, and of the answer, O, go into keys and values once for each head, in place of once for each token.

    softmax(x Q (c K)ᵀ / √d) (c V) O = softmax(x Mᵀ) N        M_ht = Q_h k_ht / √d, N_ht = v_ht O_h

Where queries are normalised (the network over codes), only O goes.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn


def folding_is_cheaper(context: int, tokens: int, heads: int, width: int, *, projections: int) -> bool:
    """Whether T condition tokens with so many of the two projections in them cost less, of n tokens and heads h, W.

    Both sides count products of a picture, in units of 2·W.
    """
    folded = projections * context * width + 2 * tokens * heads * context
    return folded < projections * tokens * width + 2 * tokens * context


def is_unmodified(part: nn.Module) -> bool:
    """Whether a layer is what its kind computes: no subclass, no hook (of pruning, say), no forward of its own."""
    kinds = (nn.Linear, TokenLinear, nn.Dropout)
    return type(part) in kinds and not (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)


def folded_attention(tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What each head finds, summed: (B, n, C) tokens, keys (B, h, T, C), values (B, h, T, W) -> (B, n, W)."""
    scores = tokens @ keys.flatten(1, 2).mT
    weights = scores.view(*scores.shape[:2], *keys.shape[1:3]).softmax(-1).flatten(2)
    found: Tensor = weights @ values.flatten(1, 2)
    return found


def fold_query(keys: Tensor, query: Tensor) -> Tensor:
    """Keys (B, T, h, d) with the queries' projection (W, W), scaled, in them: M, (B, h, T, W)."""
    return torch.einsum("bthd,hdw->bhtw", keys, query.view(*keys.shape[2:], -1))


def fold_output(values: Tensor, out: Tensor) -> Tensor:
    """Values (B, T, h, d) with the answer's projection (W, W) in them: N, (B, h, T, W)."""
    return torch.einsum("bthd,whd->bhtw", values, out.view(-1, *values.shape[2:]))


def block_diagonal_keys(keys: Tensor) -> Tensor:
    """Keys (B, T, h, d) for queries (B, n, W): (B, h, T, W), of each head zero in the others' channels."""
    heads = torch.eye(keys.shape[2], dtype=keys.dtype, device=keys.device)
    return (keys.transpose(1, 2).unsqueeze(3) * heads[:, None, :, None]).flatten(3)


class FoldedAttnProcessor(AttnProcessor2_0):
    """Attention of a PixArt block in fewer operations, where it is what its matrices and the answer's bias make of it.

    With a mask, other biases or none, dropout, a hook, an adapter in a projection's place, diffusers computes it.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Tensor:
        """(B, n, W) tokens, (B, T, W) context (None: the tokens themselves) -> (B, n, W)."""
        context = encoder_hidden_states
        if attention_mask is None and _is_plain(attn):
            if context is None:
                return _to_themselves(attn, hidden_states)
            if folding_is_cheaper(context.shape[1], hidden_states.shape[1], attn.heads, attn.inner_dim, projections=2):
                return _to_few(attn, hidden_states, context)
        return cast(Tensor, super().__call__(attn, hidden_states, context, attention_mask, *arguments, **options))


def _to_themselves(attn: Attention, tokens: Tensor) -> Tensor:
    """Self-attention whose queries, keys and values come of one product: three would read the tokens three times."""
    weight = torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight])
    query, key, value = (
        part.view(*part.shape[:2], attn.heads, -1).transpose(1, 2) for part in F.linear(tokens, weight).chunk(3, dim=2)
    )
    seen = F.scaled_dot_product_attention(query, key, value)
    return cast(Tensor, attn.to_out[0](seen.transpose(1, 2).flatten(2)))


def _to_few(attn: Attention, tokens: Tensor, context: Tensor) -> Tensor:
    """Cross-attention from the context's side."""
    key, value = (projection(context).unflatten(2, (attn.heads, -1)) for projection in (attn.to_k, attn.to_v))
    keys = fold_query(key, attn.to_q.weight * attn.scale)
    found = folded_attention(tokens, keys, fold_output(value, attn.to_out[0].weight))
    return found + cast(Tensor, attn.to_out[0].bias).to(found.dtype)


class PatchProjection(nn.Conv2d):
    """A convolution whose patches do not overlap: the matrix product that it is."""

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, W, S/p, S/p)."""
        rows, columns = self.kernel_size
        count, channels, high, wide = *pictures.shape[:2], pictures.shape[2] // rows, pictures.shape[3] // columns
        whole = pictures[:, :, : high * rows, : wide * columns]
        patches = whole.view(count, channels, high, rows, wide, columns)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class TokenLinear(nn.Linear):
    """A layer that sums a bias's gradient over each picture's tokens first, then over the pictures.

    Compiled for a GPU, the first sum joins a kernel that makes that gradient, or that sums over each picture's tokens
    anyway, as the modulation's gradients are; one sum over all tokens is another pass over the batch.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, n, W) -> (B, n, W')."""
        if tokens.ndim != 3:
            return super().forward(tokens)
        product = F.linear(tokens, self.weight)
        return product + self.bias.to(product.dtype).expand(len(product), 1, -1)


def use_fused_attention(network: nn.Module) -> None:
    """Let a PixArt transformer compute in fewer operations, in place; other networks stay as they are."""
    if not isinstance(network, PixArtTransformer2DModel):
        return
    for part in network.modules():
        if isinstance(part, Attention) and type(part.processor) is AttnProcessor2_0:  # no one's own
            part.set_processor(FoldedAttnProcessor())
    if type(network.pos_embed.proj) is nn.Conv2d:
        network.pos_embed.proj.__class__ = PatchProjection  # the same parameters under the same names


def sum_by_image(block: nn.Module) -> None:
    """Make the layers of a transformer's block :class:`TokenLinear`, in place: worth it where it is compiled."""
    for part in block.modules():
        if type(part) is nn.Linear and part.bias is not None:
            part.__class__ = TokenLinear


def _is_plain(attn: Attention) -> bool:
    """Whether attention is what its four matrices and the answer's bias make of it."""
    inside, (out, dropout) = (attn.to_q, attn.to_k, attn.to_v), attn.to_out
    return (
        all(is_unmodified(part) for part in (*inside, out, dropout))
        and all(part.bias is None for part in inside)
        and out.bias is not None
        and not (attn.training and dropout.p)
    )
