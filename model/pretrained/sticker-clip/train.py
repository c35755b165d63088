"""Train sticker-clip: a small OpenCLIP model for pictograms whose text tower also follows a sentence encoder.

Source:    `--stickers` folder of parquet files of make_stickers.py (key, style, license, captions, webp);
           `--corpus` text file, one word or short phrase per line;
           `--teacher` local sentence-transformers folder such as all-MiniLM-L6-v2 (mean pooled); architecture and
           preprocessing are in `open_clip_config.json` in this folder.
Hardware:  one H100, bf16 autocast. On a CPU it runs in float32, which is practical only for a trial.
Run time:  7 minutes, about 3,200 steps of 2,048 pairs; the learning rate depends on elapsed time, not on the step.
Command:   python model/pretrained/sticker-clip/train.py --stickers data/stickers --corpus data/corpus.txt \
               --teacher data/all-MiniLM-L6-v2 --out build/sticker-clip --minutes 20 --stop-after 12
Trial:     the same with --device cpu --limit 400 --steps 5 --batch-size 32
Figures:   python model/pretrained/sticker-clip/evaluate.py --stickers data/stickers \
               --encoder local-dir:build/sticker-clip

Twemoji, OpenMoji and EmojiOne are excluded from the training, whatever `--styles` names. They measure retrieval, as do
concepts that are held out in all styles. A run that ends after `--stop-after` minutes saves its state in OUT; the same
command resumes it. `train_log.json` has the retrieval of the bundled encoder next to that of the new one. Another
encoder has another identity: databases and generators of the old one do not accept it and must be rebuilt.

Loss = l_image + l_teacher + 4 l_distill. l_image matches images to their captions. l_teacher matches images to the
captions' teacher embeddings, mapped by `head` (linear, E to D, not saved). l_distill matches all texts of the batch,
including corpus phrases, to their mapped teacher embeddings.

Legend: `B` pairs in a batch, with 2B more texts; `N` pictograms, `M` maximum captions of one; `V` distinct texts,
`L` tokens per text; `D` embedding width, `E` that of the teacher; `H W` pixels.
"""

import argparse
import functools
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from clip_recipe.data import ARCHITECTURE, Data, load_data, unit
from clip_recipe.retrieval import retrieval
from open_clip import CLIP, SimpleTokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

log = logging.getLogger("sticker-clip")
BUNDLED = Path(__file__).with_name("open_clip_model.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of a training run. The defaults are those of the bundled model."""

    stickers: Path
    corpus: Path
    teacher: Path
    out: Path
    styles: list[str] | None = None  # to train on; None for all, in both cases without the unseen ones
    minutes: float = 7.0  # of the whole training
    stop_after: float = math.inf  # minutes of this run
    device: str = "cuda"
    limit: int | None = None  # pictograms per style (evenly spaced) and phrases, for a trial run
    steps: int | None = None  # stop after this number even if there is time left
    batch_size: int = 2048
    learning_rate: float = 1.2e-3
    warmup_steps: int = 300
    weight_decay: float = 0.2
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
        numbers = (self.limit, self.steps)
        if min(self.minutes, self.stop_after, self.batch_size, *(n for n in numbers if n is not None)) <= 0:
            raise ValueError(
                "a number is not positive; check --minutes, --stop-after, --batch-size, --limit and --steps"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that must not change between the runs of a training."""
        where = ("out", "device", "stop_after")
        return {name: str(value) for name, value in asdict(self).items() if name not in where}


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
    rows: Tensor = unit(clip.encode_image(normalize(images, pixels["mean"], pixels["std"])))
    return rows


def info_nce(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, B), averaged over rows and columns, for targets (B, B) of row sum 1."""
    return -(target * (F.log_softmax(logits, 1) + F.log_softmax(logits.T, 1))).sum(1).mean() / 2


def losses(clip: CLIP, head: nn.Linear, data: Data, config: TrainConfig, rng: torch.Generator) -> dict[str, Tensor]:
    """Sample a batch and return the scalars `loss`, its parts `image`, `teacher` and `distill`, and `scale`."""
    size, device = config.batch_size, config.device
    rows = torch.randint(len(data.images), (size,), device=device, generator=rng)
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
def evaluate(clip: CLIP, data: Data, config: TrainConfig) -> dict[str, dict[str, float]]:
    """Return the retrieval figures of each held-out set."""
    clip.eval()
    tokenizer = SimpleTokenizer(context_length=ARCHITECTURE["model_cfg"]["text_cfg"]["context_length"])
    autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16, enabled=config.device != "cpu")

    def embed_images(images: Tensor) -> Tensor:
        with autocast():
            chunks = (chunk.to(config.device).float() / 255 for chunk in torch.split(images, 1024))
            return torch.cat([encode_images(clip, chunk) for chunk in chunks])

    def embed_texts(texts: Sequence[str]) -> Tensor:
        with autocast():
            chunks = torch.split(tokenizer(list(texts)).to(config.device), 1024)
            return torch.cat([unit(clip.encode_text(chunk)) for chunk in chunks])

    found = {
        name: retrieval(style.images, style.names, embed_images, embed_texts) for name, style in data.held_out.items()
    }
    clip.train()
    return found


class State:
    """State from which a run resumes: weights, optimizer, average, generator, elapsed time and log."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        """Store the state in ``path``."""
        self._path, self._identity = path, config.identity
        self.step, self.seconds, self.history = 0, 0.0, list[dict[str, Any]]()

    def resume(self, parts: dict[str, Any], average: list[Tensor], rng: torch.Generator) -> None:
        """Load a stored state into ``parts``, ``average`` and ``rng``. Exit if it is that of another training."""
        if not self._path.exists():
            return
        stored = torch.load(self._path, map_location="cpu", weights_only=True)
        if changed := [name for name, value in self._identity.items() if stored["identity"].get(name) != value]:
            raise SystemExit(f"settings differ from those of {self._path}: {', '.join(changed)}; use another --out")
        for name, part in parts.items():
            part.load_state_dict(stored[name])
        torch._foreach_copy_(average, [value.to(average[0].device) for value in stored["average"]])
        rng.set_state(stored["rng"])
        self.step, self.seconds, self.history = stored["step"], stored["seconds"], stored["history"]
        log.info("resumed at step %d, after %.1f minutes", self.step, self.seconds / 60)

    def save(self, parts: dict[str, Any], average: list[Tensor], rng: torch.Generator) -> None:
        """Replace the stored state."""
        content = {name: part.state_dict() for name, part in parts.items()}
        content |= {"average": average, "rng": rng.get_state(), "identity": self._identity}
        content |= {"step": self.step, "seconds": self.seconds, "history": self.history}
        unfinished = self._path.with_suffix(".partial")
        torch.save(content, unfinished)
        unfinished.rename(self._path)


def new_optimizer(clip: CLIP, head: nn.Linear, config: TrainConfig) -> torch.optim.AdamW:
    """Return the optimizer; vectors, scale and positions have no weight decay."""
    groups: dict[float, list[Tensor]] = {config.weight_decay: [], 0.0: []}
    for name, weight in [*clip.named_parameters(), *head.named_parameters()]:
        groups[0.0 if weight.ndim < 2 or "positional" in name else config.weight_decay].append(weight)
    decayed = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    return torch.optim.AdamW(decayed, lr=config.learning_rate, betas=(0.9, 0.98), fused=config.device != "cpu")


def train(clip: CLIP, head: nn.Linear, data: Data, config: TrainConfig) -> dict[str, Any]:
    """Train until time or steps run out, copy the averaged weights to `clip` and return the log.

    Exits with a saved state if the run ends before the training.
    """
    rng = torch.Generator(config.device).manual_seed(config.seed)
    optimizer = new_optimizer(clip, head, config)
    weights = list(clip.state_dict().values())  # views that follow the optimizer
    average = [weight.clone() for weight in weights]
    state, parts = State(config.out / "state.pt", config), {"clip": clip, "head": head, "optimizer": optimizer}
    state.resume(parts, average, rng)
    begun, start = state.seconds, time.monotonic()
    while (spent := state.seconds / 60 / config.minutes) <= 1 and state.step != config.steps:
        if state.seconds - begun >= 60 * config.stop_after:
            state.save(parts, average, rng)
            raise SystemExit(f"stopped after {state.step} steps; run the same command again to resume")
        cosine = 0.98 * 0.5 * (1 + math.cos(math.pi * spent)) + 0.02
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (state.step + 1) / config.warmup_steps) * cosine
        values = losses(clip, head, data, config, rng)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(values["loss"])
        nn.utils.clip_grad_norm_([*clip.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, weights, 1 - min(config.ema_decay, (state.step + 1) / (state.step + 10)))
        state.step += 1
        state.seconds = begun + time.monotonic() - start
        if state.step % config.log_every == 0 or state.step == config.steps:
            scalars = {"minutes": state.seconds / 60} | {name: value.item() for name, value in values.items()}
            rounded = {name: round(value, 4) for name, value in scalars.items()}
            state.history.append({"step": state.step, **rounded, "retrieval": evaluate(clip, data, config)})
            log.info("%s", state.history[-1])
            state.save(parts, average, rng)
    torch._foreach_copy_(weights, average)
    return {"steps": state.step, "images_seen": state.step * config.batch_size, "log": state.history}


def main() -> None:
    """Parse the command line, train, and save the float16 model in open_clip's local-dir format."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description="Train sticker-clip.", argument_default=argparse.SUPPRESS)
    for name in ("stickers", "corpus", "teacher", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--styles", nargs="+", metavar="STYLE")
    for name, kind in (
        ("minutes", float), ("stop-after", float), ("device", str), ("limit", int), ("steps", int), ("batch-size", int)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    config = TrainConfig(**vars(parser.parse_args()))
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    data = load_data(
        stickers=config.stickers, styles=config.styles, corpus=config.corpus, teacher=config.teacher,
        device=config.device, limit=config.limit, concepts_held_out=config.holdout_one_in,
    )  # fmt: skip
    clip = CLIP(**ARCHITECTURE["model_cfg"]).to(config.device)
    head = nn.Linear(data.teacher.shape[1], ARCHITECTURE["model_cfg"]["embed_dim"], bias=False).to(config.device)
    history = train(clip, head, data, config)
    history["retrieval"] = {"this": evaluate(clip, data, config)}

    state = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in clip.state_dict().items()}
    save_file(state, config.out / "open_clip_model.safetensors")
    (config.out / "open_clip_config.json").write_text(json.dumps(ARCHITECTURE, indent=2))
    clip.load_state_dict(load_file(BUNDLED))
    history["retrieval"]["bundled"] = evaluate(clip, data, config)
    (config.out / "train_log.json").write_text(json.dumps(history, indent=1))
    log.info("%s", history["retrieval"])


if __name__ == "__main__":
    main()
