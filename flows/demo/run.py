"""The demo: pictures served from this machine, three databases, one generator, and the picture of the swap."""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from flows.demo.figure import SwapRow, draw_swap
from flows.demo.images import CREDITS, DOMAINS, FIRST, draw_openmoji, serve_images, write_lists
from flows.new_domain import Domain, NewDomainConfig, new_domain
from flows.recipes import demo_cpu
from flows.train_generator import TrainedGenerator
from infra import logs
from infra.errors import StageError
from infra.settings import Settings
from infra.storage.folders import make_folder
from model.saved_generator import EMBEDDED
from tasks.evaluate.task import table
from tasks.serve.load import images_of_rows, load_database, load_pipeline

PROMPTS = ("a red heart", "a sad face", "a green tree", "a red apple", "the sun", "a flower")
SHOWN_NEIGHBOURS, SHOWN_SAMPLES = 3, 3
EVALUATION_SAMPLES, DIVERSITY_SEEDS, DIVERSITY_PROMPTS = 48, 2, 8  # what two CPU cores draw in three minutes

Groups = list[tuple[list[Image.Image], list[Image.Image]]]
"""For each prompt, its neighbours and its samples."""


def run_demo(root: Path, port: int | None = None, train: bool = False) -> tuple[Path, Path]:
    """Make the three domains, pull everything back from the registry, draw and report.

    Args:
        root: where everything is kept.
        port: of the stand-in web server; None takes the one of the last run, or any that is free.
        train: fine-tune the embedded generator on the first domain; otherwise it draws as it is.

    Returns:
        The paths of ``samples.png`` and ``report.json``. A run after a finished one skips every committed stage.
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
    drawing = time.monotonic()
    picture, swap_s = draw(Settings(root=str(root / "data")), root / "samples.png")
    seconds |= {"draw_samples": time.monotonic() - drawing, "total": time.monotonic() - started}
    report = report_of(domains, swap_s, seconds)
    path = root / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    told = f"{report['evaluation_samples']} samples of each condition on {FIRST}:"
    for line in [told, *table(made_of(domains).evaluation.reference.scores()).splitlines()]:
        logs.get("demo").info("%s", line)
    return picture, path


def judged(config: NewDomainConfig) -> NewDomainConfig:
    """The first domain's config, with a generator and an evaluation that two cores can bear."""
    evaluate = dataclasses.replace(
        config.evaluate,
        samples=EVALUATION_SAMPLES,
        seeds=DIVERSITY_SEEDS,
        diversity_prompts=DIVERSITY_PROMPTS,
    )
    return dataclasses.replace(config, generator=EMBEDDED if config.train is None else None, evaluate=evaluate)


def draw(settings: Settings, path: Path) -> tuple[Path, float]:
    """Pull generator and databases by name, draw every prompt from each; returns the longest swap in seconds."""
    pipeline = load_pipeline("knn-diffusion", FIRST, settings)
    columns, swaps = [], []
    for database in DOMAINS:
        opened = load_database(database, settings)
        started = time.monotonic()
        pipeline.swap_database(opened)
        swaps.append(time.monotonic() - started)
        columns.append(_draw_all(pipeline, database, settings))
    rows = [
        SwapRow(prompt=prompt, groups=tuple(pictures for column in columns for pictures in column[number]))
        for number, prompt in enumerate(PROMPTS)
    ]
    titles = [title for database in DOMAINS for title in (f"nearest in {database}", "drawn from them")]
    draw_swap(rows, titles, note=CREDITS).save(path)
    return path, max(swaps)


def _draw_all(pipeline: Any, database: str, settings: Settings) -> Groups:
    with tqdm(desc=f"draw {database}", unit="step", leave=False) as progress:

        def told(step: int, steps: int) -> None:
            progress.total = steps
            progress.update(step - progress.n)

        output = pipeline(
            list(PROMPTS),
            num_images_per_prompt=SHOWN_SAMPLES,
            neighbours=SHOWN_NEIGHBOURS,  # those that stand beside the samples, and no others
            generator=torch.Generator().manual_seed(7),
            on_progress=told,
        )
    near = images_of_rows(database, output.hits.ids, settings)
    samples = [output.images[start : start + SHOWN_SAMPLES] for start in range(0, len(output.images), SHOWN_SAMPLES)]
    return list(zip(near, samples, strict=True))


def made_of(domains: Mapping[str, Domain]) -> TrainedGenerator:
    """The generator that the first domain was given."""
    trained = domains[FIRST].trained
    if trained is None:
        raise StageError(f"{FIRST} has no generator; its config is to name one, or a training")
    return trained


def report_of(domains: Mapping[str, Domain], swap_s: float, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What the demo measured, JSON-ready; what a training measures is there when there was one."""
    made = made_of(domains)
    images = {name: domain.images.reference.manifest() for name, domain in domains.items()}
    database = domains[FIRST].database.reference.manifest().info
    generator = made.generator.reference.manifest().info
    evaluation = made.evaluation.reference
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
        "model_uri": made.registered.uri,
        "database_uris": {name: domain.registered.uri for name, domain in domains.items()},
        "seconds": {
            **{name: {k: round(v, 2) for k, v in domain.seconds.items()} for name, domain in domains.items()},
            **{name: round(value, 2) for name, value in seconds.items() if name != "total"},
        },
        "skipped": {name: domain.skipped for name, domain in domains.items()},
        "total_seconds": round(seconds["total"], 1),
    }
