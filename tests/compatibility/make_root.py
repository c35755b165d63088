"""Write the root in ``root-0.1/``: databases, a generator and a registry as release 0.1.0 stores them.

Run at commit a7d5b72 (0.1.0) with diffusers 0.42.1, faiss-cpu 1.15.1, mlflow 3.17.2, torch 2.14.1 and Prefect 3.8.8:

    python tests/compatibility/make_root.py

Do not run it with later code: the fixture proves that later versions read what 0.1.0 wrote. The script uses only the
stable interface: the flows of prefect.yaml with JSON parameters. The root holds two domains:

    plain     8 images; a tiny generator trained on them, registered as knn-diffusion; two evaluations of it, a report
    shapes    version 1: 8 images in two shards; version 2: 4 more images; version 3: one of the 12 images taken down

Absolute paths are stored as ``@ROOT@``, and MLflow's SQLite file as SQL, so that ``unpack_root`` in
``tests/test_compatibility.py`` can place the root anywhere: manifest checksums do not cover the paths of folders.
Checkpoints, leases, and all files of the report but its manifest are left out.
"""

import json
import os
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parent.parent.parent
FIXTURE = Path(__file__).parent / "root-0.1"
PLACEHOLDER = "@ROOT@"
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square")
SIDE = 32
PATHS = [f"/{colour}-{shape}.png" for shape in SHAPES for colour in COLOURS]
TEXTS = ["a red circle", "a blue square", "a green circle", "an orange square"]


def png(path: str) -> bytes:
    """Draw the image that a URL path names."""
    import io

    from PIL import Image, ImageDraw

    colour, shape = path[1:-4].split("-")
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw, box = ImageDraw.Draw(image), (4, 4, SIDE - 5, SIDE - 5)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def domain(name: str, urls: Path, root: Path, host: str) -> dict[str, Any]:
    """Return the parameters of ``new-domain``."""
    return {
        "domain": name,
        "urls": str(urls),
        "root": str(root),
        "download": {
            "shard_rows": 4,
            "policy": {"allow_hosts": [host], "threads": 4, "retries": 0},
            "workers": 1,
        },
        "embed": {"workers": 1, "batch_size": 4},
        "index": {"recall_queries": 4, "texts": TEXTS},
    }


def training() -> dict[str, Any]:
    """Return the parameters of a training that takes seconds: 16 px, one layer, eight steps."""
    return {
        "network": {
            "kind": "transformer", "image_size": 16, "patch_size": 4, "layers": 1, "heads": 1, "head_width": 8
        },
        "conditioning": {"neighbours": 2, "pool": 2},
        "training": {
            "images": 32, "batch_size": 4, "warmup_images": 8, "checkpoint_images": 32, "log_images": 16,
            "grid_images": 32,
        },
        "cpus_per_worker": 1,
    }  # fmt: skip


def evaluation() -> dict[str, Any]:
    """Return the parameters of an evaluation of four samples."""
    return {"prompts": TEXTS, "samples": 4, "steps": 1, "seeds": 2, "diversity_prompts": 1, "bootstrap": 10}


def make(root: Path) -> None:
    """Run the flows."""
    from support.fakes import LoopbackServer, Reply

    from flows.evaluate_generator import evaluate_generator
    from flows.new_domain import new_domain
    from flows.rebuild_index import rebuild_index

    lists = root / "lists"
    lists.mkdir(parents=True)

    def listed(name: str, urls: list[str]) -> Path:
        path = lists / name
        path.write_text("".join(json.dumps({"url": url}) + "\n" for url in urls))
        return path

    with LoopbackServer({path: Reply(body=png(path)) for path in PATHS}) as server:
        urls = [server.url(path) for path in PATHS]
        plain = domain("plain", listed("plain.jsonl", urls[:8]), root, server.host)
        new_domain(config={**plain, "train": training(), "evaluate": evaluation()})
        evaluate_generator(
            config={"databases": ["plain"], "root": str(root), "evaluate": {**evaluation(), "ablations": True}}
        )
        new_domain(config=domain("shapes", listed("shapes.jsonl", urls[:8]), root, server.host))
        grown = listed("shapes-grown.jsonl", urls)
        rebuild_index(config={"domain": "shapes", "root": str(root), "urls": str(grown)})
        down = listed("shapes-takedown.jsonl", [server.url("/green-circle.png")])
        rebuild_index(config={"domain": "shapes", "root": str(root), "takedown": str(down)})


def is_left_out(path: str) -> bool:
    """Return True if the fixture omits the file; ``path`` is relative to the root."""
    in_report = path.startswith("plain/report/") and not path.endswith("/manifest.json")
    is_report_copy = path.startswith("mlflow/") and "/evaluation." in path
    return in_report or is_report_copy or "/lease/" in path or "/checkpoints/" in path or path == "mlflow.db"


def pack(root: Path) -> None:
    """Copy the root into the fixture, and replace its path by the placeholder."""

    def portable(data: bytes) -> bytes:
        return data.replace(str(root).encode(), PLACEHOLDER.encode()).replace(str(CHECKOUT).encode(), b"/opt/checkout")

    shutil.rmtree(FIXTURE, ignore_errors=True)
    for source in sorted(path for path in root.rglob("*") if path.is_file()):
        name = source.relative_to(root).as_posix()
        if not is_left_out(name):
            target = FIXTURE / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # The checksum of a takedown covers the path of its list, which nothing opens again.
            target.write_bytes(source.read_bytes() if "/takedown/" in name else portable(source.read_bytes()))
    with sqlite3.connect(root / "mlflow.db") as database:
        # The user and the clone that registered a version: nothing reads them.
        database.execute("DELETE FROM logged_model_tags WHERE tag_key IN ('mlflow.user', 'mlflow.source.git.repoURL')")
        sql = "\n".join(database.iterdump()) + "\n"
    (FIXTURE / "mlflow.sql").write_bytes(portable(sql.encode()))


if __name__ == "__main__":
    sys.path[:0] = [str(CHECKOUT / "tests"), str(CHECKOUT)]
    import conftest  # noqa: F401  # its environment: no telemetry, no settings of the user

    from infra.prefect_server import prefect_api

    with tempfile.TemporaryDirectory() as scratch, prefect_api(Path(scratch, "prefect")):
        os.environ["KNN_DIFFUSION_CACHE"] = str(Path(scratch, "cache"))
        make(Path(scratch, "root"))
        pack(Path(scratch, "root"))
