"""The bundled generator with prompts that people write. Images that a prompt names are left out of the database.

    make bench NAME=generator                            # the 160 prompts that were not used to choose the presets
    make bench NAME=generator SAMPLES=60                 # a seeded sample of them
    make bench NAME=generator PROMPTS=tuning             # the 40 that were used: every fifth, from the first
    make bench NAME=generator PROMPTS=all SAMPLES=200    # all

Twemoji and OpenMoji are the databases; the generator was trained on neither. Images with a prompt's words in their name
are left out for that prompt; similar ones remain. The nearest remaining image is what the generator must beat.

Conditions share their noise: candidate i of a prompt starts from the same noise in all of them.

    noise        the defaults of the pipeline
    noise_both   noise, mean and text in the query slot, best of 3: the preset fast without its start
    fast_one     the preset fast with one candidate, so nothing is selected
    fast, best   the presets
    nearest      the nearest stored image

The concept of a prompt counts as retrieved if the prompt is the nearest of all 200 to the image. The judge is the
encoder that also retrieves, conditions and selects. No independent one is bundled. Intervals resample the prompts.

``copy_rate_real`` is the share of the left-out images that count as copies of a remaining image. It is the copy rate
that images as good as the real ones would have.

Generated images are cached below ``build/bench/prompts``, by the digest of their settings. The grid is written to
``build/bench/generator.png``.

Legend: ``N`` prompts, ``P`` all prompts, ``M`` images of a database, ``D`` embedding width, ``S`` side.
"""

import dataclasses
import hashlib
import json
import os
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
from torch import Tensor
from tqdm.auto import tqdm

from model.encoder.clip import Encoder
from model.generation.backbone import Backbone
from model.generation.quality import PRESETS
from model.images import image_to_array, to_rgb
from model.metrics import embedding_metrics
from model.metrics.bootstrap import bootstrap_interval, mean_of
from model.metrics.embedding_metrics import Embeddings
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import BUNDLED_GENERATOR, pretrained_folder, weights_digest

SEED = 0
RESAMPLES = 1_000
TUNING_STEP = 5
"""Every prompt whose number is a multiple of it was used to choose the presets."""
CONDITIONS: dict[str, dict[str, Any]] = {
    "noise": {},
    "noise_both": {"start": "noise", "query": "both", "candidates": 3},
    "fast_one": {"quality": "fast", "candidates": 1},
    "fast": {"quality": "fast"},
    "best": {"quality": "best"},
}
"""Arguments of the call in each condition."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The prompts of a run.

    Attributes:
        numbers: (N,), their numbers among all prompts.
        texts: (N, D), their embeddings.
        own: (N, M), True for the images that are left out.
    """

    numbers: NDArray[np.int64]
    texts: Embeddings
    own: NDArray[np.bool_]

    def noise(self, backbone: Backbone, candidates: int, steps: int) -> Tensor:
        """Return the noise of all candidates, prompt after prompt. A candidate's depends only on prompt and number."""
        generators = [torch.Generator().manual_seed(SEED + int(number)) for number in self.numbers]
        return torch.cat([backbone.noise(candidates, steps, generator) for generator in generators])

    def digest(self) -> str:
        """Return a digest of the prompts and of the images that their words leave out."""
        parts = (self.numbers, self.texts, self.own)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


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
    """Return the scores of ``samples`` prompts, at most all of ``PROMPTS``, for each database and condition."""
    encoder, prompts = Encoder(device=device), read_prompts()
    pipeline = KNNDiffusionPipeline.open(pretrained_folder(BUNDLED_GENERATOR)).to(device, DTYPE[device])
    kind = os.environ.get("PROMPTS") or "held-out"
    chosen = choose(kind, len(prompts), samples)
    columns: dict[str, NDArray[np.uint8]] = {}
    databases = {}
    for source in drawings():
        databases[source.name], sheets = measure(source, pipeline, encoder, prompts, chosen)
        columns |= {f"{source.name} {name}": images for name, images in sheets.items()}
    save_grid(columns, [prompts[number].text for number in chosen], BENCH / "generator.png")
    return {
        "samples": len(chosen),
        "prompts": kind,
        "prompts_of_the_judge": len(prompts),
        "databases": databases,
        "device": device,
        "dtype": dtype_of(device),
        "weights": weights_digest(BUNDLED_GENERATOR),
        "conditions": CONDITIONS,
        "presets": {name: dataclasses.asdict(preset) for name, preset in PRESETS.items()},
    }


def choose(kind: str, total: int, samples: int) -> NDArray[np.int64]:
    """Return the numbers of ``samples`` of ``total`` prompts, at most all of this kind, in order."""
    numbers = np.arange(total)
    tuning = numbers % TUNING_STEP == 0
    kinds = {"held-out": numbers[~tuning], "tuning": numbers[tuning], "all": numbers}
    if kind not in kinds:
        raise SystemExit(f"PROMPTS is unknown: {kind}; use one of {', '.join(kinds)}")
    return np.sort(np.random.default_rng(SEED).permutation(kinds[kind])[:samples])


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
    asked = Asked(numbers=chosen, texts=texts[chosen], own=own[chosen])
    first = database.search(asked.texts, 1).ids[:, 0]
    sheets = {"nearest": np.stack([image_to_array(to_rgb(image), SIDE) for image in database.images(first.tolist())])}
    seconds = {}
    for name, options in CONDITIONS.items():
        sheets[name], seconds[name] = generated(pipeline, source, asked, options)
    scores = {name: judge.scores(encoder.embed_pixels(images).numpy()) for name, images in sheets.items()}
    prompt, left_out = np.nonzero(asked.own)
    remaining = database.nearest(rows[left_out], 1, chosen[prompt]).scores[:, 0]
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
    pipeline: KNNDiffusionPipeline, source: Drawings, asked: Asked, options: dict[str, Any]
) -> tuple[NDArray[np.uint8], float]:
    """Return one image (N, S, S, 3) for each prompt, and the seconds per image; computed once."""
    preset = PRESETS.get(options.get("quality", ""))
    chosen = None if preset is None else preset.candidates
    candidates = options.get("candidates") or chosen or pipeline.config["candidates"]
    settings = {
        "weights": weights_digest(BUNDLED_GENERATOR),
        "defaults": {name: pipeline.config[name] for name in DEFAULTS},
        "preset": None if preset is None else dataclasses.asdict(preset),
        "options": options,
        "database": source.version,
        "asked": asked.digest(),
        "device": pipeline.device.type,
        "seed": SEED,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = BENCH / "prompts" / f"{source.name}-{digest}.npz"
    if not path.exists():
        latents = asked.noise(pipeline.backbone, candidates, pipeline.config["num_inference_steps"])
        started, texts = time.perf_counter(), torch.from_numpy(asked.texts)
        with tqdm(desc=f"generate {source.name} {options}", unit="step", mininterval=2, leave=False) as bar:

            def on_progress(step: int, steps: int) -> None:
                bar.total = steps
                bar.update(step - bar.n)

            output = pipeline(texts, latents=latents, on_progress=on_progress, **options)
        pixels = np.stack([np.asarray(image) for image in output.images])
        seconds = (time.perf_counter() - started) / len(texts)
        write_whole(path, lambda file: np.savez(file, pixels=pixels, seconds=seconds))
    with np.load(path) as stored:
        return stored["pixels"], float(stored["seconds"])
