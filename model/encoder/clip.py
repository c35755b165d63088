"""The encoder: an open_clip model behind three methods, and its identity.

Legend: ``B`` batch, ``D`` embedding width, ``C H W`` a picture.

Model strings are open_clip's own: ``ViT-B-32/laion2b_s34b_b79k``, ``hf-hub:org/name``, ``local-dir:/path``. One more,
``sticker-clip``, names the small model that ships with this package and needs no download.
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

from model.encoder.identity import EMBEDDED, EncoderIdentity
from model.errors import ModelError

logger = logging.getLogger(__name__)

_EMBEDDED_FOLDER = Path(__file__).parent.parent / "pretrained" / "sticker-clip"


@dataclasses.dataclass(frozen=True, slots=True)
class Preprocessing:
    """From pictures to the model's input, without the model: it may be sent to another process.

    The values are those of open_clip's own transform, whose last two steps are a conversion to a float tensor and a
    normalisation: here they are taken once for the batch, for a small picture's cost more than its decoding.
    """

    steps: Sequence[Callable[[Any], Any]]
    normalise: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, transform: Any) -> "Preprocessing":
        """What open_clip's ``Compose`` does."""
        *steps, _, normalise = transform.transforms
        return cls(steps, normalise)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size and mode to (B, 3, H, W) float32."""
        return self.scaled(torch.from_numpy(np.stack([self.fitted(image) for image in images])))

    def fitted(self, image: Image.Image) -> NDArray[np.uint8]:
        """A picture of any size and mode to the model's size, (H, W, 3)."""
        for step in self.steps:
            image = step(image)
        return np.asarray(image)

    def scaled(self, fitted: Tensor) -> Tensor:
        """(B, H, W, 3) uint8, fitted, to (B, 3, H, W) float32 on the same device."""
        return self.normalise(fitted.permute(0, 3, 1, 2).contiguous().float() / 255)


class Encoder:
    """Pictures and texts to unit rows in one space. Inference only; float32 unless told."""

    def __init__(
        self, name: str = EMBEDDED, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the model ``name`` and compute in ``dtype``. Raises ``ModelError`` when there is none."""
        self.name = name
        self.device = torch.device(device)
        architecture, pretrained = _split(name)
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained, precision="fp32", device=self.device
            )
            self._tokenizer = open_clip.get_tokenizer(architecture)
            self._full = _full_column(self._tokenizer)
        except Exception as error:  # open_clip raises RuntimeError, ValueError, OSError and hub errors alike
            raise ModelError(
                f"encoder {name!r} cannot be loaded ({error}); name an open_clip model or {EMBEDDED}"
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
        self._model.to(dtype)  # after the digest, which is of the float32 weights

    @torch.inference_mode()
    def forward(self, batch: Tensor) -> Tensor:
        """Preprocessed (B, 3, H, W) to (B, D) float32 unit rows on the model's device."""
        return F.normalize(self._model.encode_image(batch.to(self.device, self._dtype)).float(), dim=-1)

    def embed_preprocessed(self, batch: Tensor) -> Tensor:
        """Preprocessed (B, 3, H, W) to (B, D) float32 unit rows on the CPU."""
        return self.forward(batch).cpu()

    def embed_images(self, images: Sequence[Image.Image], *, batch_size: int = 128) -> Tensor:
        """Pictures to (len(images), D) float32 unit rows."""
        if not images:
            return torch.empty(0, self._dimension())
        chunks = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        return torch.cat([self.embed_preprocessed(self.preprocessing(chunk)) for chunk in chunks])

    def embed_pixels(self, pixels: NDArray[np.uint8], *, batch_size: int = 1024) -> Tensor:
        """Pictures of one size (N, H, W, 3) uint8 to (N, D) float32 unit rows.

        Those of the model's own size need no fitting; they are scaled on the device.
        """
        if pixels.shape[1:3] != tuple(self._model.visual.image_size):
            return self.embed_images([Image.fromarray(picture) for picture in pixels])
        chunks = torch.split(torch.from_numpy(np.ascontiguousarray(pixels)), batch_size)
        return torch.cat(
            [self.embed_preprocessed(self.preprocessing.scaled(chunk.to(self.device))) for chunk in chunks]
        )

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Texts to (len(texts), D) float32 unit rows; a text past the context length is cut, and a warning says so."""
        if not texts:
            return torch.empty(0, self._dimension())
        chunks = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        tokens = [self._tokenizer(chunk) for chunk in chunks]
        self._warn_of_cut(texts, torch.cat(tokens))
        rows = [self._model.encode_text(chunk.to(self.device)).float() for chunk in tokens]
        return F.normalize(torch.cat(rows), dim=-1).cpu()

    def _warn_of_cut(self, texts: Sequence[str], tokens: Tensor) -> None:
        """A row without padding is full: all but certainly a text that was cut."""
        (column, padding), length = self._full, tokens.shape[1]
        for number in (tokens[:, column] != padding).nonzero().flatten().tolist():
            logger.warning("the text %.40r … is longer than %d tokens; the rest is left out", texts[number], length - 2)

    def _dimension(self) -> int:
        width = getattr(self._model, "text_projection", None)
        if isinstance(width, Tensor):
            return int(width.shape[-1])
        return int(self.embed_texts(["x"]).shape[-1])


def encoder_for(identity: EncoderIdentity, *, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of that identity. Raises ``ModelError`` when the model of that name is no longer the same."""
    encoder = Encoder(identity.name, device=device)
    if not encoder.identity.same_space(identity):
        raise ModelError(f"{encoder.identity} is not what was embedded with, {identity}; embed again, or restore it")
    return encoder


def _split(name: str) -> tuple[str, str | None]:
    if name == EMBEDDED:
        return f"local-dir:{_EMBEDDED_FOLDER}", None
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, None
    architecture, slash, pretrained = name.partition("/")
    if not slash:
        raise ModelError(
            f"encoder {name!r} names no weights; write ARCHITECTURE/WEIGHTS (ViT-B-32/laion2b_s34b_b79k), "
            f"hf-hub:…, local-dir:… or {EMBEDDED}"
        )
    return architecture, pretrained


def _full_column(tokenizer: Any) -> tuple[int, int]:
    """Where tokens tell whether a text fills its row, and what stands there if not.

    The last place is the end's or the class's with some tokenizers, whatever the text: it is the last that differs.
    """
    empty, full = tokenizer(["", "word " * 1000])
    column = max((empty != full).nonzero().flatten().tolist(), default=0)
    return column, int(empty[column])


def _weights_digest(model: torch.nn.Module) -> str:
    """Digest of names, shapes and float32 values, so the file format and folder do not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _preprocess_digest(model: torch.nn.Module) -> str:
    settings = open_clip.get_model_preprocess_cfg(model)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode()).hexdigest()
