"""Searches per second of the service, against clip-retrieval's ``back``.

Both servers have the same embeddings, with a URL for each row, and get the same held-out embeddings from 32 clients.
Rounds alternate, and the other server is stopped meanwhile. Recall is that of the responses, against exact search.
clip-retrieval runs in an environment of its own, whose Python is CLIP_RETRIEVAL_PYTHON: see clip_retrieval_back.py.
"""

import dataclasses
import http.client
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestant import CLIP_RETRIEVAL_PYTHON

from model.retrieval.recall import GroundTruth, exact_neighbours

HERE = Path(__file__).parent
CLIENTS = 32
ROUNDS = 3
K = 10
QUERIES = 500
STARTUP_S = 600.0
"""Seconds within which clip-retrieval must have loaded its index."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
    """A running server.

    Attributes:
        address: Host and port.
        pid: Its process.
        path: Route of a search.
        body: Returns the body of a search for an embedding.
        ids: Returns the ids of a response.
    """

    address: str
    pid: int
    path: str
    body: Callable[[list[float]], dict[str, Any]]
    ids: Callable[[Any], list[int]]

    def embedding_bodies(self, queries: np.ndarray[Any, Any]) -> list[bytes]:
        """Return the bodies of searches for queries (Q, D)."""
        return [json.dumps(self.body(query)).encode() for query in queries.tolist()]


def bench_searches(address: str, pid: int, database: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Return searches/s, latencies and recall of both servers, and the ratio of the rates.

    ``database`` is the folder of the searched version. The index of clip-retrieval is built in ``folder`` once.
    """
    from seeded import clustered

    from infra import artifacts
    from tasks.references.lineage import embeddings_of
    from tasks.references.types import DatabaseVersion

    embeddings = embeddings_of(DatabaseVersion.open(database))
    shards = embeddings.manifest().shards
    files = [artifacts.fetch_shard(embeddings.uri, shard, ".npy", folder / "cache") for shard in shards]
    parts = [np.load(file, mmap_mode="r") for file in files]
    truth = exact_neighbours(parts, clustered(QUERIES, seed=10_000_019), depth=K)
    ours = Server(
        address=address.removeprefix("http://"),
        pid=pid,
        path="/v1/search",
        body=lambda query: {"embedding": query, "k": K, "database": "rows"},
        ids=lambda response: [hit["id"] for hit in response["hits"]],
    )
    texts = [{"text": f"a photo of number {number}", "k": K, "database": "rows"} for number in range(QUERIES)]
    result = {"text": summary([latencies_of(ours, [json.dumps(one).encode() for one in texts], seconds)])}
    python = os.environ.get(CLIP_RETRIEVAL_PYTHON)
    if not python:
        print(f"serve: {CLIP_RETRIEVAL_PYTHON} is not set: skipping clip-retrieval; see clip_retrieval_back.py")
        return result | compared({"embedding": ours}, truth, seconds)
    with clip_retrieval(python, embeddings.uri, folder / "clip-retrieval") as theirs:
        result |= compared({"embedding": ours, "clip_retrieval": theirs}, truth, seconds)
    result["ratio"] = result["embedding"]["searches_s"] / result["clip_retrieval"]["searches_s"]
    result["clip_retrieval"]["index"] = json.loads((folder / "clip-retrieval" / "image.json").read_text())["index_key"]
    return result


def compared(servers: dict[str, Server], truth: GroundTruth, seconds: float) -> dict[str, Any]:
    """Return the results of alternating rounds of the servers, and their recall."""
    rounds: dict[str, list[Latencies]] = {name: [] for name in servers}
    recalls = {}
    for _, (name, one) in itertools.product(range(ROUNDS), servers.items()):
        bodies = one.embedding_bodies(truth.queries)
        with stopped([other.pid for other in servers.values() if other is not one]):
            if name not in recalls:  # this warms it up as well
                recalls[name] = recall_of(one, bodies, truth)
            rounds[name].append(latencies_of(one, bodies, seconds))
        print(f"  {name:16} {rounds[name][-1].rate:7.1f} searches/s, load {os.getloadavg()[0]:.1f}", flush=True)
    return {name: summary(rounds[name]) | {"recall_at_10": recalls[name]} for name in servers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latencies:
    """Latencies of the searches of a round, and the searches per second."""

    all_s: list[float]
    rate: float


def latencies_of(server: Server, bodies: Sequence[bytes], seconds: float) -> Latencies:
    """Search with 32 clients for some seconds. Each has a connection of its own."""
    found, numbers, started = list[float](), itertools.count(), time.perf_counter()

    def client() -> None:
        with connection(server) as own:
            while (begun := time.perf_counter()) < started + seconds:
                search(own, server, bodies[next(numbers) % len(bodies)])
                found.append(time.perf_counter() - begun)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for future in [pool.submit(client) for _ in range(CLIENTS)]:
            future.result()
    return Latencies(all_s=found, rate=len(found) / (time.perf_counter() - started))


def recall_of(server: Server, bodies: Sequence[bytes], truth: GroundTruth) -> float:
    """Return recall@10 of the responses."""
    with connection(server) as own:
        found = [server.ids(json.loads(search(own, server, body))) for body in bodies]
    return float(np.mean([len(set(got) & set(true)) / K for got, true in zip(found, truth.ids.tolist(), strict=True)]))


def search(own: http.client.HTTPConnection, server: Server, body: bytes) -> bytes:
    """Return the body of the response.

    Flask's server sends headers and body apart. Without immediate acknowledgements, each response would take 40 ms.
    """
    own.request("POST", server.path, body, {"Content-Type": "application/json"})
    own.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    response = own.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{server.path} answered {response.status}: {content[:200]!r}")
    return content


@contextmanager
def connection(server: Server) -> Iterator[http.client.HTTPConnection]:
    """Yield a connection. It sends requests with little work, because the clients share the cores with the server."""
    own = http.client.HTTPConnection(server.address, timeout=60)
    try:
        yield own
    finally:
        own.close()


def summary(rounds: Sequence[Latencies]) -> dict[str, Any]:
    """Return the median of the rates, and percentiles of all latencies."""
    latencies = [one for each in rounds for one in each.all_s]
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return {"searches_s": statistics.median(each.rate for each in rounds), "p50_ms": float(p50), "p99_ms": float(p99)}


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Stop processes during the block: an idle server polls."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def clip_retrieval(python: str, embeddings: str, folder: Path) -> Iterator[Server]:
    """Serve clip-retrieval's ``back`` on a free loopback port; its index is built before, unless it exists."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, site_packages = HERE / "clip_retrieval_back.py", Path(torch.__file__).parent.parent
    command = [str(Path(python).absolute()), script, embeddings, folder, str(port), site_packages]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL) as process,
    ):
        try:
            wait_for(port, process, log)
            yield Server(
                address=f"127.0.0.1:{port}",
                pid=process.pid,
                path="/knn-service",
                body=lambda query: {
                    "embedding_input": query, "modality": "image", "num_images": K, "indice_name": "rows",
                },
                ids=lambda response: [one["id"] for one in response],
            )  # fmt: skip
        finally:
            process.terminate()


def wait_for(port: int, process: "subprocess.Popen[bytes]", log: Any) -> None:
    """Wait until a process listens on a port. Raises ``RuntimeError`` with the end of its log if it does not."""
    deadline = time.monotonic() + STARTUP_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    log.seek(0)
    ended = "does not listen" if process.returncode is None else f"ended with {process.returncode}"
    raise RuntimeError(f"clip-retrieval {ended}:\n{log.read()[-2000:]}")
