"""CLIP encoders for images and texts (open_clip), and their identity.

Legend: ``B`` batch, ``D`` embedding width, ``C H W`` an image.

Model names are those of open_clip: ``ViT-B-32/laion2b_s34b_b79k``, ``hf-hub:org/name`` or ``local-dir:/path``. In
addition, ``sticker-clip`` is the small model that ships with this package and needs no download.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.encoder.identity import BUNDLED_ENCODER, EncoderIdentity
from model.errors import ModelError

logger = logging.getLogger(__name__)

_MAX_CACHED_WORDS = 50_000
_BUNDLED_FOLDER = Path(__file__).parent.parent / "pretrained" / "sticker-clip"


@dataclasses.dataclass(frozen=True, slots=True)
class Preprocessing:
    """Conversion of images to the model's input. Picklable and independent of the model's weights.

    The results equal those of open_clip's transform. Its last two steps, conversion to a float tensor and
    normalisation, are applied once per batch here: for a small image they cost more than its decoding.
    """

    steps: Sequence[Callable[[Any], Any]]
    normalise: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, transform: Any) -> "Preprocessing":
        """Build the preprocessing from open_clip's ``Compose``."""
        *steps, _, normalise = transform.transforms
        return cls(steps, normalise)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Convert images of any size and mode to (B, 3, H, W) float32."""
        return self.to_input(torch.from_numpy(np.stack([self.resize(image) for image in images])))

    def resize(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop an image of any size and mode to the model's size, (H, W, 3) uint8."""
        for step in self.steps:
            image = step(image)
        return np.asarray(image)

    def to_input(self, resized: Tensor) -> Tensor:
        """Normalise resized images (B, H, W, 3) uint8 to (B, 3, H, W) float32 on the same device."""
        return self.normalise(resized.permute(0, 3, 1, 2).contiguous().float() / 255)


class Encoder:
    """A CLIP model that embeds images and texts as unit rows of one space. Inference only, float32 by default."""

    def __init__(
        self, name: str = BUNDLED_ENCODER, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the model ``name`` and compute in ``dtype``. Raises ``ModelError`` if it cannot be loaded."""
        self.name = name
        self.device = torch.device(device)
        architecture, pretrained = _split(name)
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained, precision="fp32", device=self.device
            )
            self._tokenizer = _bounded(open_clip.get_tokenizer(architecture))
            self._padding = _padding_column(self._tokenizer)
        except Exception as error:  # open_clip raises RuntimeError, ValueError, OSError and hub errors alike
            raise ModelError(
                f"encoder cannot be loaded: {name!r} ({error}); use an open_clip model or {BUNDLED_ENCODER}"
            ) from error
        self._model: Any = model.eval().requires_grad_(False)
        self.preprocessing = Preprocessing.of(preprocess)
        self.identity = EncoderIdentity(
            name=name,
            weights_digest=_weights_digest(model),
            preprocess_digest=_preprocess_digest(model),
            dimension=self._dimension(),
        )
        self._dtype = dtype
        self._model.to(dtype)  # after the digest, which is computed from the float32 weights

    @torch.inference_mode()
    def forward(self, batch: Tensor) -> Tensor:
        """Embed preprocessed images (B, 3, H, W) as (B, D) float32 unit rows on the model's device."""
        return F.normalize(self._model.encode_image(batch.to(self.device, self._dtype)).float(), dim=-1)

    def embed_preprocessed(self, batch: Tensor) -> Tensor:
        """Embed preprocessed images (B, 3, H, W) as (B, D) float32 unit rows on the CPU."""
        return self.forward(batch).cpu()

    def embed_images(self, images: Sequence[Image.Image], *, batch_size: int = 128) -> Tensor:
        """Embed images of any size and mode as (len(images), D) float32 unit rows on the CPU."""
        if not images:
            return torch.empty(0, self._dimension())
        chunks = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        return torch.cat([self.embed_preprocessed(self.preprocessing(chunk)) for chunk in chunks])

    def embed_pixels(self, pixels: NDArray[np.uint8], *, batch_size: int = 1024) -> Tensor:
        """Embed images of one size, (N, H, W, 3) uint8, as (N, D) float32 unit rows on the CPU.

        Images of the model's own size are not resized; they are normalised on the device.
        """
        if pixels.shape[1:3] != tuple(self._model.visual.image_size):
            return self.embed_images([Image.fromarray(image) for image in pixels])
        chunks = torch.split(torch.from_numpy(np.ascontiguousarray(pixels)), batch_size)
        return torch.cat(
            [self.embed_preprocessed(self.preprocessing.to_input(chunk.to(self.device))) for chunk in chunks]
        )

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Embed texts as (len(texts), D) float32 unit rows on the CPU; log a warning for each truncated text."""
        if not texts:
            return torch.empty(0, self._dimension())
        chunks = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        tokens = [self._tokenizer(chunk) for chunk in chunks]
        self._warn_of_truncation(texts, torch.cat(tokens))
        rows = [self._model.encode_text(chunk.to(self.device)).float() for chunk in tokens]
        return F.normalize(torch.cat(rows), dim=-1).cpu()

    def _warn_of_truncation(self, texts: Sequence[str], tokens: Tensor) -> None:
        """Log a warning for each row of tokens without padding: its text was almost certainly truncated."""
        (column, padding), length = self._padding, tokens.shape[1]
        for number in (tokens[:, column] != padding).nonzero().flatten().tolist():
            # not the text itself: the prompts of a service are private
            logger.warning(
                "text %d of %d is longer than %d tokens and was truncated", number + 1, len(texts), length - 2
            )

    def _dimension(self) -> int:
        width = getattr(self._model, "text_projection", None)
        if isinstance(width, Tensor):
            return int(width.shape[-1])
        return int(self.embed_texts(["x"]).shape[-1])


def encoder_for(identity: EncoderIdentity, *, device: torch.device | str = "cpu") -> Encoder:
    """Load the encoder of ``identity``. Raises ``ModelError`` if the model of that name has changed."""
    encoder = Encoder(identity.name, device=device)
    if not encoder.identity.same_space(identity):
        raise ModelError(
            f"encoder has changed: it is {encoder.identity}, the embeddings were made with {identity}; restore the old "
            "weights, or embed again"
        )
    return encoder


def _split(name: str) -> tuple[str, str | None]:
    if name == BUNDLED_ENCODER:
        return f"local-dir:{_BUNDLED_FOLDER}", None
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, None
    architecture, slash, pretrained = name.partition("/")
    if not slash:
        raise ModelError(
            f"encoder name without weights: {name!r}; use ARCHITECTURE/WEIGHTS (ViT-B-32/laion2b_s34b_b79k), "
            f"hf-hub:…, local-dir:… or {BUNDLED_ENCODER}"
        )
    return architecture, pretrained


class _WordCache(dict[str, str]):
    """A cache that accepts no further words once it is full. Thread-safe, unlike one that deletes words."""

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) < _MAX_CACHED_WORDS:
            super().__setitem__(word, tokens)


def _bounded(tokenizer: Any) -> Any:
    """Return a tokenizer with a bounded cache. That of open_clip keeps every distinct word permanently."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        tokenizer.cache = _WordCache(tokenizer.cache)
    return tokenizer


def _padding_column(tokenizer: Any) -> tuple[int, int]:
    """Return a token position that is padding unless a text fills its row, and the padding token.

    Some tokenizers always put an end or class token last, so the last position that differs is used.
    """
    empty, full = tokenizer(["", "word " * 1000])
    column = max((empty != full).nonzero().flatten().tolist(), default=0)
    return column, int(empty[column])


def _weights_digest(model: torch.nn.Module) -> str:
    """Return the digest of names, shapes and float32 values, independent of file format and folder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _preprocess_digest(model: torch.nn.Module) -> str:
    settings = open_clip.get_model_preprocess_cfg(model)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode()).hexdigest()
