"""The service: overhead of REST, searches and images per second, swaps under load, and memory.

    make bench NAME=serve       (ROWS=1000000 SECONDS=120 REQUESTS=10000; smaller numbers for a quick run)

The server is a process of its own, on loopback, with the bundled generator. Searches go to a database of ``ROWS``
seeded rows, which the index stage builds, and are compared with clip-retrieval's: see searches.py. The clients are
threads of the benchmark, so they share the cores with the server. The generator is compared with the same pipeline in
this process, one image at a time, while the server idles.
"""

import base64
import contextlib
import dataclasses
import functools
import http.client
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from searches import CLIENTS, bench_searches

FOLDER = Path("build/bench/serve")
CANDIDATES = 2
"""Generated for each image that is returned, by the service and by the pipeline alone."""
ALONE = 8
"""Images of a round of the pipeline alone."""
SWAP_CLIENTS = 100
MOVES = 20
MOVED_ROWS = 2_000
EDITED_SIDE_PX = 512
WARM_UP = 50
ROUNDS = 300
POLL_S = 0.5


def bench_serve() -> dict[str, Any]:
    """Return overhead, throughput, swaps under load and memory."""
    rows, seconds, requests = (
        int(os.environ.get(name) or default)
        for name, default in (("ROWS", 1_000_000), ("SECONDS", 120), ("REQUESTS", 10_000))
    )
    moved, searched = prepare(rows)
    with server(searched) as (address, pid):
        result: dict[str, Any] = {"rows": rows, "seconds": seconds, "requests": requests}
        with engine(searched) as own:
            result["rest_overhead_ms_p50"] = rest_overhead_ms(own, address)
            result["images_s_ratio"] = images_ratio(own, address)
        result["searches"] = bench_searches(address, pid, searched, FOLDER / f"rows-{rows}", min(seconds, 10))
        result["swaps"] = swaps_under_load(address, moved, seconds)
        result["memory"] = memory_growth(address, pid, requests)
    return result


def prepare(rows: int) -> tuple[list[int], str]:
    """Build the databases and register the two versions of ``moved``; return these, and the folder of the large one."""
    from infra.settings import Settings
    from tasks.register import register_database

    shutil.rmtree(FOLDER / "root", ignore_errors=True)
    settings = Settings(root=str(FOLDER / "root"), cache=FOLDER / "cache")
    versions = []
    for number in (1, 2):
        database = built(FOLDER / "root" / "moved", f"v{number}", MOVED_ROWS, seed=number)
        versions.append(int(register_database("moved", database, settings).uri.rpartition("/")[2]))
    return versions, built(FOLDER / f"rows-{rows}" / "rows", "rows", rows, seed=9).uri


def built(base: Path, name: str, rows: int, seed: int) -> Any:
    """Build a database of seeded rows with URLs that name it; an existing one is reused."""
    from seeded import clustered

    from infra import artifacts, compute, storage
    from infra.download.downloader import SHARD_ROWS
    from infra.formats.tables import write_table
    from model.encoder.clip import Encoder
    from tasks.index.config import IndexConfig
    from tasks.index.task import index
    from tasks.references.domain_folder import DomainFolder
    from tasks.references.types import METADATA_SCHEMA, EmbeddingShards

    stage = artifacts.ArtifactBuilder(str(base), EmbeddingShards.kind, inputs={}, config={"rows": rows, "seed": seed})
    manifest = stage.committed_manifest()
    if manifest is None:
        done = []
        for number, start in enumerate(range(0, rows, SHARD_ROWS)):
            part, shard = clustered(min(SHARD_ROWS, rows - start), seed + number).astype(np.float16), f"{number:05d}"
            records = [
                {"row": row, "key": f"{shard}{row:05d}", "url": f"http://{name}.example.com/{start + row}.jpg"}
                for row in range(len(part))
            ]
            with storage.scratch() as folder:
                (folder / "img_emb").mkdir()
                np.save(folder / "img_emb" / f"img_emb_{shard}.npy", part)
                write_table(records, METADATA_SCHEMA, folder / "metadata" / f"metadata_{shard}.parquet")
                done.append(artifacts.commit_shard(stage.uri, shard, folder, rows=len(part), info={}))
        identity = {"encoder": dataclasses.asdict(Encoder().identity)}
        manifest = stage.commit(done, identity=identity, info={})
    embeddings = EmbeddingShards.of(manifest, stage.uri)
    with compute.cluster(None, None):
        return index(embeddings, DomainFolder(uri=str(base), cache=FOLDER / "cache"), IndexConfig()).reference


@contextmanager
def server(searched: str) -> Iterator[tuple[str, int]]:
    """Start the server; yield its address and process."""
    command = [sys.executable, __file__, searched]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if line.startswith("http")), "")
            assert line, "the server ended before it was ready"
            yield line.strip(), process.pid
        finally:
            process.terminate()


@contextmanager
def engine(searched: str) -> Iterator[Any]:
    """Open the same engine in this process."""
    opened = open_engine(searched)
    opened.start()
    while not opened.ready:
        time.sleep(0.05)
    yield opened
    opened.close(10)


def open_engine(searched: str) -> Any:
    from infra.settings import Settings
    from model.saved_generator import BUNDLED_GENERATOR
    from tasks.serve.service.config import ServiceConfig
    from tasks.serve.service.engine import Engine

    settings = Settings(root=str(FOLDER / "root"), cache=FOLDER / "cache")
    config = ServiceConfig(model=BUNDLED_GENERATOR, databases=("moved", searched), trust=True, poll_s=POLL_S)
    return Engine.open(config, settings)


def rest_overhead_ms(own: Any, address: str) -> dict[str, float]:
    """Return the median time of a search over REST, minus that of the same call in process, for each client.

    The client's own time counts. ``http.client`` takes the least; ``httpx`` is what most programs use. All alternate.
    """
    from tasks.serve.service.requests import SearchRequest

    url = httpx.URL(address)
    direct = http.client.HTTPConnection(url.host, url.port or 80)
    times: dict[str, list[float]] = {"in process": [], "http.client": [], "httpx": []}
    with contextlib.closing(direct), httpx.Client(base_url=address) as client:

        def post(query: dict[str, Any]) -> None:
            direct.request("POST", "/v1/search", json.dumps(query), {"Content-Type": "application/json"})
            with direct.getresponse() as response:
                assert response.status == 200, response.read()
                response.read()

        calls: dict[str, Callable[[dict[str, Any]], object]] = {
            "in process": lambda query: own.submit(SearchRequest(**query)).future.result(),
            "http.client": post,
            "httpx": lambda query: client.post("/v1/search", json=query).raise_for_status(),
        }
        for number in range(WARM_UP + ROUNDS):
            query = {"text": f"a photo of number {number}", "k": 10, "database": "moved"}
            for name, call in calls.items():
                times[name].append(timed(functools.partial(call, query)))
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}
    alone = medians.pop("in process")
    return {name: 1000 * (median - alone) for name, median in medians.items()}


def images_ratio(own: Any, address: str) -> dict[str, float]:
    """Return images/s of 32 clients over REST, and of the pipeline one image at a time; they alternate.

    Both generate with the same settings: those of a response of the service.
    """
    pipeline = own._catalog.model.with_database(own._catalog.get("moved"))
    body = {"prompt": "a red heart", "database": "moved", "n": 1, "candidates": CANDIDATES}

    def one(seed: int) -> dict[str, Any]:
        answer = httpx.post(f"{address}/v1/generate", json=body | {"seed": seed}, timeout=600)
        settings: dict[str, Any] = answer.raise_for_status().json()["settings"]
        return settings

    used = one(0)

    def alone() -> None:
        for _ in range(ALONE):
            pipeline(
                body["prompt"],
                num_inference_steps=used["steps"],
                guidance_scale=used["guidance"],
                neighbours=used["k"],
                candidates=used["candidates"],
                query=used["query"],
                start=used["start"],
                strength=used["strength"],
            )

    found: dict[str, list[float]] = {"service": [], "pipeline": []}
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(2):
            found["service"].append(CLIENTS / timed(lambda: list(pool.map(one, range(CLIENTS)))))
            found["pipeline"].append(ALONE / timed(alone))
    medians = {who: statistics.median(values) for who, values in found.items()}
    return medians | {"ratio": medians["service"] / medians["pipeline"]}


def swaps_under_load(address: str, versions: list[int], seconds: float) -> dict[str, Any]:
    """Move the alias 20 times under 100 clients; return the requests, and how many were lost or saw two versions."""
    from infra.promotions import Promotions
    from infra.settings import Settings

    registry = Promotions(Settings(root=str(FOLDER / "root"), cache=FOLDER / "cache"))
    versions_match, seen, lost = list[bool](), set[int](), list[str]()  # a thread may append to a list at any time

    def search(client: httpx.Client, number: int) -> None:
        body = {"text": f"a photo of number {number}", "k": 5, "database": "moved"}
        try:
            answer = client.post("/v1/search", json=body, timeout=60).raise_for_status().json()
        except httpx.HTTPError as error:
            lost.append(repr(error))
            return
        version = answer["database"]["version"]
        seen.add(answer["database"]["generation"])
        found = {hit["url"].split(".")[0] for hit in answer["hits"]}
        versions_match.append(found == {f"http://v{versions.index(version) + 1}"})

    def move() -> None:
        for number in range(MOVES):
            time.sleep(seconds / MOVES)
            registry.move("knn-database.moved", versions[number % 2])

    mover = threading.Thread(target=move)
    mover.start()
    run_clients(address, SWAP_CLIENTS, search, seconds=seconds + 3)
    mover.join()
    return {
        "requests": len(versions_match),
        "mixed": versions_match.count(False),
        "lost": len(lost),
        "moves": MOVES,
        "swaps_seen": len(seen) - 1,
        "first_error": (lost or [""])[0],
    }


def memory_growth(address: str, pid: int, requests: int) -> dict[str, float]:
    """Return the anonymous memory of the server after 100 and after all requests.

    Of 100 requests, one is a generation, one is an edit of an image of 1 MiB, and the others are searches.
    """
    prompt: dict[str, Any] = {"prompt": "a red heart", "steps": 1}
    kinds = {0: ("generate", prompt | {"candidates": 1}), 50: ("edit", prompt | {"image": noise_png(EDITED_SIDE_PX)})}

    def some(client: httpx.Client, number: int) -> None:
        route, body = kinds.get(number % 100, ("search", {"text": f"a photo of number {number}"}))
        client.post(f"/v1/{route}", json=body | {"database": "moved"}, timeout=600).raise_for_status()

    run_clients(address, 8, some, total=100)
    before = anonymous_mib(pid)
    run_clients(address, 8, some, total=requests)
    after = anonymous_mib(pid)
    return {"mib_after_100": before, "mib_after_all": after, "ratio": after / before}


def noise_png(side_px: int) -> str:
    """Return seeded noise as a PNG in base64."""
    pixels = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), np.uint8)
    Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
    return base64.b64encode(out.getvalue()).decode()


def run_clients(
    address: str,
    count: int,
    call: Callable[[httpx.Client, int], None],
    *,
    seconds: float = float("inf"),
    total: int | None = None,
) -> None:
    """Call from ``count`` threads with a connection each, for some seconds or some calls in total."""
    end, numbers = time.perf_counter() + seconds, iter(range(total or sys.maxsize))

    def client() -> None:
        with httpx.Client(base_url=address) as own:
            while time.perf_counter() < end and (number := next(numbers, None)) is not None:
                call(own, number)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(client) for _ in range(count)]:
            future.result()


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def anonymous_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def serve(searched: str) -> None:
    """Serve until SIGTERM; prints the address when the service is ready."""
    from infra.settings import Settings
    from tasks.serve.api import server as service
    from tasks.serve.api.app import create_app
    from tasks.serve.api.config import ApiConfig

    opened, api = open_engine(searched), ApiConfig()
    bound = service.bind("127.0.0.1", 0)
    app = create_app(Settings(root=str(FOLDER / "root")), engine=opened, api=api, page=False)
    service.run(app, opened, bound, api, lambda: print(service.address_of(bound), flush=True))


if __name__ == "__main__":
    serve(sys.argv[1])
