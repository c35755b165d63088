"""The whole pipeline on a small domain: its results, skipped stages, and runs that are killed."""

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support.fakes import WithoutRay
from support.tiny_domain import COLOURS, NEIGHBOURS, SHAPES, odd_replies, small_config, write_urls

from tasks.references.domain_folder import DomainFolder

GOOD = len(COLOURS) * len(SHAPES)
ACCEPTED = GOOD + sum(outcome == "success" for _, outcome in odd_replies().values())


def test_download_counts_each_image_under_its_outcome(domain: Any) -> None:
    from infra.formats.tables import read_table

    manifest = domain.result.images.reference.manifest()
    expected: dict[str, int] = {"success": GOOD}
    for _, outcome in odd_replies().values():
        expected[outcome] = expected.get(outcome, 0) + 1
    assert manifest.info["outcomes"] == expected
    assert manifest.rows == ACCEPTED
    rows = []
    for path in sorted(Path(domain.result.images.reference.uri).glob("*.parquet")):
        rows += read_table(path).to_pylist()
    seen = {row["url"].rsplit("/", 1)[-1]: row["error_class"] for row in rows}
    assert seen == {f"{c}-{s}.png": "success" for c in COLOURS for s in SHAPES} | {
        path[1:]: outcome for path, (_, outcome) in odd_replies().items()
    }


def test_embeddings_have_the_clip_retrieval_layout(domain: Any) -> None:
    from infra.formats.tables import read_table

    folder = Path(domain.result.embeddings.reference.uri)
    rows = [np.load(path) for path in sorted(folder.glob("img_emb/img_emb_*.npy"))]
    tables = [read_table(path) for path in sorted(folder.glob("metadata/metadata_*.parquet"))]
    assert [len(r) for r in rows] == [t.num_rows for t in tables]
    whole = np.concatenate(rows)
    assert whole.shape == (ACCEPTED, 256)
    assert whole.dtype == np.float16
    assert np.linalg.norm(whole.astype(np.float32), axis=1) == pytest.approx(np.ones(ACCEPTED), abs=2e-3)
    assert tables[0].column_names == ["row", "key", "url", "sha256", "width", "height", "status"]


def test_index_measures_recall_of_image_and_text_queries(domain: Any) -> None:
    info = domain.result.database.reference.manifest().info
    assert info["factory"] == "Flat"
    assert info["recall_at_10_image"] == 1.0
    assert info["recall_at_10_text"] == 1.0
    assert info["text_queries"] == 32


def test_neighbours_are_the_nearest_other_images(domain: Any) -> None:
    from tasks.references.types import Neighbours

    embeddings = Path(domain.result.embeddings.reference.uri)
    rows = np.concatenate([np.load(p) for p in sorted(embeddings.glob("img_emb/*.npy"))]).astype(np.float32)
    uri = domain.result.trained.generator.reference.manifest().inputs["neighbours"]["uri"]
    assert Neighbours.open(uri).rows == ACCEPTED
    found = np.concatenate([np.load(p) for p in sorted(Path(uri).glob("*.npy"))])
    assert found.shape == (ACCEPTED, NEIGHBOURS)
    scores = rows @ rows.T
    for row, ids in enumerate(found):
        assert row not in ids
        others = np.array([o for o in range(ACCEPTED) if not (rows[o] == rows[row]).all()])
        best = np.sort(scores[row, others])[::-1][:NEIGHBOURS]
        assert np.sort(scores[row, ids])[::-1] == pytest.approx(best, abs=1e-5)


def test_evaluation_has_every_score_with_bounds(domain: Any) -> None:
    from tasks.evaluate.task import table

    scores = domain.result.trained.evaluation.reference.scores()
    metrics = ("clip_score", "fd", "mmd", "precision", "recall", "coverage", "nearest", "copy_rate", "authenticity")
    generated = {f"{metric}_{condition}" for metric in metrics for condition in ("knn", "no_knn")} | {"diversity_knn"}
    real = {"fd_real_split", "mmd_real_split", "coverage_real_split"}
    real |= {"nearest_real", "copy_rate_real", "authenticity_real"}
    assert set(scores) == generated | {f"{name}_{end}" for name in generated for end in ("low", "high")} | real
    assert all(-1 <= scores[name] <= 1 for name in ("clip_score_knn", "clip_score_no_knn"))
    assert 0 < scores["fd_real_split"] < scores["fd_knn"]  # samples of a network this small differ from real images
    assert f"{scores['fd_knn']:.3f}" in table(scores)


def test_registered_versions_have_alias_tags_and_signature(domain: Any) -> None:
    import mlflow

    from infra.registry import Registry
    from infra.settings import Settings

    settings = Settings(root=str(domain.root))
    (database,) = Registry(settings).versions("database")
    assert database["name"] == "knn-database.shapes"
    assert database["aliases"] == ["champion"]
    assert (database["encoder"], database["rows"]) == ("sticker-clip", ACCEPTED)
    assert database["digest"] == domain.result.database.reference.digest
    assert database["recall_at_10_image"] == 1.0
    mlflow.set_tracking_uri(settings.tracking_uri)
    info = mlflow.models.get_model_info("models:/knn-diffusion@champion")
    assert [column.name for column in info.signature.inputs.inputs] == ["prompt"]


def test_new_domain_run_again_skips_every_stage(domain: Any, ray: WithoutRay) -> None:
    from flows.new_domain import new_domain

    requests = len(domain.server.requests)
    again = new_domain(domain.config)
    assert set(again.skipped) == {
        "download", "embed", "index", "register_database", "neighbours", "train", "evaluate", "register_generator",
    }  # fmt: skip
    assert all(again.skipped.values())
    assert len(domain.server.requests) == requests
    assert again.database.reference == domain.result.database.reference
    assert ray.items == []


@pytest.mark.slow
def test_registered_versions_are_served_by_mlflow(domain: Any, tmp_path: Path) -> None:
    models = {
        "models:/knn-database.shapes@champion": {"k": 2},
        "models:/knn-diffusion@champion": {"steps": 2, "seed": 3, "k": 2, "database": "shapes"},
    }
    prompts = ["red circle", "blue square"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    tracking = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{domain.root}/mlflow.db"}
    log = (tmp_path / "serve.log").open("w+")
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        addresses = {}
        for model in models:
            port = free_port()
            command = ["mlflow", "models", "serve", "-m", model, "-h", "127.0.0.1", "-p", str(port)]
            serving = subprocess.Popen(
                [sys.executable, "-m", *command, "--env-manager", "local"],
                cwd=tmp_path, env=tracking, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            stack.callback(os.killpg, serving.pid, signal.SIGKILL)
            addresses[model] = f"http://127.0.0.1:{port}"
        for model, params in models.items():
            frame = {"columns": ["prompt"], "data": [[prompt] for prompt in prompts]}
            asked = {"dataframe_split": frame, "params": params}
            answer = answer_of(addresses[model], asked)
            assert answer.status_code == 200, answer.text + (tmp_path / "serve.log").read_text()[-2000:]
            rows = answer.json()["predictions"]
            assert [row["prompt"] for row in rows] == prompts
            for row in rows:
                if "png" in row:
                    assert Image.open(io.BytesIO(base64.b64decode(row["png"]))).size == (16, 16)
                else:
                    assert len(json.loads(row["neighbours"])) == 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answer_of(address: str, asked: dict[str, Any]) -> httpx.Response:
    """Post to a model server, as soon as it is healthy."""
    deadline = time.monotonic() + 150
    while True:
        try:
            if httpx.get(f"{address}/ping").status_code == 200:
                return httpx.post(f"{address}/invocations", json=asked, timeout=60)
        except httpx.TransportError:
            assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.5)


def test_registered_versions_hold_the_wheel_of_the_package(domain: Any, tmp_path: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{domain.root}/mlflow.db")
    for model in ("models:/knn-database.shapes/1", "models:/knn-diffusion/1"):
        (tmp_path / model[8:]).mkdir(parents=True)
        local = Path(mlflow.artifacts.download_artifacts(model, dst_path=str(tmp_path / model[8:])))
        (wheel,) = local.glob("artifacts/*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        assert f"file:artifacts/{wheel.name}#sha256={digest}" in (local / "requirements.txt").read_text().split()
        _, name, number = model.replace("models:/", "models/").split("/")
        assert mlflow.MlflowClient().get_model_version(name, number).tags["package.sha256"] == digest


def test_model_script_without_the_package_says_what_to_install(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tasks" / "pyfunc" / "database.py"
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.append(sys.argv[2]); sys.modules['tasks'] = None; "
         "import runpy; runpy.run_path(sys.argv[1])", str(script), ""],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "run pip install -r requirements.txt in the folder of this model" in done.stderr.splitlines()[-1]


def test_load_pipeline_generates_and_swaps_databases(domain: Any) -> None:
    import torch

    from infra.settings import Settings
    from tasks.serve.load import load_database, load_pipeline

    settings = Settings(root=str(domain.root))
    pipeline = load_pipeline("models:/knn-diffusion@champion", "shapes", settings)
    options: dict[str, Any] = {"num_inference_steps": 2, "num_images_per_prompt": 2}
    first = pipeline("red circle", generator=torch.Generator().manual_seed(1), **options)
    assert len(first.images) == 2
    assert first.hits.ids.shape == (1, NEIGHBOURS)
    pipeline.swap_database(load_database(domain.result.database.reference.uri, settings))
    again = pipeline("red circle", generator=torch.Generator().manual_seed(1), **options)
    assert [np.asarray(a).tolist() for a in first.images] == [np.asarray(b).tolist() for b in again.images]


def test_embed_with_damaged_tar_fails(domain: Any, ray: WithoutRay, tmp_path: Path) -> None:
    import shutil

    from infra.errors import KNNDiffusionError
    from tasks.embed.task import EmbedConfig, embed
    from tasks.references.types import ImageShards

    copy = tmp_path / "images"
    shutil.copytree(domain.result.images.reference.uri, copy)
    tar = sorted(copy.glob("*.tar"))[1]
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(KNNDiffusionError, match=f"{tar.name}.*differs from its committed digest"):
        embed(ImageShards.open(str(copy)), DomainFolder(uri=str(tmp_path), cache=tmp_path), EmbedConfig(workers=1))


def test_open_database_with_damaged_embeddings_fails(domain: Any, tmp_path: Path) -> None:
    from infra.errors import IntegrityError
    from tasks.references.database import open_database

    (npy, *_) = sorted(Path(domain.result.embeddings.reference.uri).glob("img_emb/*.npy"))
    whole = npy.read_bytes()
    try:
        npy.write_bytes(whole[:-2])
        with pytest.raises(IntegrityError, match=f"{npy.name} differs from its committed digest"):
            open_database(domain.result.database.reference, tmp_path)
    finally:
        npy.write_bytes(whole)


def test_new_domain_without_any_download_fails_with_outcomes(domain: Any, ray: WithoutRay, tmp_path: Path) -> None:
    from flows.new_domain import new_domain
    from infra.errors import StageError

    urls = write_urls(tmp_path / "none.jsonl", [domain.server.url(f"/none-{n}.png") for n in range(3)])
    config = small_config(urls, tmp_path, domain.server.host, train=False)
    with pytest.raises(StageError, match=r"none of the 3 URLs .* could be downloaded \(http_404 3\)"):
        new_domain(config)


def test_draw_swap_has_one_row_per_prompt() -> None:
    from flows.demo.figure import CELL_PX, SwapRow, draw_swap

    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (8, 16), "blue")
    rows = [SwapRow(prompt=prompt, groups=([red] * 2, [blue] * 3)) for prompt in ("a", "a much longer prompt")]
    sheet = np.asarray(draw_swap(rows, ("neighbours", "samples")))
    reds = (sheet == (255, 0, 0)).all(axis=2)
    blues = (sheet == (0, 0, 255)).all(axis=2)
    assert reds.sum() == 2 * 2 * CELL_PX * CELL_PX
    assert 0.9 < blues.sum() / (2 * 3 * CELL_PX * CELL_PX / 2) < 1.1  # half as wide as high: the aspect ratio is kept
    rows[1] = dataclasses.replace(rows[1], note="in no database")
    changed = (np.asarray(draw_swap(rows, ("neighbours", "samples"))) != sheet).any(axis=2)
    assert changed.any(), "the note is below the prompt"
    assert not changed[: -CELL_PX - 20].any()


def test_generator_registered_beside_a_champion_waits_for_the_event_if_configured(domain: Any) -> None:
    from infra.promotions import Promotions
    from infra.registry_tags import GENERATOR_NAME
    from infra.settings import Settings
    from infra.tracking import registry_client
    from tasks.register import register_generator

    settings = Settings(root=str(domain.root), promotion="event")
    store, client, trained = Promotions(settings), registry_client(settings), domain.result.trained
    registered = int(trained.registered.uri.rpartition("/")[2])
    other = client.create_model_version(GENERATOR_NAME, f"{domain.root}/other").version
    before = store.champion(GENERATOR_NAME)
    try:
        store.move(GENERATOR_NAME, int(other))
        result = register_generator(
            trained.generator.reference, domain.result.database.reference.uri, {"clip_score": 0.5}, settings
        )
        assert result.alias_uri == f"models:/{GENERATOR_NAME}@candidate"
        assert store.champion(GENERATOR_NAME) == int(other)
        assert store.version_of(GENERATOR_NAME, "candidate") == registered
    finally:
        if before is not None:
            store.move(GENERATOR_NAME, before)
        client.delete_model_version(GENERATOR_NAME, other)
