"""The bundled generator with prompts that people write, whose own images are left out of the database.

    make bench NAME=generator               # every fifth prompt
    make bench NAME=generator SAMPLES=200   # all of prompts.txt

No prompt can be looked up, so the nearest stored image is what the generator must beat. Twemoji and OpenMoji are the
databases; the generator was trained on neither. Every condition starts from the same noise. "one" has a single
candidate, so its score has no selection; "noise" has the defaults of the pipeline, "fast" and "best" are its presets.

The concept of a prompt counts as retrieved if the prompt is the nearest of all 200 to the image. The judge is the
encoder that also retrieves, conditions and selects. No independent one is bundled.

``copy_rate_real`` is the share of the left-out images whose nearest remaining image is above the copy threshold: the
copy rate of an artist who has not seen them. Images are cached below ``build/bench/prompts``, by the digest of their
settings, and the grid is written to ``build/bench/generator.png``.

Legend: ``N`` prompts, ``P`` all prompts, ``M`` images of a database, ``D`` embedding width, ``S`` side.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from domains import BENCH, SIDE, Drawings, drawings, embedded, rows_of, write_whole
from edit import DTYPE, dtype_of, save_grid
from left_out import LeftOutDatabase, Prompt, own_images, read_prompts
from names import DEFAULTS
from numpy.typing import NDArray
from tqdm.auto import tqdm

from model.encoder.clip import Encoder
from model.generation.quality import PRESETS
from model.images import image_to_array, to_rgb
from model.metrics import embedding_metrics
from model.metrics.bootstrap import bootstrap_interval, mean_of
from model.metrics.embedding_metrics import Embeddings
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import BUNDLED_GENERATOR, pretrained_folder, weights_digest

SEED = 0
RESAMPLES = 1_000
CONDITIONS: dict[str, dict[str, Any]] = {
    "noise": {},
    "one": {"quality": "fast", "candidates": 1},
    "fast": {"quality": "fast"},
    "best": {"quality": "best"},
}
"""Arguments of the call in each condition."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """What the images of one database are compared with.

    Attributes:
        texts: (P, D), the embeddings of all prompts.
        numbers: (N,), the prompts of the images.
        rows: (M, D), the embeddings of the database.
        database: The database without the prompts' own images.
        threshold: Cosine above which an image counts as a copy.
    """

    texts: Embeddings
    numbers: NDArray[np.int64]
    rows: Embeddings
    database: LeftOutDatabase
    threshold: float

    def scores(self, images: Embeddings) -> dict[str, Any]:
        """Return all metrics of one image (N, D) per prompt, and the interval of those that depend on single images."""
        cosines = images @ self.texts.T
        own = cosines[np.arange(len(images)), self.numbers]
        better = (cosines > own[:, None]).sum(axis=1)
        near = self.database.nearest(images, 1, self.numbers).scores[:, 0]
        single = {"clip_score": own, "top1": better == 0, "top5": better < 5, "copy_rate": near > self.threshold}
        scores: dict[str, Any] = {}
        for name, values in single.items():
            rng = np.random.default_rng(SEED)
            statistic, groups = mean_of(values.astype(np.float64)), len(values)
            bounds = (-1.0, 1.0) if name == "clip_score" else (0.0, 1.0)
            score = bootstrap_interval(statistic, groups, resamples=RESAMPLES, rng=rng, bounds=bounds)
            scores |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        return {
            **scores,
            "nearest": float(near.mean()),
            "kid": embedding_metrics.kernel_distance(images, self.rows),
            "fd": embedding_metrics.frechet_distance(images, self.rows),
        }


def bench_generator(samples: int, device: str) -> dict[str, Any]:
    """Return the scores of ``samples`` prompts, at most all, for each database and condition."""
    encoder, prompts = Encoder(device=device), read_prompts()
    pipeline = KNNDiffusionPipeline.open(pretrained_folder(BUNDLED_GENERATOR)).to(device, DTYPE[device])
    chosen = spread(len(prompts), samples)
    columns: dict[str, NDArray[np.uint8]] = {}
    databases = {}
    for source in drawings():
        databases[source.name], sheets = measure(source, pipeline, encoder, prompts, chosen)
        columns |= {f"{source.name} {name}": images for name, images in sheets.items()}
    save_grid(columns, [prompts[number].text for number in chosen], BENCH / "generator.png")
    return {
        "samples": len(chosen),
        "prompts": len(prompts),
        "databases": databases,
        "device": device,
        "dtype": dtype_of(device),
        "weights": weights_digest(BUNDLED_GENERATOR),
        "conditions": CONDITIONS,
        "presets": {name: dataclasses.asdict(preset) for name, preset in PRESETS.items()},
    }


def spread(total: int, samples: int) -> NDArray[np.int64]:
    """Return ``samples`` numbers of ``total``, evenly spread over the sections of the prompts."""
    return np.unique(np.linspace(0, total, min(samples, total), endpoint=False).astype(np.int64))


def measure(
    source: Drawings,
    pipeline: KNNDiffusionPipeline,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    chosen: NDArray[np.int64],
) -> tuple[dict[str, Any], dict[str, NDArray[np.uint8]]]:
    """Return the scores and the images (N, S, S, 3) of one database."""
    labelled = [row for row, label in enumerate(source.labels) if label]  # others may be the own image of a prompt
    rows = rows_of(embedded(source, encoder))[labelled]
    own = own_images(prompts, [source.labels[row] for row in labelled])
    texts = encoder.embed_texts([prompt.text for prompt in prompts]).numpy()
    database = LeftOutDatabase(
        source.name, encoder.identity, rows, lambda number: source.image(labelled[number]), texts, own
    )
    pipeline.swap_database(database)
    near = nearest_others(rows)
    threshold = embedding_metrics.copy_threshold(near)
    judge = Judge(texts=texts, numbers=chosen, rows=rows, database=database, threshold=threshold)
    first = database.search(texts[chosen], 1).ids[:, 0]
    sheets = {"nearest": np.stack([image_to_array(to_rgb(image), SIDE) for image in database.images(first.tolist())])}
    seconds = {}
    for name, options in CONDITIONS.items():
        sheets[name], seconds[name] = generated(pipeline, source, texts[chosen], options)
    scores = {name: judge.scores(encoder.embed_pixels(images).numpy()) for name, images in sheets.items()}
    asked, left_out = np.nonzero(own)
    remaining = database.nearest(rows[left_out], 1, asked).scores[:, 0]
    some = np.random.default_rng(SEED).permutation(len(rows))[: len(chosen)]
    return {
        **scores,
        "seconds_per_image": seconds,
        "copy_threshold": threshold,
        "copy_rate_real": embedding_metrics.copy_rate(remaining, threshold),
        "copy_rate_real_all": embedding_metrics.copy_rate(near, threshold),
        "fd_real": embedding_metrics.frechet_distance(rows[some], rows),
        "kid_real": embedding_metrics.kernel_distance(rows[some], np.delete(rows, some, axis=0)),
        "images": len(rows),
        "left_out": len(np.unique(left_out)),
    }, sheets


def nearest_others(rows: Embeddings) -> NDArray[np.float32]:
    """Return the cosine (M,) of each row (M, D) to its nearest other row."""
    scores = rows @ rows.T
    np.fill_diagonal(scores, -np.inf)
    nearest: NDArray[np.float32] = scores.max(axis=1)
    return nearest


def generated(
    pipeline: KNNDiffusionPipeline, source: Drawings, texts: Embeddings, options: dict[str, Any]
) -> tuple[NDArray[np.uint8], float]:
    """Return one image (N, S, S, 3) for each text (N, D), and the seconds per image; computed once."""
    preset = PRESETS.get(options.get("quality", ""))
    settings = {
        "weights": weights_digest(BUNDLED_GENERATOR),
        "defaults": {name: pipeline.config[name] for name in DEFAULTS},
        "preset": None if preset is None else dataclasses.asdict(preset),
        "options": options,
        "database": source.version,
        "texts": hashlib.sha256(texts.tobytes()).hexdigest(),
        "device": pipeline.device.type,
        "seed": SEED,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = BENCH / "prompts" / f"{source.name}-{digest}.npz"
    if not path.exists():
        started, rows = time.perf_counter(), torch.from_numpy(texts)
        with tqdm(desc=f"generate {source.name} {options}", unit="step", mininterval=2, leave=False) as bar:

            def on_progress(step: int, steps: int) -> None:
                bar.total = steps
                bar.update(step - bar.n)

            generator = torch.Generator().manual_seed(SEED)
            output = pipeline(rows, generator=generator, on_progress=on_progress, **options)
        pixels = np.stack([np.asarray(image) for image in output.images])
        seconds = (time.perf_counter() - started) / len(texts)
        write_whole(path, lambda file: np.savez(file, pixels=pixels, seconds=seconds))
    with np.load(path) as stored:
        return stored["pixels"], float(stored["seconds"])
