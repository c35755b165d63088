"""The bundled generator with the names of Twemoji, which it was not trained on: with neighbours against without.

    make bench NAME=names [SAMPLES=2000]
    make bench NAME=names STICKERS=FOLDER         # compared with all styles of make_stickers.py
    make bench NAME=ablations [SAMPLES=1000]      # without neighbours, each kind of query, 1 to 20 neighbours

The captions are the names of the emoji, the database has the images of Twemoji, and steps, guidance and query are the
defaults of the generator. Without neighbours an eighth as many images are generated, because the means differ widely.
The same number is generated with neighbours and one candidate each: the default keeps the best of several candidates,
and the CLIP model that selects is the one that scores. Generated chunks are cached below ``build/bench/generator``, by
the digest of all settings. So a killed run resumes, and a larger run reuses the chunks of a smaller one.

Legend: ``N`` samples, ``M`` images of Twemoji, ``D`` embedding width, ``S`` side.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Sequence
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
from model.saved_generator import BUNDLED_GENERATOR, DISCRETE, pretrained_folder, weights_digest
from model.step_random import mix_seeds
from tasks.evaluate.sampler import ABLATIONS, MAIN, Condition, queries_of

SKIN_TONE = re.compile(r" (?:medium-dark|medium-light|medium|dark|light) skin tone")
SEED = 0
CHUNK = {"cpu": 64, "cuda": 512}
BASELINE_SHARE, BASELINE_LEAST = 8, 96
"""One in BASELINE_SHARE samples, at least BASELINE_LEAST, is repeated without neighbours and with one candidate."""
ONE_DRAW = "knn_one_draw"
TIMED = {"cpu": 16, "cuda": 512}
"""Number of images to measure ``seconds_per_image``."""
SHOWN = 64
"""Images per condition on the contact sheet."""
SHOWN_ABLATED = 12
"""Images per ablation on the contact sheet, in one column; a row is a prompt."""
DEFAULTS = (
    "num_inference_steps", "guidance_scale", "guidance_interval", "neighbours", "trained_neighbours", "candidates",
    "query", "prediction", "truncation",
)  # fmt: skip


def bench_names(samples: int, device: str, model: str = BUNDLED_GENERATOR) -> dict[str, Any]:
    """Return CLIP score, distances to Twemoji and other domains, and copies for ``samples`` images (2,000 in docs)."""
    scene = Scene.prepare(samples, device, model)
    encoder, own, queries = scene.encoder, scene.own, scene.queries
    others = {source.name: rows_of(embedded(source, encoder)) for source in other_domains()}
    studio, reference = scene.studio, scene.reference
    counts = counts_of(samples)
    pixels, rows = {}, {}
    for name, count in counts.items():
        candidates = 1 if name == ONE_DRAW else None
        pixels[name] = studio.draw(name, MAIN.get(name, MAIN["knn"]), count, candidates=candidates)
        rows[name] = encoder.embed_pixels(pixels[name]).numpy()
        tqdm.write(f"{name}: CLIP score {embedding_metrics.clip_score(rows[name], queries[:count].numpy()):.4f}")
    save_sheet({name: pixels[name][:SHOWN] for name in MAIN}, BENCH / f"{model}.png")

    def clip_score(images: Embeddings) -> Score:
        texts = queries[: len(images)].numpy()
        return score_mean(embedding_metrics.pair_cosines(images, texts), texts, reference, bounds=(-1.0, 1.0))

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
        "fd_real": real_distance(own, samples),
        **flatten({name: knn[name] for name in ("copy_rate", "nearest", "precision", "recall")}),
        "copy_threshold": reference.threshold,
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
    """Return the same for the discrete generator, and its edits."""
    return {**bench_names(samples, device, DISCRETE), "edit": bench_edit(device, DISCRETE)}


def bench_ablations(samples: int, device: str) -> dict[str, Any]:
    """Score ``samples`` images for each of ``tasks.evaluate.sampler.ABLATIONS``, which change one default each.

    Every condition starts from the same noise, so that rows are comparable. The distances are biased by the small
    number of images, and not comparable with those of another number. Without neighbours the query slot has the text.
    """
    scene = Scene.prepare(samples, device)
    scores, sheets = {}, {}
    for name, condition in ABLATIONS.items():
        sheets[name] = scene.studio.draw(f"ablation-{name}", condition, samples)
        scores[name] = flatten(scene.score(scene.encoder.embed_pixels(sheets[name]).numpy()))
        tqdm.write(f"{name}: CLIP score {scores[name]['clip_score']:.3f}, FD {scores[name]['fd']:.3f}")
    shown = {name: images[:SHOWN_ABLATED] for name, images in sheets.items()}
    save_sheet(shown, BENCH / "ablations.png", columns=1)
    return {
        "samples": samples,
        "fd_real": real_distance(scene.own, samples),
        "ablations": scores,
        "device": device,
        "dtype": dtype_of(device),
        "weights": scene.studio.settings["weights"],
        **scene.studio.settings["defaults"],
    }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Generator, captions, and reference images."""

    encoder: Encoder
    own: Embeddings
    """(M, D): the images of Twemoji."""
    queries: torch.Tensor
    """(N, D): the embedded captions."""
    described: Embeddings
    """(N, D): the images of the captions."""
    reference: ReferenceSet
    nearest_real: float
    """Mean cosine of an image to its nearest neighbour."""
    groups: NDArray[np.int64]
    """(N,): the base name of each caption; names that differ in skin tone are resampled together."""
    studio: "Studio"

    @classmethod
    def prepare(cls, samples: int, device: str, model: str = BUNDLED_GENERATOR) -> "Scene":
        """Load a generator with a database of all Twemoji images, and choose ``samples`` captions."""
        encoder = Encoder(device=device)
        path = embedded(twemoji(), encoder)
        own = rows_of(path)
        database = opened(path, encoder)
        pipeline = KNNDiffusionPipeline.open(pretrained_folder(model), database).to(device, DTYPE[device])
        captions = twemoji_captions(twemoji_files())
        queries, texts = queries_of(pipeline, database, list(captions), samples, SEED)
        # Nearest other image of each real image; the copy threshold follows from these cosines.
        near = database.search(own, 1, exclude=np.arange(len(own))).scores[:, 0]
        return cls(
            encoder=encoder,
            own=own,
            queries=queries,
            described=own[[captions[text] for text in texts]],
            reference=ReferenceSet(real=own, threshold=embedding_metrics.copy_threshold(near), seed=SEED),
            nearest_real=float(near[np.isfinite(near)].mean()),
            groups=groups_of_names(texts),
            studio=Studio(pipeline, queries, settings_of(model, pipeline, own, list(captions), device)),
        )

    def score(self, rows: Embeddings) -> dict[str, Score]:
        """Return every metric of the images (N, D) of all queries."""
        near = self.studio.pipeline.database.search(rows, 1).scores[:, 0]
        return score_samples(rows, self.queries.numpy(), near, self.reference, groups=self.groups)


def groups_of_names(names: Sequence[str]) -> NDArray[np.int64]:
    """Return the number (N,) of the base name of each name, without skin tones."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(SKIN_TONE.sub("", name), len(numbers)) for name in names], dtype=np.int64)


def twemoji_captions(files: list[Path]) -> dict[str, int]:
    """Return the row of each image by its Unicode name, if it has one."""
    names = emoji_names()
    codes = ("-".join(part for part in file.stem.split("-") if part != "fe0f") for file in files)
    return {names[code]: row for row, code in enumerate(codes) if code in names}


def settings_of(
    model: str, pipeline: KNNDiffusionPipeline, own: Embeddings, captions: list[str], device: str
) -> dict[str, Any]:
    """Return all settings that determine the images, except the code."""
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
    """Return the number of images to generate in each condition."""
    few = min(samples, max(BASELINE_LEAST, samples // BASELINE_SHARE))
    return {"knn": samples, "no_knn": few, ONE_DRAW: few}


class Studio:
    """Generates in chunks, and caches each on disk."""

    def __init__(self, pipeline: KNNDiffusionPipeline, queries: torch.Tensor, settings: dict[str, Any]) -> None:
        """Use ``queries`` (N, D), and the same noise for a chunk in every condition."""
        self.pipeline, self._queries, self.settings = pipeline, queries, settings
        serialized = json.dumps(settings, sort_keys=True)
        self._folder = BENCH / "generator" / hashlib.sha256(serialized.encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "settings.json").write_text(json.dumps(settings, indent=1))

    def draw(self, name: str, condition: Condition, count: int, *, candidates: int | None = None) -> NDArray[np.uint8]:
        """Return images (count, S, S, 3), each the best of ``candidates``. Default: the candidates of the generator."""
        size = CHUNK[self.pipeline.device.type]
        pixels = []
        with tqdm(desc=f"generate {name}", total=count, unit="image", mininterval=2, leave=False) as bar:
            for start in range(0, count, size):
                queries = self._queries[start : min(start + size, count)]
                path = self._folder / f"{name}-{start:06d}-{len(queries)}.npz"
                if not path.exists():
                    self._draw(queries, {**dataclasses.asdict(condition), "candidates": candidates}, start, path, bar)
                with np.load(path) as chunk:
                    pixels.append(chunk["pixels"])
                bar.update(start + len(queries) - bar.n)
        return np.concatenate(pixels)

    def seconds_per_image(self, condition: Condition) -> float:
        """Measure the seconds per image, including the search in the database."""
        queries = self._queries[: TIMED[self.pipeline.device.type]]
        self.pipeline(queries, num_inference_steps=1, **dataclasses.asdict(condition))  # warm
        started = time.perf_counter()
        self.pipeline(queries, **dataclasses.asdict(condition))
        return (time.perf_counter() - started) / len(queries)

    def _draw(self, queries: torch.Tensor, options: dict[str, Any], start: int, path: Path, bar: tqdm) -> None:
        def on_progress(step: int, steps: int) -> None:
            bar.update(start + round(len(queries) * step / steps) - bar.n)

        output = self.pipeline(
            queries,
            generator=torch.Generator().manual_seed(mix_seeds(SEED, start)),
            on_progress=on_progress,
            **options,
        )
        pixels = np.stack([np.asarray(image) for image in output.images])
        write_whole(path, lambda file: np.savez(file, pixels=pixels))


def distances(rows: Embeddings, own: Embeddings, others: dict[str, Embeddings]) -> dict[str, Any]:
    """Return Fréchet distances of the samples to each other domain, and to their own over the same number of images."""
    by_domain = {}
    for name, other in others.items():
        count = min(len(own), len(other))
        by_domain[name] = {
            "fd": embedding_metrics.frechet_distance(rows, _some(other, count)),
            "fd_own": embedding_metrics.frechet_distance(rows, _some(own, count)),
            "pictures": count,
        }
    closest = min(by_domain, key=lambda name: by_domain[name]["fd"], default=None)
    return {
        "fd_other": by_domain[closest]["fd"] if closest else None,
        "fd_other_domain": closest,
        "own_is_closest": all(each["fd_own"] < each["fd"] for each in by_domain.values()) if by_domain else None,
        "fd_others": by_domain,
    }


def real_distance(own: Embeddings, samples: int) -> float:
    """Return the distance of as many real images to all of their domain, like that of the samples.

    They are drawn with replacement, because samples repeat images too.
    """
    drawn = np.random.default_rng(SEED).integers(len(own), size=samples)
    return embedding_metrics.frechet_distance(own[drawn], own)


def save_sheet(sheets: dict[str, NDArray[np.uint8]], path: Path, columns: int = 8) -> None:
    """Render the conditions next to each other, with titles."""
    titles = {"knn": "with neighbours", "no_knn": "without neighbours"}
    grids = {name: image_grid([Image.fromarray(image) for image in pixels], columns) for name, pixels in sheets.items()}
    gap, title = 24, 20
    width, height = next(iter(grids.values())).size
    page = Image.new("RGB", (len(grids) * (width + gap) - gap, height + title), "white")
    for number, (name, sheet) in enumerate(grids.items()):
        page.paste(sheet, (number * (width + gap), title))
        ImageDraw.Draw(page).text((number * (width + gap) + 4, 4), titles.get(name, name), fill="black")
    page.save(path)


def _some(rows: Embeddings, count: int) -> Embeddings:
    return rows[np.random.default_rng(SEED).permutation(len(rows))[:count]]
