r"""Embedding against the bare model and against clip-retrieval: the same tars, encoder, batch size and cores.

Ours are the stage's own workers on Ray, from committed tars to committed shards; the bare model gets one batch of
random numbers that lies in memory, again and again. Both others run in two forms, a process for each core and one
process with all cores, and the faster one counts. Everybody is loaded and warm before the first round; rounds are
taken in turn.

clip-retrieval wants numpy 1 and so an environment of its own, whose python CLIP_RETRIEVAL_PYTHON names:

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
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import ray
import torch
from contestant import Contestant, serve

import model.clip
from flows.demo_pictures import twemoji_folder
from infra import artifacts, compute
from infra.pictures import PictureNormaliser
from infra.shards import write_table
from model.clip import Encoder
from tasks.contracts import METADATA_SCHEMA
from tasks.embed import EmbedConfig
from tasks.embed_shard import EmbedShard, Feeding

SHARDS, SHARD_ROWS, ROUNDS = 4, 1000, 3
BATCH = EmbedConfig().batch_size
ENVIRONMENT = "CLIP_RETRIEVAL_PYTHON"
CORES = len(os.sched_getaffinity(0))
SHIPPED = Path(model.clip.__file__).parent / "pretrained" / "sticker-clip"
HERE = Path(__file__).parent

Timed = Callable[[], float]
"""Runs a round and returns its seconds."""


def bench_embed() -> dict[str, Any]:
    """Images/s of the stage's workers over those of the bare model, and over those of clip-retrieval's inference."""
    if not os.environ.get(ENVIRONMENT):
        print(f"embed: {ENVIRONMENT} is not set, so clip-retrieval is left out; embed.py says how to install it")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, images = Path(name), SHARDS * SHARD_ROWS
        shards = write_shards(folder / "images")
        bare = {form: stack.enter_context(c).seconds for form, c in bare_forms(images).items()}
        theirs = {form: stack.enter_context(c).seconds for form, c in their_forms(folder, shards).items()}
        ours = stack.enter_context(our_workers(folder, shards))
        first = {form: timed() for form, timed in {**bare, **theirs}.items()}  # the warm-up of ours is its own
        chosen = {"ours": ours, "bare": bare[min(bare, key=first.__getitem__)]}
        if theirs:
            chosen["clip_retrieval"] = theirs[min(theirs, key=first.__getitem__)]
        load = os.getloadavg()[0]
        seconds = in_turn(chosen)
        agreement = compared(folder) if theirs else {}
    rates = {f"images_s_{who}": images / statistics.median(times) for who, times in seconds.items()}
    ratios = {
        f"ratio_{'bare_forward' if who == 'bare' else who}": rates["images_s_ours"] / rates[f"images_s_{who}"]
        for who in chosen
        if who != "ours"
    }
    forms = {f"images_s_{form}": images / elapsed for form, elapsed in first.items()}
    settings = {"images": images, "shards": SHARDS, "batch_size": BATCH, "cores": CORES, "rounds": ROUNDS}
    return {**settings, **ratios, **rates, "forms": forms, "seconds": seconds, "load_before": load, **agreement}


def in_turn(contestants: dict[str, Timed]) -> dict[str, list[float]]:
    """Seconds of every round, and the bare model once more at the end."""
    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in range(ROUNDS):
        for who in ("bare", *(who for who in contestants if who != "bare")):
            seconds[who].append(contestants[who]())
    seconds["bare"].append(contestants["bare"]())
    return seconds


def write_shards(folder: Path) -> list[artifacts.Shard]:
    """Twemoji as the download stage stores it, in shards of ``SHARD_ROWS``."""
    normalise = PictureNormaliser(max_pixels=10**6, min_side_px=1, max_side_px=512)
    files = sorted(twemoji_folder().glob("*.png"))[: SHARDS * SHARD_ROWS]
    done = []
    for number in range(SHARDS):
        records, local, name = [], folder.parent / "local" / str(number), f"{number:05d}"
        local.mkdir(parents=True)
        with tarfile.open(local / f"{name}.tar", "w") as tar:
            for row, path in enumerate(files[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]):
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
def our_workers(folder: Path, shards: list[artifacts.Shard]) -> Iterator[Timed]:
    """An actor a core, each holding two shards at once, as the stage has them."""
    feeding = Feeding(encoder="sticker-clip", batch_size=BATCH, cuda=False, decoders=1)
    arguments = (str(folder / "images"), str(folder / "ours"), feeding, folder)
    with compute.cluster(cores=CORES):
        compute.cpus()  # starts it
        kind: Any = ray.remote(EmbedShard).options(num_cpus=1, max_concurrency=2)
        actors = [kind.remote(*arguments) for _ in range(CORES)]

        def seconds() -> float:
            started = perf_counter()
            given = [actors[n % CORES].__call__.remote((shard.name, (shard, None))) for n, shard in enumerate(shards)]
            assert sum(shard.rows for shard in ray.get(given)) == SHARDS * SHARD_ROWS
            return perf_counter() - started

        seconds()
        yield seconds


def bare_forms(images: int) -> dict[str, Contestant]:
    """The model alone, in both forms."""
    command = [sys.executable, HERE / "embed.py"]
    each = [*command, json.dumps({"threads": 1, "images": images // CORES})]
    whole = [*command, json.dumps({"threads": CORES, "images": images})]
    return {"bare_processes": Contestant([each] * CORES, threads=1), "bare_threads": Contestant([whole], threads=CORES)}


def their_forms(folder: Path, shards: list[artifacts.Shard]) -> dict[str, Contestant]:
    """clip-retrieval in both forms, with a process to decode for each core; none without its environment."""
    python = os.environ.get(ENVIRONMENT)
    if not python:
        return {}
    tars = [str(folder / "images" / f"{shard.name}.tar") for shard in shards]

    def command(cores: int, tars: list[str], out: str) -> list[str | Path]:
        options = {
            "cores": cores, "batch_size": BATCH, "decoders": cores, "tars": tars, "out": str(folder / out),
            "config": str(SHIPPED / "open_clip_config.json"), "weights": str(SHIPPED / "open_clip_model.safetensors"),
        }  # fmt: skip
        return [Path(python).absolute(), HERE / "clip_retrieval_inference.py", json.dumps(options)]

    each = [command(1, tars[core::CORES], f"theirs-{core}") for core in range(CORES)]
    return {
        "clip_retrieval_processes": Contestant(each, threads=1),
        "clip_retrieval_threads": Contestant([command(CORES, tars, "theirs")], threads=CORES),
    }


def compared(folder: Path) -> dict[str, float]:
    """How far the rows of both agree, picture for picture: a contestant that did other work would show."""
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
    """In a process of its own: the model and a batch, and a round of forward passes over it."""
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
