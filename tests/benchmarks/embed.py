r"""Embedding against the bare model and against clip-retrieval: same tars, encoder, batch size and cores.

Ours are the workers of the stage on Ray, from committed tars to committed shards. The bare model repeats one batch of
random numbers in memory. The other two run in two forms, one process per core and one process with all cores; the
faster one counts. All contestants are loaded and warm before the first round, and rounds alternate.

clip-retrieval needs numpy 1, and so its own environment, whose Python is CLIP_RETRIEVAL_PYTHON:

    python3.11 -m venv build/clip-retrieval
    build/clip-retrieval/bin/pip install clip-retrieval==2.45.0 torch==2.9.1 torchvision==0.24.1 \
        'numpy<2' 'setuptools<80'
    CLIP_RETRIEVAL_PYTHON=build/clip-retrieval/bin/python make bench NAME=embed
"""

import contextlib
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import ray
import torch
from contestant import CLIP_RETRIEVAL_PYTHON, Contestant, Spent, serve, spent

import model.encoder.clip
from flows.demo.images import twemoji_folder
from infra import artifacts, compute
from infra.download.images import ImageNormaliser
from infra.formats.tables import write_table
from model.encoder.clip import Encoder
from tasks.embed.task import EmbedConfig
from tasks.embed.worker import EmbedShard, WorkerConfig
from tasks.references.types import METADATA_SCHEMA

SHARDS, SHARD_ROWS, ROUNDS = 4, 500, 2
BATCH = EmbedConfig().batch_size
CORES = len(os.sched_getaffinity(0))
BUNDLED_FOLDER = Path(model.encoder.clip.__file__).parent.parent / "pretrained" / "sticker-clip"
HERE = Path(__file__).parent

Round = Callable[[], Spent]


def bench_embed() -> dict[str, Any]:
    """Return images/s of the stage's workers relative to the bare model and to clip-retrieval's inference."""
    python = os.environ.get(CLIP_RETRIEVAL_PYTHON)
    if not python:
        print(f"embed: {CLIP_RETRIEVAL_PYTHON} is not set: skipping clip-retrieval; embed.py describes it")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, images = Path(name), SHARDS * SHARD_ROWS
        shards = write_shards(folder / "images")
        others = {**bare_forms(images), **their_forms(folder, shards)}
        rounds: dict[str, Round] = {form: stack.enter_context(it).round for form, it in others.items()}
        idle = [pid for contestant in others.values() for pid in contestant.pids]
        ours = stack.enter_context(our_workers(folder, shards, idle))
        first = {form: print_cost(form, one()) for form, one in rounds.items()}  # our workers are warm
        chosen = {"ours": ours}
        for who in ("bare", "clip_retrieval")[: 2 if python else 1]:
            forms = [form for form in rounds if form.startswith(who)]
            chosen[who] = rounds[min(forms, key=lambda form: first[form].wall_s)]
        load = os.getloadavg()[0]
        taken = run_alternating(chosen)
        agreement = agreement_of(folder) if python else {}
    settings = {"images": images, "shards": SHARDS, "batch_size": BATCH, "cores": CORES, "rounds": ROUNDS}
    first_rates = {f"images_s_{form}": images / it.wall_s for form, it in first.items()}
    return {**settings, **ratios(taken, images), "first_round": first_rates, "load_before": load, **agreement}


def ratios(taken: dict[str, list[Spent]], images: int) -> dict[str, Any]:
    """Return rates by wall-clock time, and by CPU time, which other load disturbs less."""
    wall = {who: images / statistics.median(it.wall_s for it in rounds) for who, rounds in taken.items()}
    cpu = {who: images / statistics.median(it.cpu_s for it in rounds) for who, rounds in taken.items()}
    named = {"bare": "bare_forward", "clip_retrieval": "clip_retrieval"}
    return {
        **{f"ratio_{named[who]}": wall["ours"] / rate for who, rate in wall.items() if who != "ours"},
        **{f"ratio_{named[who]}_by_cpu": cpu["ours"] / rate for who, rate in cpu.items() if who != "ours"},
        **{f"images_s_{who}": rate for who, rate in wall.items()},
        **{f"images_cpu_s_{who}": rate for who, rate in cpu.items()},
        "wall_s": {who: [it.wall_s for it in rounds] for who, rounds in taken.items()},
        "cpu_s": {who: [it.cpu_s for it in rounds] for who, rounds in taken.items()},
    }


def run_alternating(contestants: dict[str, Round]) -> dict[str, list[Spent]]:
    """Run all rounds of all contestants alternately, and the bare model once more at the end."""
    taken: dict[str, list[Spent]] = {who: [] for who in contestants}
    order = ["bare", *(who for who in contestants if who != "bare")]
    for who in order * ROUNDS + ["bare"]:
        taken[who].append(print_cost(who, contestants[who]()))
    return taken


def print_cost(who: str, taken: Spent) -> Spent:
    """Print and return the cost of a round; a run takes minutes."""
    load = os.getloadavg()[0]
    print(f"  {who:26} {taken.wall_s:7.1f} s, processors {taken.cpu_s:7.1f} s, load {load:.1f}", flush=True)
    return taken


def write_shards(folder: Path, shards: int = SHARDS, shard_rows: int = SHARD_ROWS) -> list[artifacts.Shard]:
    """Write Twemoji like the download stage; images repeat if there are too few."""
    normalise = ImageNormaliser(max_pixels=10**6, min_side_px=1, max_side_px=512)
    files = sorted(twemoji_folder().glob("*.png"))
    done = []
    for number in range(shards):
        chosen = [files[place % len(files)] for place in range(number * shard_rows, (number + 1) * shard_rows)]
        records, local, name = [], folder.parent / "local" / str(number), f"{number:05d}"
        local.mkdir(parents=True)
        with tarfile.open(local / f"{name}.tar", "w") as tar:
            for row, path in enumerate(chosen):
                encoded, width, height, *_ = normalise(io.BytesIO(path.read_bytes()))
                assert encoded is not None
                member = tarfile.TarInfo(f"{name}{row:04d}.png")
                member.size = len(encoded)
                tar.addfile(member, io.BytesIO(encoded))
                known = {"key": f"{name}{row:04d}", "status": "success", "width": width, "height": height}
                records.append({"row": row, **known})
        write_table(records, METADATA_SCHEMA, local / f"{name}.parquet")
        done.append(artifacts.commit_shard(str(folder), name, local, rows=len(records), info={}))
    return done


@contextmanager
def our_workers(folder: Path, shards: list[artifacts.Shard], others: list[int]) -> Iterator[Round]:
    """Run one actor per core with two shards at a time, as in the stage. All CPU time of Ray counts."""
    config = WorkerConfig(encoder="sticker-clip", batch_size=BATCH, cuda=False, decoders=1)
    arguments = (str(folder / "images"), str(folder / "ours"), config, folder)
    with compute.cluster(cores=CORES):
        compute.cpus()  # starts it
        kind: Any = ray.remote(EmbedShard).options(num_cpus=1, max_concurrency=2)
        actors = [kind.remote(*arguments) for _ in range(CORES)]

        def one_round() -> Spent:
            with spent([os.getpid()], without=others) as taken:
                items = [(shard.name, (shard, None, None)) for shard in shards]
                futures = [actors[n % CORES].__call__.remote(item) for n, item in enumerate(items)]
                assert sum(shard.rows for shard in ray.get(futures)) == SHARDS * SHARD_ROWS
            return taken

        one_round()
        yield one_round


def bare_forms(images: int) -> dict[str, Contestant]:
    """Return contestants for the bare model: one process per core, and one process with all cores."""
    command = [sys.executable, HERE / "embed.py"]
    each = [*command, json.dumps({"threads": 1, "images": images // CORES})]
    whole = [*command, json.dumps({"threads": CORES, "images": images})]
    return {"bare_processes": Contestant([each] * CORES, threads=1), "bare_threads": Contestant([whole], threads=CORES)}


def their_forms(folder: Path, shards: list[artifacts.Shard]) -> dict[str, Contestant]:
    """Return the same contestants for clip-retrieval, one decoder per core; none without its environment."""
    python = os.environ.get(CLIP_RETRIEVAL_PYTHON)
    if not python:
        return {}
    tars = [str(folder / "images" / f"{shard.name}.tar") for shard in shards]

    def command(cores: int, tars: list[str], out: str) -> list[str | Path]:
        options = {
            "cores": cores, "batch_size": BATCH, "decoders": cores, "tars": tars, "out": str(folder / out),
            "config": str(BUNDLED_FOLDER / "open_clip_config.json"),
            "weights": str(BUNDLED_FOLDER / "open_clip_model.safetensors"),
        }  # fmt: skip
        return [Path(python).absolute(), HERE / "clip_retrieval_inference.py", json.dumps(options)]

    each = [command(1, tars[core::CORES], f"theirs-{core}") for core in range(CORES)]
    return {
        "clip_retrieval_processes": Contestant(each, threads=1),
        "clip_retrieval_threads": Contestant([command(CORES, tars, "theirs")], threads=CORES),
    }


def agreement_of(folder: Path) -> dict[str, float]:
    """Return the minimum cosine of both embeddings of an image, to check that the contestants do the same work."""
    ours, theirs = {}, {}
    for path in (folder / "ours" / "img_emb").glob("*.npy"):
        number = path.stem.removeprefix("img_emb_")
        keys = pd.read_parquet(folder / "ours" / "metadata" / f"metadata_{number}.parquet")["key"]
        ours.update(zip(keys, np.load(path).astype(np.float32), strict=True))
    (rows,) = (folder / "theirs" / "embeddings" / "img_emb").glob("*.npy")
    (table,) = (folder / "theirs" / "embeddings" / "metadata").glob("*.parquet")
    theirs.update(zip(pd.read_parquet(table)["image_path"], np.load(rows).astype(np.float32), strict=True))
    assert set(ours) == set(theirs)
    return {"least_cosine_with_theirs": min(float(row @ theirs[key]) for key, row in ours.items())}


def prepare_bare() -> Callable[[], None]:
    """Load the model, and return a round of forward passes over one batch; called in its own process."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    encoder, batch = Encoder(), torch.randn(BATCH, 3, 64, 64)
    whole, rest = divmod(options["images"], BATCH)

    def one_round() -> None:
        for _ in range(whole):
            encoder.forward(batch)
        if rest:
            encoder.forward(batch[:rest])

    encoder.forward(batch)
    return one_round


if __name__ == "__main__":
    serve(prepare_bare)
