"""The embedded generator on Twemoji, which it has never seen: with neighbours against without.

    make bench NAME=generator [SAMPLES=2000]
    make bench NAME=generator STICKERS=FOLDER     # held against all styles that make_stickers.py makes
    make bench NAME=ablations [SAMPLES=1000]      # without neighbours, each kind of query, 1 to 20 neighbours

The captions are the emoji's names, the database holds Twemoji's own pictures, and steps, guidance and query are the
generator's defaults. Without neighbours an eighth as many are drawn: that mean is far away. As many again are drawn
with neighbours but once each: the default keeps the best of several draws, and the CLIP that chooses is the one that
scores. What has been drawn is kept below ``build/bench/generator``, chunk after chunk, under a digest of all that
decides it: a killed run goes on where it was, and a larger one begins with what a smaller one drew.

Legend: ``N`` samples, ``M`` pictures of Twemoji, ``D`` embedding width, ``S`` side.
"""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from domains import BENCH, embedded, opened, other_domains, rows_of, twemoji, twemoji_files, write_whole
from edit import DTYPE, bench_edit, dtype_of
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from flows.demo.images import emoji_names
from model.encoder.clip import Encoder
from model.images import image_grid
from model.metrics import embedding_metrics
from model.metrics.bootstrap import Score
from model.metrics.embedding_metrics import Embeddings
from model.metrics.scores import ReferenceSet, flatten, score_mean, score_samples
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import DISCRETE, EMBEDDED, pretrained_folder, weights_digest
from model.step_random import mix_seeds
from tasks.evaluate.sampler import ABLATIONS, MAIN, Condition, queries_of

SEED = 0
CHUNK = {"cpu": 64, "cuda": 512}
BASELINE_SHARE, BASELINE_LEAST = 8, 96
"""Of the samples, one in so many is drawn without neighbours too, and once without a choice, but not fewer."""
ONE_DRAW = "knn_one_draw"
TIMED = {"cpu": 16, "cuda": 512}
"""Pictures that ``seconds_per_image`` is measured with, drawn for nothing else."""
SHOWN = 64
"""Pictures of each condition on the contact sheet."""
SHOWN_ABLATED = 12
"""Pictures of each ablation on the contact sheet, in one column: a row is a prompt."""
DEFAULTS = (
    "num_inference_steps", "guidance_scale", "guidance_interval", "neighbours", "trained_neighbours", "candidates",
    "query", "prediction", "truncation",
)  # fmt: skip


def bench_generator(samples: int, device: str, model: str = EMBEDDED) -> dict[str, Any]:
    """CLIP score, distance to Twemoji and to other domains, and copies of ``samples`` pictures; 2,000 are the bar's."""
    scene = Scene.prepare(samples, device, model)
    encoder, own, queries = scene.encoder, scene.own, scene.queries
    others = {source.name: rows_of(embedded(source, encoder)) for source in other_domains()}
    studio, yardstick = scene.studio, scene.yardstick
    counts = counts_of(samples)
    pixels, rows = {}, {}
    for name, count in counts.items():
        candidates = 1 if name == ONE_DRAW else None
        pixels[name] = studio.draw(name, MAIN.get(name, MAIN["knn"]), count, candidates=candidates)
        rows[name] = encoder.embed_pixels(pixels[name]).numpy()
        tqdm.write(f"{name}: CLIP score {embedding_metrics.clip_score(rows[name], queries[:count].numpy()):.4f}")
    save_sheet({name: pixels[name][:SHOWN] for name in MAIN}, BENCH / f"{model}.png")

    def clip_score(pictures: Embeddings) -> Score:
        asked = queries[: len(pictures)].numpy()
        return score_mean(embedding_metrics.pair_cosines(pictures, asked), asked, yardstick, bounds=(-1.0, 1.0))

    knn, no_knn = scene.score(rows["knn"]), clip_score(rows["no_knn"])
    scores = {
        "clip_score_knn": knn["clip_score"],
        "clip_score_no_knn": no_knn,
        f"clip_score_{ONE_DRAW}": clip_score(rows[ONE_DRAW]),
        "clip_score_real": clip_score(scene.described),
    }
    return {
        **flatten(scores | {"fd_own": knn["fd"]}),
        "clip_score_ratio": knn["clip_score"].value / no_knn.value,
        **distances(rows["knn"], own, others),
        "fd_real_split": real_split(own, samples),
        **flatten({name: knn[name] for name in ("copy_rate", "nearest", "precision", "recall")}),
        "copy_threshold": yardstick.threshold,
        "nearest_real": scene.nearest_real,
        "samples": samples,
        **{f"samples_{name}": counts[name] for name in ("no_knn", ONE_DRAW)},
        "seconds_per_image": studio.seconds_per_image(MAIN["knn"]),
        "device": device,
        "dtype": dtype_of(device),
        "weights": studio.settings["weights"],
        **studio.settings["defaults"],
    }


def bench_discrete(samples: int, device: str) -> dict[str, Any]:
    """The same of the discrete generator, and its edits."""
    return {**bench_generator(samples, device, DISCRETE), "edit": bench_edit(device, DISCRETE)}


def bench_ablations(samples: int, device: str) -> dict[str, Any]:
    """Score ``samples`` images for each of ``tasks.evaluate.sampler.ABLATIONS``, which change one default each.

    Every condition draws from the same noise, so that rows compare; their distances are all biased by so few pictures,
    and do not compare with those of another number. Without neighbours the text stands in the query slot.
    """
    scene = Scene.prepare(samples, device)
    scores, sheets = {}, {}
    for name, condition in ABLATIONS.items():
        sheets[name] = scene.studio.draw(f"ablation-{name}", condition, samples)
        scores[name] = flatten(scene.score(scene.encoder.embed_pixels(sheets[name]).numpy()))
        tqdm.write(f"{name}: CLIP score {scores[name]['clip_score']:.3f}, FD {scores[name]['fd']:.3f}")
    shown = {name: pictures[:SHOWN_ABLATED] for name, pictures in sheets.items()}
    save_sheet(shown, BENCH / "ablations.png", columns=1)
    return {
        "samples": samples,
        "fd_real_split": real_split(scene.own, samples),
        "ablations": scores,
        "device": device,
        "dtype": dtype_of(device),
        "weights": scene.studio.settings["weights"],
        **scene.studio.settings["defaults"],
    }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What the generator draws here, and what its pictures are held against."""

    encoder: Encoder
    own: Embeddings
    """(M, D): Twemoji's pictures."""
    queries: torch.Tensor
    """(N, D): the embedded captions."""
    described: Embeddings
    """(N, D): the pictures that the captions name."""
    yardstick: ReferenceSet
    nearest_real: float
    """Mean cosine of a picture to the nearest other one."""
    studio: "Studio"

    @classmethod
    def prepare(cls, samples: int, device: str, model: str = EMBEDDED) -> "Scene":
        """A generator before a database of all Twemoji, and ``samples`` captions."""
        encoder = Encoder(device=device)
        kept = embedded(twemoji(), encoder)
        own = rows_of(kept)
        database = opened(kept, encoder)
        pipeline = KNNDiffusionPipeline.open(pretrained_folder(model), database).to(device, DTYPE[device])
        captions = twemoji_captions(twemoji_files())
        queries, texts = queries_of(pipeline, database, list(captions), samples, SEED)
        # A real picture's nearest is looked for among the others: the threshold says how near two of them are.
        near = database.search(own, 1, exclude=np.arange(len(own))).scores[:, 0]
        return cls(
            encoder=encoder,
            own=own,
            queries=queries,
            described=own[[captions[text] for text in texts]],
            yardstick=ReferenceSet(real=own, threshold=embedding_metrics.copy_threshold(near), seed=SEED),
            nearest_real=float(near[np.isfinite(near)].mean()),
            studio=Studio(pipeline, queries, settings_of(model, pipeline, own, list(captions), device)),
        )

    def score(self, rows: Embeddings) -> dict[str, Score]:
        """Every metric of the pictures (N, D) of all queries."""
        near = self.studio.pipeline.database.search(rows, 1).scores[:, 0]
        return score_samples(rows, self.queries.numpy(), near, self.yardstick)


def twemoji_captions(files: list[Path]) -> dict[str, int]:
    """Unicode's name of every picture that has one, and the picture's row."""
    names = emoji_names()
    codes = ("-".join(part for part in file.stem.split("-") if part != "fe0f") for file in files)
    return {names[code]: row for row, code in enumerate(codes) if code in names}


def settings_of(
    model: str, pipeline: KNNDiffusionPipeline, own: Embeddings, captions: list[str], device: str
) -> dict[str, Any]:
    """All that decides the pictures but the code."""
    scheduler = dict(pipeline.scheduler.config) if pipeline.scheduler is not None else {}
    return {
        "weights": weights_digest(model),
        "defaults": {name: pipeline.config[name] for name in DEFAULTS},
        "scheduler": {name: value for name, value in scheduler.items() if not name.startswith("_")},
        "database": hashlib.sha256(own.tobytes()).hexdigest(),
        "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
        "seed": SEED,
        "device": device,
        **({} if device == "cpu" else {"dtype": dtype_of(device)}),
    }


def counts_of(samples: int) -> dict[str, int]:
    """How many pictures are drawn in each condition."""
    few = min(samples, max(BASELINE_LEAST, samples // BASELINE_SHARE))
    return {"knn": samples, "no_knn": few, ONE_DRAW: few}


class Studio:
    """Draws in chunks and keeps each on disk."""

    def __init__(self, pipeline: KNNDiffusionPipeline, queries: torch.Tensor, settings: dict[str, Any]) -> None:
        """Draw from ``queries`` (N, D), chunk by chunk from the same noise in every condition."""
        self.pipeline, self._queries, self.settings = pipeline, queries, settings
        told = json.dumps(settings, sort_keys=True)
        self._folder = BENCH / "generator" / hashlib.sha256(told.encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "settings.json").write_text(json.dumps(settings, indent=1))

    def draw(self, name: str, condition: Condition, count: int, *, candidates: int | None = None) -> NDArray[np.uint8]:
        """Pictures (count, S, S, 3) of the first ``count`` queries, each the best of ``candidates`` (None: default)."""
        size = CHUNK[self.pipeline.device.type]
        pixels = []
        with tqdm(desc=f"draw {name}", total=count, unit="picture", mininterval=2, leave=False) as bar:
            for start in range(0, count, size):
                queries = self._queries[start : min(start + size, count)]
                kept = self._folder / f"{name}-{start:06d}-{len(queries)}.npz"
                if not kept.exists():
                    self._draw(queries, {**dataclasses.asdict(condition), "candidates": candidates}, start, kept, bar)
                with np.load(kept) as chunk:
                    pixels.append(chunk["pixels"])
                bar.update(start + len(queries) - bar.n)
        return np.concatenate(pixels)

    def seconds_per_image(self, condition: Condition) -> float:
        """What one takes here and now, the search in the database included."""
        queries = self._queries[: TIMED[self.pipeline.device.type]]
        self.pipeline(queries, num_inference_steps=1, **dataclasses.asdict(condition))  # warm
        started = time.perf_counter()
        self.pipeline(queries, **dataclasses.asdict(condition))
        return (time.perf_counter() - started) / len(queries)

    def _draw(self, queries: torch.Tensor, options: dict[str, Any], start: int, path: Path, bar: tqdm) -> None:
        def told(step: int, steps: int) -> None:
            bar.update(start + round(len(queries) * step / steps) - bar.n)

        output = self.pipeline(
            queries,
            generator=torch.Generator().manual_seed(mix_seeds(SEED, start)),
            on_progress=told,
            **options,
        )
        pixels = np.stack([np.asarray(image) for image in output.images])
        write_whole(path, lambda file: np.savez(file, pixels=pixels))


def distances(rows: Embeddings, own: Embeddings, others: dict[str, Embeddings]) -> dict[str, Any]:
    """Fréchet distance of the samples to each other domain, and to their own over as many pictures: those compare."""
    told = {}
    for name, other in others.items():
        count = min(len(own), len(other))
        told[name] = {
            "fd": embedding_metrics.frechet_distance(rows, _some(other, count)),
            "fd_own": embedding_metrics.frechet_distance(rows, _some(own, count)),
            "pictures": count,
        }
    closest = min(told, key=lambda name: told[name]["fd"], default=None)
    return {
        "fd_other": told[closest]["fd"] if closest else None,
        "fd_other_domain": closest,
        "own_is_closest": all(each["fd_own"] < each["fd"] for each in told.values()) if told else None,
        "fd_others": told,
    }


def real_split(own: Embeddings, samples: int) -> float:
    """What as many real pictures score against the rest of their domain, at most half of it."""
    order = np.random.default_rng(SEED).permutation(len(own))
    count = min(samples, len(own) // 2)
    return embedding_metrics.frechet_distance(own[order[:count]], own[order[count:]])


def save_sheet(sheets: dict[str, NDArray[np.uint8]], path: Path, columns: int = 8) -> None:
    """The conditions side by side, each under its name."""
    titles = {"knn": "with neighbours", "no_knn": "without neighbours"}
    made = {
        name: image_grid([Image.fromarray(picture) for picture in pixels], columns) for name, pixels in sheets.items()
    }
    gap, title = 24, 20
    width, height = next(iter(made.values())).size
    page = Image.new("RGB", (len(made) * (width + gap) - gap, height + title), "white")
    for number, (name, sheet) in enumerate(made.items()):
        page.paste(sheet, (number * (width + gap), title))
        ImageDraw.Draw(page).text((number * (width + gap) + 4, 4), titles.get(name, name), fill="black")
    page.save(path)


def _some(rows: Embeddings, count: int) -> Embeddings:
    return rows[np.random.default_rng(SEED).permutation(len(rows))[:count]]
