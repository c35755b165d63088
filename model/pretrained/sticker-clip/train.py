"""Train sticker-clip: a small OpenCLIP model for pictograms whose text tower also follows a sentence encoder.

Source:    `--stickers` folder of parquet files: key, style, license, captions (name first, then keywords), webp (bytes,
           64×64 px on white); `--corpus` text file, one word or short phrase per line (353,530 of WordNet);
           `--teacher` local sentence-transformers folder such as all-MiniLM-L6-v2 (mean pooled); architecture and
           preprocessing are in `open_clip_config.json` in this folder.
Hardware:  one H100, bf16 autocast. On a CPU it runs in float32, which is practical only for a trial.
Run time:  7 minutes, about 3,200 steps of 2,048 pairs; the learning rate depends on elapsed time, not on the step.
Expected:  text-to-image recall@1 of 0.56 on an unseen style, 0.63 on unseen concepts (`README.md`).
Command:   python model/pretrained/sticker-clip/train.py --stickers data/stickers --corpus data/corpus.txt \
               --teacher data/all-MiniLM-L6-v2 --out build/sticker-clip
Trial:     the same with --device cpu --limit 400 --steps 5 --batch-size 32

Loss = l_image + l_teacher + 4 l_distill. l_image matches images to their captions. l_teacher matches images to the
captions' teacher embeddings, mapped by `head` (linear, E to D, not saved). l_distill matches all texts of the batch,
including corpus phrases, to their mapped teacher embeddings.

Legend: `B` pairs in a batch, with 2B more texts; `N` pictograms, `M` maximum captions of one; `V` distinct texts,
`L` tokens per text; `D` embedding width, `E` that of the teacher; `H W` pixels.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from open_clip import CLIP, SimpleTokenizer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor
from transformers import AutoModel, AutoTokenizer

log = logging.getLogger("sticker-clip")
ARCHITECTURE = json.loads(Path(__file__).with_name("open_clip_config.json").read_text())


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of a training run. The defaults are those of the bundled model."""

    stickers: Path
    corpus: Path
    teacher: Path
    out: Path
    minutes: float = 7.0
    device: str = "cuda"
    limit: int | None = None  # pictograms (evenly spaced) and phrases, for a trial run
    steps: int | None = None  # stop after this number even if there is time left
    batch_size: int = 2048
    learning_rate: float = 1.2e-3
    warmup_steps: int = 300
    weight_decay: float = 0.2
    holdout_style: str = "emojione"  # excluded from training
    holdout_one_in: int = 40  # one in this many concepts is excluded from training in all styles
    name_share: float = 0.4  # share of pairs with the name as caption; the others use a random caption
    ignore_above: float = 0.7  # cosine of teacher embeddings above which another caption is not a negative
    distill_weight: float = 4.0
    max_scale: float = 60.0
    ema_decay: float = 0.9995
    log_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for missing paths and non-positive numbers."""
        if missing := [str(path) for path in (self.stickers, self.corpus, self.teacher) if not path.exists()]:
            raise ValueError(f"files not found: {missing}; check --stickers, --corpus and --teacher")
        if min(self.minutes, self.batch_size, *(n for n in (self.limit, self.steps) if n is not None)) <= 0:
            raise ValueError("a number is not positive; check --minutes, --batch-size, --limit and --steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The training data on the device; text ids are row numbers of `tokens` and `teacher`."""

    images: Tensor  # (N, 3, H, W) uint8
    concepts: Tensor  # (N,) int64, shared by the styles
    captions: Tensor  # (N, M) int64 text ids, the name first, padded with -1
    tokens: Tensor  # (V, L) int64
    teacher: Tensor  # (V, E) float32 unit rows
    train: Tensor  # (n,) int64 rows
    holdouts: dict[str, Tensor]  # name -> (n,) int64 rows


def unit(rows: Tensor) -> Tensor:
    """Normalise (n, D) to float32 rows of unit norm."""
    return F.normalize(rows.float(), dim=1)


def read_stickers(folder: Path, limit: int | None) -> dict[str, list[Any]]:
    """Read the columns style, captions and webp of all rows, or of `limit` evenly spaced rows."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise ValueError(f"no parquet files: {folder}; point --stickers at the folder that contains them")
    columns = pq.read_table(files, columns=["style", "captions", "webp"]).to_pydict()
    every = max(1, len(columns["webp"]) // limit) if limit else 1
    return {name: column[::every][:limit] for name, column in columns.items()}


def caption_variants(name: str, *keywords: str) -> list[str]:
    """Return the captions of a pictogram, its name first."""
    joined = [", ".join((name, *keywords[:2]))] if keywords else []
    return [text.strip().lower() for text in (name, *keywords, *joined, f"a sticker of a {name}")]


@torch.no_grad()
def embed_by_teacher(texts: list[str], config: TrainConfig) -> Tensor:
    """Embed texts as (V, E) float32 unit rows: the teacher's last hidden state, averaged over each text's tokens."""
    encoder = AutoModel.from_pretrained(config.teacher).to(config.device).eval().float()
    tokenizer = AutoTokenizer.from_pretrained(config.teacher, model_max_length=64)
    rows = []
    for i in range(0, len(texts), 2048):
        batch = tokenizer(texts[i : i + 2048], padding=True, truncation=True, return_tensors="pt").to(config.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=config.device != "cpu"):
            hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        rows.append(unit((hidden.float() * mask).sum(1) / mask.sum(1)))
    return torch.cat(rows)


def load_data(config: TrainConfig) -> Data:
    """Read, decode, tokenize, embed with the teacher and split the data."""
    stickers = read_stickers(config.stickers, config.limit)
    images = [pil_to_tensor(Image.open(io.BytesIO(webp)).convert("RGB")) for webp in stickers["webp"]]
    variants = [caption_variants(*names) for names in stickers["captions"]]
    phrases = [line.strip().lower() for line in config.corpus.read_text(encoding="utf-8").split("\n")[: config.limit]]
    ids = {text: i for i, text in enumerate(dict.fromkeys([*itertools.chain(*variants), *phrases]))}
    captions = [torch.tensor([ids[text] for text in texts]) for texts in variants]
    tokenizer = SimpleTokenizer(context_length=ARCHITECTURE["model_cfg"]["text_cfg"]["context_length"])

    concepts = [re.sub("[^a-z0-9]+", "-", names[0].lower()).strip("-") for names in stickers["captions"]]
    number = {concept: i for i, concept in enumerate(sorted(set(concepts)))}
    digests = [int(hashlib.md5(concept.encode(), usedforsecurity=False).hexdigest(), 16) for concept in concepts]
    unseen = torch.tensor([digest % config.holdout_one_in == 0 for digest in digests])
    style = torch.tensor([name == config.holdout_style for name in stickers["style"]])
    masks = {"train": ~style & ~unseen, "style": style, "concept": unseen}
    rows = {name: mask.nonzero()[:, 0].to(config.device) for name, mask in masks.items() if mask.any()}
    log.info("%d texts, %d concepts, rows: %s", len(ids), len(number), {k: len(v) for k, v in rows.items()})
    return Data(
        images=torch.stack(images).to(config.device),
        concepts=torch.tensor([number[concept] for concept in concepts], device=config.device),
        captions=nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=-1).to(config.device),
        tokens=tokenizer(list(ids)).to(config.device),
        teacher=embed_by_teacher(list(ids), config),
        train=rows.pop("train"),
        holdouts=rows,
    )


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Change background, shape, brightness, contrast and saturation of (B, 3, H, W) in [0, 1] at random."""
    uniform = functools.partial(torch.rand, len(images), device=images.device, generator=rng)
    # White becomes a random colour in 30% of the images, since the background is independent of the concept.
    white = (images.amin(1, keepdim=True) > 0.97).float() * (uniform(1, 1, 1) < 0.3).float()
    images = images * (1 - white) + uniform(3, 1, 1) * white

    angle, zoom = (uniform() - 0.5) * 0.5, torch.exp((uniform() - 0.35) * 0.6)  # zoom > 1 shrinks
    stretch = torch.exp((uniform() - 0.5) * 0.3) * torch.where(uniform() < 0.3, -1.0, 1.0)  # some mirrored
    cos, sin, shift = angle.cos() * zoom, angle.sin() * zoom, (uniform(2, 1) - 0.5) * 0.4
    rotation = torch.stack([cos * stretch, -sin, sin * stretch, cos], 1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([rotation, shift], 2), list(images.shape), align_corners=False)
    corner = images[:, :, :1, :1]  # fills the area outside of the image
    images = F.grid_sample(images - corner, grid, align_corners=False, padding_mode="zeros") + corner

    mean = images.mean((2, 3), keepdim=True)
    brightness, contrast = (1 + (uniform(1, 1, 1) - 0.5) * 0.5 for _ in range(2))
    images = (images - mean) * contrast + mean * brightness
    gray = images.mean(1, keepdim=True)
    return (gray + (images - gray) * (uniform(1, 1, 1) * 1.4).clamp(max=1)).clamp(0, 1)


def encode_images(clip: CLIP, images: Tensor) -> Tensor:
    """Embed images (B, 3, H, W) in [0, 1] as (B, D) float32 unit rows."""
    pixels = ARCHITECTURE["preprocess_cfg"]
    return unit(clip.encode_image(normalize(images, pixels["mean"], pixels["std"])))


def info_nce(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, B), averaged over rows and columns, for targets (B, B) of row sum 1."""
    return -(target * (F.log_softmax(logits, 1) + F.log_softmax(logits.T, 1))).sum(1).mean() / 2


def losses(clip: CLIP, head: nn.Linear, data: Data, config: TrainConfig, rng: torch.Generator) -> dict[str, Tensor]:
    """Sample a batch and return the scalars `loss`, its parts `image`, `teacher` and `distill`, and `scale`."""
    size, device = config.batch_size, config.device
    rows = data.train[torch.randint(len(data.train), (size,), device=device, generator=rng)]
    use_name = torch.rand(size, device=device, generator=rng) < config.name_share
    pick = torch.rand(size, device=device, generator=rng) * (data.captions[rows] >= 0).sum(1)
    caption = data.captions[rows, pick.long().masked_fill(use_name, 0)]
    texts = torch.cat([caption, torch.randint(len(data.tokens), (2 * size,), device=device, generator=rng)])
    with torch.autocast("cuda", torch.bfloat16, enabled=config.device != "cpu"):
        image = encode_images(clip, augment(data.images[rows].float() / 255, rng))
        text, teacher = unit(clip.encode_text(data.tokens[texts])), unit(head(data.teacher[texts]))

    concept, meaning = data.concepts[rows], data.teacher[caption]
    same = (concept[:, None] == concept) | (caption[:, None] == caption)
    target = same.float() / same.sum(1, keepdim=True)
    ignore = (meaning @ meaning.T > config.ignore_above) & ~same  # near synonyms are neither positives nor negatives
    scale = clip.logit_scale.exp().clamp(max=config.max_scale)
    l_image = info_nce((scale * image @ text[:size].T).masked_fill(ignore, -1e4), target)
    l_teacher = info_nce((scale * image @ teacher[:size].T).masked_fill(ignore, -1e4), target)
    l_distill = (1 - (text * teacher.detach()).sum(1)).mean()
    loss = l_image + l_teacher + config.distill_weight * l_distill
    return {"loss": loss, "image": l_image, "teacher": l_teacher, "distill": l_distill, "scale": scale}


@torch.no_grad()
def evaluate(clip: CLIP, data: Data, config: TrainConfig) -> dict[str, float]:
    """Return recall@1, 5 and 10 of each held-out set. A query is the name of a concept; any of its images is a hit."""
    clip.eval()
    result: dict[str, float] = {}
    for name, rows in data.holdouts.items():
        last_first = rows.flip(0)  # later entries of a dict win, so the name is that of each concept's first row
        queries = dict(zip(data.concepts[last_first].tolist(), data.captions[last_first, 0].tolist(), strict=True))
        concepts, texts = torch.tensor(list(queries.items()), device=config.device).T
        with torch.autocast("cuda", torch.bfloat16, enabled=config.device != "cpu"):
            image = torch.cat([encode_images(clip, data.images[i].float() / 255) for i in torch.split(rows, 1024)])
            text = torch.cat([unit(clip.encode_text(data.tokens[i])) for i in torch.split(texts, 1024)])
            ranked = (text @ image.T).argsort(1, descending=True)[:, :10]
        hits = data.concepts[rows][ranked] == concepts[:, None]
        recalls = {f"{name}/R@{k}": hits[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}
        result |= {**recalls, f"{name}/n": len(concepts)}
    clip.train()
    return result


def train(clip: CLIP, head: nn.Linear, data: Data, config: TrainConfig) -> dict[str, Any]:
    """Train until time or steps run out, copy the averaged weights to `clip` and return the log."""
    rng = torch.Generator(config.device).manual_seed(config.seed)
    groups: dict[float, list[Tensor]] = {config.weight_decay: [], 0.0: []}  # vectors, scale and positions have no decay
    for name, weight in [*clip.named_parameters(), *head.named_parameters()]:
        groups[0.0 if weight.ndim < 2 or "positional" in name else config.weight_decay].append(weight)
    decayed = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    optimizer = torch.optim.AdamW(decayed, lr=config.learning_rate, betas=(0.9, 0.98), fused=config.device != "cpu")
    weights = list(clip.state_dict().values())  # views that follow the optimizer
    average = [weight.clone() for weight in weights]
    history, step, start = [], 0, time.monotonic()
    while (spent := (time.monotonic() - start) / 60 / config.minutes) <= 1 and step != config.steps:
        cosine = 0.98 * 0.5 * (1 + math.cos(math.pi * spent)) + 0.02
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (step + 1) / config.warmup_steps) * cosine
        parts = losses(clip, head, data, config, rng)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(parts["loss"])
        nn.utils.clip_grad_norm_([*clip.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, weights, 1 - min(config.ema_decay, (step + 1) / (step + 10)))
        step += 1
        if step % config.log_every == 0 or step == config.steps:
            scalars = {"minutes": spent * config.minutes} | {name: value.item() for name, value in parts.items()}
            rounded = {name: round(value, 4) for name, value in (scalars | evaluate(clip, data, config)).items()}
            history.append({"step": step, **rounded})
            log.info("%s", history[-1])
    torch._foreach_copy_(weights, average)
    final = {"steps": step, "images_seen": step * config.batch_size, **evaluate(clip, data, config)}
    log.info("%s", final)
    return {"final": final, "log": history}


def main() -> None:
    """Parse the command line, train, and save the float16 model in open_clip's local-dir format."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="Train sticker-clip.", argument_default=argparse.SUPPRESS)
    for name in ("stickers", "corpus", "teacher", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, kind in (("minutes", float), ("device", str), ("limit", int), ("steps", int), ("batch-size", int)):
        parser.add_argument(f"--{name}", type=kind)
    config = TrainConfig(**vars(parser.parse_args()))
    torch.manual_seed(config.seed)
    data = load_data(config)
    clip = CLIP(**ARCHITECTURE["model_cfg"]).to(config.device)
    head = nn.Linear(data.teacher.shape[1], ARCHITECTURE["model_cfg"]["embed_dim"], bias=False).to(config.device)
    history = train(clip, head, data, config)

    config.out.mkdir(parents=True, exist_ok=True)
    state = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in clip.state_dict().items()}
    save_file(state, config.out / "open_clip_model.safetensors")
    (config.out / "open_clip_config.json").write_text(json.dumps(ARCHITECTURE, indent=2))
    (config.out / "train_log.json").write_text(json.dumps(history, indent=1))


if __name__ == "__main__":
    main()
