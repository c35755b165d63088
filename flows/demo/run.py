"""Demo: images served on loopback, three databases, one generator, and a figure of swapped databases."""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flows.cli.progress import step_bar
from flows.demo.figure import SwapRow, draw_swap
from flows.demo.images import CREDITS, DOMAINS, FIRST, draw_openmoji, serve_images, write_lists
from flows.new_domain import Domain, NewDomainConfig, new_domain
from flows.recipes import demo_cpu
from flows.train_generator import TrainedGenerator
from infra import logs
from infra.errors import StageError
from infra.settings import Settings
from infra.storage.folders import make_folder
from model.saved_generator import BUNDLED_GENERATOR
from tasks.evaluate.task import table
from tasks.serve.load import images_of_rows, load_database, load_pipeline

ABSENT = "a windmill"
"""A prompt whose object is in none of the databases."""
PROMPTS = ("a red heart", "a sad face", "a green tree", "a red apple", "the sun", "a flower", ABSENT)
NOTE = "Each image starts from a stored neighbour with 80% noise. twemoji-animals has animals only."
SHOWN_NEIGHBOURS, SHOWN_SAMPLES = 3, 3
EVALUATION_SAMPLES, DIVERSITY_SEEDS, DIVERSITY_PROMPTS = 48, 2, 8  # two CPU cores generate them in three minutes

Groups = list[tuple[list[Image.Image], list[Image.Image]]]
"""Neighbours and samples of each prompt."""


def run_demo(root: Path, port: int | None = None, train: bool = False) -> tuple[Path, Path]:
    """Build the three domains, load them from the registry, generate images, and write the report.

    A second run skips every committed stage.

    Args:
        root: Folder for all files of the demo.
        port: Port of the local web server. Default: the port of the last run, or a free one.
        train: Fine-tune the bundled generator on the first domain. Default: use it as it is.

    Returns:
        Paths of ``samples.png`` and ``report.json``.
    """
    started = time.monotonic()
    make_folder(root)
    draw_openmoji(root / "openmoji")
    seconds = {"draw_openmoji": time.monotonic() - started}
    with serve_images(root, port) as address:
        lists = write_lists(root, address)
        texts = tuple((root / "texts.txt").read_text().splitlines())
        recipe = functools.partial(demo_cpu, root=str(root / "data"), texts=texts, allow_hosts=(address,))
        configs = {name: recipe(name, str(lists[name]), train=train and name == FIRST) for name in DOMAINS}
        configs[FIRST] = judged(configs[FIRST])
        domains = {name: new_domain(config) for name, config in configs.items()}
    generation_started = time.monotonic()
    figure, swap_s = draw(Settings(root=str(root / "data")), root / "samples.png")
    seconds |= {"draw_samples": time.monotonic() - generation_started, "total": time.monotonic() - started}
    report = report_of(domains, swap_s, seconds)
    path = root / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    title = f"{report['evaluation_samples']} samples of each condition on {FIRST}:"
    for line in [title, *table(made_of(domains).evaluation.reference.scores()).splitlines()]:
        logs.get("demo").info("%s", line)
    return figure, path


def judged(config: NewDomainConfig) -> NewDomainConfig:
    """Return the config of the first domain with a generator, and with an evaluation small enough for two cores."""
    evaluate = dataclasses.replace(
        config.evaluate,
        samples=EVALUATION_SAMPLES,
        seeds=DIVERSITY_SEEDS,
        diversity_prompts=DIVERSITY_PROMPTS,
    )
    return dataclasses.replace(config, generator=BUNDLED_GENERATOR if config.train is None else None, evaluate=evaluate)


def draw(settings: Settings, path: Path) -> tuple[Path, float]:
    """Generate every prompt with each database, and write the figure. Also return the longest swap in seconds."""
    pipeline = load_pipeline("knn-diffusion", FIRST, settings)
    columns, swaps = [], []
    for database in DOMAINS:
        opened = load_database(database, settings)
        started = time.monotonic()
        pipeline.swap_database(opened)
        swaps.append(time.monotonic() - started)
        columns.append(_generate_all(pipeline, database, settings))
    rows = [
        SwapRow(
            prompt=prompt,
            groups=tuple(images for column in columns for images in column[number]),
            note="in no database" if prompt == ABSENT else "",
        )
        for number, prompt in enumerate(PROMPTS)
    ]
    titles = [title for database in DOMAINS for title in (f"nearest in {database}", "generated from them")]
    draw_swap(rows, titles, note=f"{NOTE} {CREDITS}").save(path)
    return path, max(swaps)


def _generate_all(pipeline: Any, database: str, settings: Settings) -> Groups:
    with step_bar(f"generate {database}") as on_progress:
        output = pipeline(
            list(PROMPTS),
            num_images_per_prompt=SHOWN_SAMPLES,
            neighbours=SHOWN_NEIGHBOURS,  # exactly those in the figure
            quality="fast",
            generator=torch.Generator().manual_seed(7),
            on_progress=on_progress,
        )
    neighbours = images_of_rows(database, output.hits.ids, settings)
    samples = [output.images[start : start + SHOWN_SAMPLES] for start in range(0, len(output.images), SHOWN_SAMPLES)]
    return list(zip(neighbours, samples, strict=True))


def made_of(domains: Mapping[str, Domain]) -> TrainedGenerator:
    """Return the generator of the first domain."""
    trained = domains[FIRST].trained
    if trained is None:
        raise StageError(f"domain has no generator: {FIRST}; set train or generator in its config")
    return trained


def report_of(domains: Mapping[str, Domain], swap_s: float, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the measurements of the demo for JSON, with those of the training if there was one."""
    trained = made_of(domains)
    images = {name: domain.images.reference.manifest() for name, domain in domains.items()}
    database = domains[FIRST].database.reference.manifest().info
    generator = trained.generator.reference.manifest().info
    evaluation = trained.evaluation.reference
    training = {
        f"train_{name}": round(generator[name], 1) for name in ("images_seen", "images_per_s") if name in generator
    }
    return {
        "images_requested": sum(manifest.info["requested"] for manifest in images.values()),
        "images_downloaded": sum(manifest.rows for manifest in images.values()),
        "images": {name: manifest.rows for name, manifest in images.items()},
        "download_outcomes": {name: manifest.info["outcomes"] for name, manifest in images.items()},
        "embeddings": sum(domain.embeddings.reference.rows for domain in domains.values()),
        "recall_at_10_image": database["recall_at_10_image"],
        "recall_at_10_text": database["recall_at_10_text"],
        "parameters": generator["parameters"],
        **training,
        **{name: round(value, 4) for name, value in evaluation.scores().items()},
        "evaluation_samples": evaluation.rows,
        "swap_s": round(swap_s, 6),
        "model_uri": trained.registered.uri,
        "database_uris": {name: domain.registered.uri for name, domain in domains.items()},
        "seconds": {
            **{name: {k: round(v, 2) for k, v in domain.seconds.items()} for name, domain in domains.items()},
            **{name: round(value, 2) for name, value in seconds.items() if name != "total"},
        },
        "skipped": {name: domain.skipped for name, domain in domains.items()},
        "total_seconds": round(seconds["total"], 1),
    }
