"""Prompts: texts, images and embeddings, all as unit rows of the encoder's space.

Legend: ``P`` prompts, ``D`` embedding width.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.encoder.clip import Encoder
from model.errors import ModelError
from model.images import to_rgb

Prompt = str | Image.Image
Prompts = Prompt | Sequence[Prompt] | Tensor
"""A text or an image, several of them in any mix, or embeddings (P, D) of the encoder."""

_KINDS = "give str, PIL images or embeddings (P, D)"


def embed_prompts(prompts: Prompts, encoder: Callable[[], Encoder], dimension: int) -> Tensor:
    """Embed prompts as unit rows (P, D) on the CPU.

    Args:
        prompts: Texts, images or embeddings.
        encoder: Returns the encoder; called only if there are texts or images.
        dimension: D.

    Raises:
        ModelError: A prompt is empty or of another type, or embeddings are not finite rows.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or not len(prompts) or not prompts.isfinite().all():
            raise ModelError(
                f"embeddings are not finite rows: shape {tuple(prompts.shape)}; give at least one finite row, as (P, D)"
            )
        return F.normalize(prompts.float().cpu(), dim=-1)
    if not isinstance(prompts, Prompt | Iterable):
        raise ModelError(f"prompt has an unknown type: {type(prompts).__name__}; {_KINDS}")
    listed = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if not listed or any(isinstance(prompt, str) and not prompt.strip() for prompt in listed):
        raise ModelError("a prompt is empty; describe what the image should show")
    rows = torch.empty(len(listed), dimension)
    texts = {number: prompt for number, prompt in enumerate(listed) if isinstance(prompt, str)}
    images = {number: to_rgb(prompt) for number, prompt in enumerate(listed) if isinstance(prompt, Image.Image)}
    if len(texts) + len(images) < len(listed):
        raise ModelError(f"a prompt is neither a text nor an image; {_KINDS}")
    if texts:
        rows[list(texts)] = encoder().embed_texts(list(texts.values()))
    if images:
        rows[list(images)] = encoder().embed_images(list(images.values()))
    return rows


def one_for_each(embeddings: Tensor, count: int, *, name: str, of: str) -> Tensor:
    """Expand one row (1, …) to (count, …). Raise ``ModelError`` unless there are 1 or ``count`` rows.

    ``name`` and ``of`` are the words for rows and count in the error message, e.g. "negative prompts" and "prompts".
    """
    if len(embeddings) not in (1, count):
        raise ModelError(f"there are {len(embeddings)} {name} for {count} {of}; give one for all, or one for each")
    return embeddings.expand(count, *embeddings.shape[1:]).contiguous()
