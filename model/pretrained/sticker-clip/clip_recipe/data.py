"""Training data of sticker-clip: images, captions, texts and their teacher embeddings, and the held-out styles.

Legend: ``N`` pictograms, ``M`` maximum captions of one; ``V`` distinct texts, ``L`` tokens per text; ``E`` embedding
width of the teacher; ``H W`` pixels.
"""

import hashlib
import io
import itertools
import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

_FOLDER = Path(__file__).parents[1]
sys.path.append(str(_FOLDER.with_name("sticker-generator")))  # no package contains these scripts

from sticker_recipe.styles import UNSEEN, training_styles  # noqa: E402

ARCHITECTURE = json.loads((_FOLDER / "open_clip_config.json").read_text())
SIDE = ARCHITECTURE["model_cfg"]["vision_cfg"]["image_size"]
log = logging.getLogger("sticker-clip")


class Style(NamedTuple):
    """Images (N, 3, H, W) uint8 of a held-out style, and their names."""

    images: Tensor
    names: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The training data on the device; text ids are row numbers of `tokens` and `teacher`."""

    images: Tensor  # (N, 3, H, W) uint8
    concepts: Tensor  # (N,) int64, shared by the styles
    captions: Tensor  # (N, M) int64 text ids, the name first, padded with -1
    tokens: Tensor  # (V, L) int64
    teacher: Tensor  # (V, E) float32 unit rows
    held_out: dict[str, Style]  # the unseen styles, and the held-out concepts as "concepts"


def unit(rows: Tensor) -> Tensor:
    """Normalise (n, D) to float32 rows of unit norm."""
    return F.normalize(rows.float(), dim=1)


def read_stickers(folder: Path, styles: list[str] | None, limit: int | None) -> dict[str, list[Any]]:
    """Read the columns style, captions and webp of the styles to train on, and of the unseen ones.

    Args:
        folder: Folder of the parquet files.
        styles: Styles to train on; None for all.
        limit: Number of evenly spaced rows to use of each style; None for all.

    Raises:
        ValueError: There are no files, a style has no file, or a style is another edition of an unseen one.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
    chosen = training_styles(list(paths) if styles is None else styles)
    if missing := [style for style in chosen if style not in paths]:
        raise ValueError(f"styles have no file in {folder}: {missing}; build them with make_stickers.py")
    if not chosen:
        raise ValueError(f"no styles to train on: {folder}; point --stickers at the folder of the parquet files")
    columns: dict[str, list[Any]] = {"style": [], "captions": [], "webp": []}
    for style in [*chosen, *sorted(UNSEEN & paths.keys())]:
        rows = pq.read_table(paths[style], columns=list(columns)).to_pydict()
        if set(rows["style"]) != {style}:
            raise ValueError(f"{paths[style]} has other styles than its name; write one file per style")
        every = max(1, len(rows["style"]) // limit) if limit else 1
        for name, column in columns.items():
            column.extend(rows[name][::every][:limit])
    return columns


def decode(webp: bytes) -> Tensor:
    """Decode an image to (3, H, W) uint8 of the input size, resized as in the preprocessing of the model."""
    image = Image.open(io.BytesIO(webp)).convert("RGB")
    pixels: Tensor = pil_to_tensor(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))  # a copy at this size
    return pixels


def read_style(path: Path) -> Style:
    """Read the images and names of a style."""
    rows = pq.read_table(path, columns=["captions", "webp"]).to_pydict()
    names = [captions[0].strip().lower() for captions in rows["captions"]]
    return Style(torch.stack([decode(webp) for webp in rows["webp"]]), names)


def caption_variants(name: str, *keywords: str) -> list[str]:
    """Return the captions of a pictogram, its name first."""
    joined = [", ".join((name, *keywords[:2]))] if keywords else []
    return [text.strip().lower() for text in (name, *keywords, *joined, f"a sticker of a {name}")]


@torch.no_grad()
def embed_by_teacher(texts: list[str], teacher: Path, device: str) -> Tensor:
    """Embed texts as (V, E) float32 unit rows: the teacher's last hidden state, averaged over each text's tokens."""
    from transformers import AutoModel, AutoTokenizer  # no dependency of the package: only this training needs it

    encoder = AutoModel.from_pretrained(teacher).to(device).eval().float()
    tokenizer = AutoTokenizer.from_pretrained(teacher, model_max_length=64)
    rows = []
    for i in range(0, len(texts), 2048):
        batch = tokenizer(texts[i : i + 2048], padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
            hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        rows.append(unit((hidden.float() * mask).sum(1) / mask.sum(1)))
    return torch.cat(rows)


def load_data(
    *,
    stickers: Path,
    styles: list[str] | None,
    corpus: Path,
    teacher: Path,
    device: str,
    limit: int | None,
    concepts_held_out: int,
) -> Data:
    """Read, decode, tokenize, embed with the teacher and split the data.

    One in ``concepts_held_out`` concepts is held out in all styles. Images of unseen styles are in no training array.
    """
    rows = read_stickers(stickers, styles, limit)
    names = [captions[0].strip().lower() for captions in rows["captions"]]
    slugs = [re.sub("[^a-z0-9]+", "-", name).strip("-") for name in names]
    digests = [int(hashlib.md5(slug.encode(), usedforsecurity=False).hexdigest(), 16) for slug in slugs]
    groups: dict[str, list[int]] = {}
    for row, (style, digest) in enumerate(zip(rows["style"], digests, strict=True)):
        held_out = style if style in UNSEEN else "concepts" if digest % concepts_held_out == 0 else "training"
        groups.setdefault(held_out, []).append(row)
    training = groups.pop("training")
    log.info("%d images to train on; held out: %s", len(training), {name: len(ids) for name, ids in groups.items()})

    variants = [caption_variants(*rows["captions"][row]) for row in training]
    phrases = [line.strip().lower() for line in corpus.read_text(encoding="utf-8").split("\n")[:limit]]
    ids = {text: i for i, text in enumerate(dict.fromkeys([*itertools.chain(*variants), *phrases]))}
    captions = [torch.tensor([ids[text] for text in texts]) for texts in variants]
    number = {slug: i for i, slug in enumerate(sorted({slugs[row] for row in training}))}
    tokenizer = SimpleTokenizer(context_length=ARCHITECTURE["model_cfg"]["text_cfg"]["context_length"])

    def images(chosen: list[int]) -> Tensor:
        return torch.stack([decode(rows["webp"][row]) for row in chosen])

    return Data(
        images=images(training).to(device),
        concepts=torch.tensor([number[slugs[row]] for row in training], device=device),
        captions=nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=-1).to(device),
        tokens=tokenizer(list(ids)).to(device),
        teacher=embed_by_teacher(list(ids), teacher, device),
        held_out={name: Style(images(chosen), [names[row] for row in chosen]) for name, chosen in groups.items()},
    )
