"""An independent judge of concepts: a small convolutional dual encoder, trained from random weights on icon sets.

    STICKERS=FOLDER make bench NAME=generator      # the folder of make_stickers.py; the judge is trained once

It shares no weights, tokenizer or architecture with ``sticker-clip``, which retrieves, conditions and selects. It has
seen no image of the databases: Twemoji, OpenMoji and EmojiOne are left out, and so is Noto, the largest set of
``sticker-clip`` that is not a database here. The other sets are part of the encoder's training data too.

Text tower: the mean of word vectors, and two linear layers. Image tower: a residual network, trained at 32 px first and
at 64 px then. Loss: InfoNCE with names and keywords. A text is not a negative of an image whose name and keywords
contain all its words. Skin tones and flags are left out. A name is sampled by the square root of the number of its
images.

Legend: ``N`` images, ``B`` of a batch, ``C`` concepts, ``V`` words, ``D`` embedding width, ``S`` side.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from domains import BENCH, SIDE, write_whole
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm.auto import tqdm

LEFT_OUT = frozenset({"twemoji", "openmoji", "emojione", "noto", "flag", "flagpack", "circle-flags"})
"""Sets that the judge does not see: the databases, the encoder's largest other one, and flags."""
SMALL_WORDS = frozenset(
    {"a", "an", "and", "as", "at", "for", "from", "in", "its", "of", "on", "or", "the", "to", "with"}
)
TONE = re.compile(r"(.+?) (?:(?:medium )?(?:light|dark)|medium)(?: skin tone)?")
MAX_WORDS = 12
"""Maximum number of words of a text."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """Settings of the training. They are part of the name of the stored weights.

    Attributes:
        steps: Number of steps.
        small_share: Share of the steps with images of half the size, which cost a quarter.
        batch_size: B.
        learning_rate: Maximum rate of AdamW; it rises for ``warmup`` steps and falls to 0.
        warmup: Number of steps in which the rate rises.
        weight_decay: Of all parameters.
        width: Channels of the first stage.
        dimension: D.
        seed: Seed of weights, batches and augmentation.
    """

    steps: int = 1_200
    small_share: float = 0.6
    batch_size: int = 192
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    width: int = 24
    dimension: int = 256
    seed: int = 1


def words_of(text: str) -> tuple[str, ...]:
    """Return the distinct words of a text in lower case and singular, without articles and prepositions."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    singular = (
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words
    )
    return tuple(dict.fromkeys(word for word in singular if word not in SMALL_WORDS))[:MAX_WORDS]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Icons:
    """The images of the training sets, grouped by name.

    Attributes:
        pixels: (N, 3, S, S) uint8.
        rows: Image rows of each of the C concepts.
        texts: Name and keywords of each concept, the name first.
        digest: Digest of the files.
    """

    pixels: Tensor
    rows: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    digest: str


def icon_files(folder: Path) -> list[Path]:
    """Return the files of the training sets in a folder of make_stickers.py. ``SystemExit`` if there are none."""
    files = sorted(file for file in folder.glob("*.parquet") if file.stem not in LEFT_OUT)
    if not files:
        raise SystemExit(f"the judge has no parquet file to train on: {folder}; run make_stickers.py")
    return files


def captions(files: Sequence[Path]) -> dict[str, list[list[str]]]:
    """Return name and keywords of each image, by the name of its set."""
    return {file.stem: pq.read_table(file, columns=["captions"])["captions"].to_pylist() for file in files}


def read_icons(files: Sequence[Path]) -> Icons:
    """Read the images without skin tones and flags."""
    pixels: list[NDArray[np.uint8]] = []
    rows: dict[tuple[str, ...], list[int]] = {}
    texts: dict[tuple[str, ...], dict[str, None]] = {}
    for file, texts_of_set in zip(files, captions(files).values(), strict=True):
        webps = pq.read_table(file, columns=["webp"])["webp"].to_pylist()
        names = {name for name, *_ in texts_of_set}
        for webp, (name, *keywords) in zip(webps, texts_of_set, strict=True):
            tone = TONE.fullmatch(name)
            if (tone and tone[1] in names) or "flag" in words_of(name):
                continue
            key = tuple(sorted(words_of(name)))
            rows.setdefault(key, []).append(len(pixels))
            texts.setdefault(key, {}).update(dict.fromkeys((name, *keywords)))
            image = Image.open(io.BytesIO(webp)).convert("RGB")
            pixels.append(np.asarray(image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE))))
    rows.pop((), None)
    return Icons(
        pixels=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        rows=tuple(tuple(each) for each in rows.values()),
        texts=tuple(tuple(texts[key]) for key in rows),
        digest=hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest(),
    )


class Block(nn.Module):
    """Two 3 × 3 convolutions and a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_convolution(channels, channels, 1), *_convolution(channels, channels, 1)[:-1])

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(images + self.layers(images), inplace=True)


def _convolution(channels: int, filters: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]


class DualEncoder(nn.Module):
    """An image tower and a text tower of D channels.

    Attributes:
        numbers: Number of each word. Others have no vector.
    """

    def __init__(self, vocabulary: Iterable[str], config: JudgeConfig) -> None:
        """Initialise all weights at random."""
        super().__init__()
        self.numbers = {word: number for number, word in enumerate(sorted(vocabulary), start=1)}
        widths = [config.width * factor for factor in (1, 2, 4, 8)]
        layers = [*_convolution(3, widths[0], 2)]
        for channels, filters in itertools.pairwise(widths):
            layers += [*_convolution(channels, filters, 2), Block(filters)]
        self.images = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.project = nn.Linear(widths[-1], config.dimension)
        self.words = nn.EmbeddingBag(len(self.numbers) + 1, config.dimension, mode="mean", padding_idx=0)
        hidden = 2 * config.dimension
        self.texts = nn.Sequential(nn.Linear(config.dimension, hidden), nn.GELU(), nn.Linear(hidden, config.dimension))
        self.scale = nn.Parameter(torch.tensor(3.0))
        nn.init.normal_(self.words.weight, std=0.5)
        self.to(memory_format=torch.channels_last)

    def known(self, text: str) -> tuple[str, ...]:
        """Return the words of a text that have a vector."""
        return tuple(word for word in words_of(text) if word in self.numbers)

    def encode_images(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, S, S) in [0, 1] as unit rows (B, D)."""
        centred = (images - 0.5).to(memory_format=torch.channels_last) * 4
        return F.normalize(self.project(self.images(centred)), dim=1)

    def encode_words(self, numbers: Tensor) -> Tensor:
        """Embed word numbers (B, MAX_WORDS), padded with 0, as unit rows (B, D)."""
        words = self.words(numbers)
        return F.normalize(words + self.texts(words), dim=1)

    def word_numbers(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """Return the numbers (B, MAX_WORDS) of known words, padded with 0."""
        numbers = torch.zeros(len(texts), MAX_WORDS, dtype=torch.int64)
        for row, words in enumerate(texts):
            numbers[row, : len(words)] = torch.tensor([self.numbers[word] for word in words], dtype=torch.int64)
        return numbers

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts as unit rows (B, D). Words without a vector are ignored."""
        embeddings: NDArray[np.float32] = self.encode_words(
            self.word_numbers([self.known(text) for text in texts])
        ).numpy()
        return embeddings

    @torch.inference_mode()
    def embed_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed pixels (B, S, S, 3) as unit rows (B, D): the mean of each image and its mirror image."""
        batches = (batch.float() / 255 for batch in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(256))
        both = (self.encode_images(batch) + self.encode_images(batch.flip(3)) for batch in batches)
        return np.concatenate([F.normalize(rows, dim=1).numpy() for rows in both])


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Change shape, background, sharpness and colours of images (B, 3, S, S) in [0, 1] at random."""
    uniform = functools.partial(torch.rand, len(images), generator=rng)
    white = (images.amin(1, keepdim=True) > 0.97).float() * (uniform(1, 1, 1) < 0.2).float()
    images = images * (1 - white) + uniform(3, 1, 1) * white
    angle, zoom = (uniform() - 0.5) * 0.6, torch.exp((uniform() - 0.4) * 0.5)  # zoom > 1 shrinks
    mirror = torch.where(uniform() < 0.3, -1.0, 1.0) * torch.exp((uniform() - 0.5) * 0.3)
    cos, sin, shift = angle.cos() * zoom, angle.sin() * zoom, (uniform(2, 1) - 0.5) * 0.3
    grid = torch.cat([torch.stack([cos * mirror, -sin, sin * mirror, cos], 1).view(-1, 2, 2), shift], 2)
    corner = images[:, :, :1, :1]  # fills the area outside of the image
    moved = F.grid_sample(
        images - corner, F.affine_grid(grid, list(images.shape), align_corners=False), align_corners=False
    )
    images = moved + corner
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")  # generated images are less sharp
    images = torch.where(uniform(1, 1, 1) < 0.3, blurred, images)
    images = images + torch.randn(images.shape, generator=rng) * uniform(1, 1, 1) * 0.05
    mean, grey = images.mean((2, 3), keepdim=True), images.mean(1, keepdim=True)
    images = (images - mean) * (0.7 + 0.6 * uniform(1, 1, 1)) + mean * (0.8 + 0.4 * uniform(1, 1, 1))
    return (grey + (images - grey) * (uniform(1, 1, 1) * 2).clamp(max=1)).clamp(0, 1)


def train(icons: Icons, config: JudgeConfig) -> DualEncoder:
    """Train a judge on the CPU."""
    torch.manual_seed(config.seed)
    rng, batches = torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)
    words = [tuple(dict.fromkeys(word for text in texts for word in words_of(text))) for texts in icons.texts]
    model = DualEncoder({word for each in words for word in each}, config)
    has = torch.zeros(len(words), len(model.numbers) + 1)  # (C, V)
    for concept, each in enumerate(words):
        has[concept, [model.numbers[word] for word in each]] = 1
    shares = np.sqrt([len(rows) for rows in icons.rows])
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / config.warmup, 1) * (1 - step / config.steps)
    )
    for step in (bar := tqdm(range(config.steps), desc="train the judge", unit="step", mininterval=5)):
        concepts = batches.choice(len(words), config.batch_size, replace=False, p=shares / shares.sum())
        rows = torch.tensor([batches.choice(icons.rows[concept]) for concept in concepts])
        images = augment(icons.pixels[rows].float() / 255, rng)
        if step < config.small_share * config.steps:
            images = F.avg_pool2d(images, 2)
        numbers = model.word_numbers([sampled_words(icons.texts[concept], batches) for concept in concepts])
        logits = model.encode_images(images) @ model.encode_words(numbers).T * model.scale.exp().clamp(max=50)
        loss = contrastive_loss(logits, describes(numbers, has[concepts]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


def sampled_words(texts: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """Return the words of a name, alone or with a keyword, or of a keyword alone."""
    kind = rng.random()
    name, keyword = texts[0], texts[int(rng.integers(len(texts)))]
    chosen = name if kind < 0.5 else f"{name} {keyword}" if kind < 0.75 else keyword
    return words_of(chosen) or words_of(name)


def describes(numbers: Tensor, has: Tensor) -> Tensor:
    """Return a mask (B, B): image i has all words of text j among its name and keywords."""
    texts = torch.zeros(len(numbers), has.shape[1]).scatter_(1, numbers, 1)
    texts[:, 0] = 0
    return has @ texts.T >= texts.sum(1)


def contrastive_loss(logits: Tensor, ignored: Tensor) -> Tensor:
    """Return InfoNCE in both directions for logits (B, B) whose diagonal pairs belong together."""
    own = torch.arange(len(logits))
    masked = logits.masked_fill(ignored & ~torch.eye(len(logits), dtype=torch.bool), -1e4)
    return (F.cross_entropy(masked, own) + F.cross_entropy(masked.T, own)) / 2


def trained_judge(folder: Path, config: JudgeConfig | None = None) -> DualEncoder:
    """Return the judge trained on the sets in ``folder``, from the cache if these settings and files are there."""
    config, icons = config or JudgeConfig(), read_icons(icon_files(folder))
    settings: dict[str, Any] = dataclasses.asdict(config) | {"data": icons.digest}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = BENCH / "judge" / f"{digest}.safetensors"
    if not path.exists():
        state = train(icons, config).state_dict()
        write_whole(path, lambda file: file.write(save({name: tensor.contiguous() for name, tensor in state.items()})))
    model = DualEncoder({word for texts in icons.texts for text in texts for word in words_of(text)}, config)
    model.load_state_dict(load(path.read_bytes()))
    return model.eval()
