"""The demo: lists, images, server, and the whole run on a first_rows images with a tiny generator."""

import io
import json
import shutil
import types
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.fakes import WithoutRay

from flows.demo import images, run
from flows.demo.images import ANIMALS, DOMAINS, FIRST, OPENMOJI
from infra.errors import InputError, StageError


def listed(path: Path) -> list[str]:
    return [url.split("/", 3)[3] for url in pq.read_table(path)["url"].to_pylist()]


def test_write_lists_puts_every_image_into_the_list_of_its_domain(tmp_path: Path) -> None:
    paths = images.write_lists(tmp_path, "127.0.0.1:9")
    files = {name: listed(path) for name, path in paths.items()}
    assert {name: len(entries) for name, entries in files.items()} == {FIRST: 3879, ANIMALS: 130, OPENMOJI: 1398}
    assert {"twemoji/2764.png", "twemoji/1f697.png"} <= set(files[FIRST])
    assert {"twemoji/1f408.png", "twemoji/1f426.png"} <= set(files[ANIMALS])
    assert {"openmoji/2764.png", "openmoji/1F408.png"} <= set(files[OPENMOJI])
    assert not set(files[FIRST]) & set(files[ANIMALS])
    texts = (tmp_path / "texts.txt").read_text().splitlines()
    assert {"red heart", "automobile"} <= set(texts)
    assert not {"cat", "bird"} & set(texts)
    assert len(set(texts)) == len(texts)


def test_openmoji_drawings_exclude_flags_tones_and_private_symbols() -> None:
    stems = [path.stem for path in images.openmoji_drawings()]
    assert max(Counter(stems).values()) == 1
    characters = [chr(int(stem.split("-")[0], 16)) for stem in stems]
    assert "\U0001f697" in characters
    assert not any("\U0001f1e6" <= character <= "\U0001f1ff" for character in characters)
    assert not any("\ue000" <= character <= "\uf8ff" for character in characters)


def test_draw_openmoji_skips_existing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = images.openmoji_drawings()[100:103]
    monkeypatch.setattr(images, "openmoji_drawings", lambda: drawings)
    first, second, third = (tmp_path / f"{path.stem}.png" for path in drawings)
    first.write_bytes(b"rendered before")
    images.draw_openmoji(tmp_path)
    assert first.read_bytes() == b"rendered before"
    assert sorted(tmp_path.iterdir()) == [first, second, third]
    for path in (second, third):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((72, 72), "RGBA")
            assert np.asarray(image).std() > 3


def test_folder_of_missing_package_fails_with_install_command() -> None:
    with pytest.raises(InputError, match=r"not installed: no_such_moji; run pip install 'knn-diffusion\[demo\]'"):
        images._folder("no_such_moji")


def test_serve_images_serves_only_both_sets_on_the_same_port(tmp_path: Path) -> None:
    (tmp_path / "openmoji").mkdir()
    (tmp_path / "openmoji" / "1F408.png").write_bytes(b"a cat")
    (tmp_path / "secret.png").write_bytes(b"secret")
    with images.serve_images(tmp_path, None) as address:
        with urllib.request.urlopen(f"http://{address}/openmoji/1F408.png", timeout=10) as answer:
            assert answer.read() == b"a cat"
        with urllib.request.urlopen(f"http://{address}/twemoji/1f408.png", timeout=10) as answer:
            assert Image.open(io.BytesIO(answer.read())).size == (72, 72)
        for path in ("secret.png", "openmoji/../secret.png", "openmoji/%2e%2e/secret.png", "other/1f408.png", ""):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"http://{address}/{path}", timeout=10)
        assert (tmp_path / "port").read_text() == address.split(":")[1]
        with (
            pytest.raises(StageError, match=r"port is in use: .* start with another --folder"),
            images.serve_images(tmp_path, None),
        ):
            pass
    with images.serve_images(tmp_path, None) as again:
        assert again == address


def test_judged_adopts_the_bundled_generator_unless_training() -> None:
    from flows.recipes import demo_cpu

    for train in (False, True):
        config = run.judged(demo_cpu(FIRST, "urls.parquet", root="data", train=train))
        assert (config.train is not None) is train
        assert config.generator == (None if train else "sticker-generator")
        assert (config.evaluate.samples, config.evaluate.steps) == (run.EVALUATION_SAMPLES, None)


def stage_result(**manifests: Any) -> Any:
    """Return a stage result whose manifest has the given fields."""
    manifest = types.SimpleNamespace(**{"rows": 5, "info": {}} | manifests)
    return types.SimpleNamespace(reference=types.SimpleNamespace(manifest=lambda: manifest, rows=manifest.rows))


@pytest.mark.parametrize("measured", [{"adopted": "x"}, {"images_seen": 64}, {"images_seen": 64, "images_per_s": 8.04}])
def test_report_of_includes_the_available_training_measurements(measured: dict[str, Any]) -> None:
    info = {"parameters": 7, **measured}
    evaluation = stage_result(rows=4)
    evaluation.reference.scores = lambda: {"clip_score_knn": 0.34567}
    trained = types.SimpleNamespace(
        generator=stage_result(info=info), evaluation=evaluation, registered=types.SimpleNamespace(uri="models:/g/1")
    )
    domains: Any = {
        name: types.SimpleNamespace(
            images=stage_result(info={"requested": 6, "outcomes": {"success": 5, "http_404": 1}}),
            embeddings=stage_result(),
            database=stage_result(info={"recall_at_10_image": 1.0, "recall_at_10_text": 0.5}),
            registered=types.SimpleNamespace(uri=f"models:/knn-database.{name}/1"),
            trained=trained if name == FIRST else None,
            seconds={"download": 1.234},
            skipped={"download": False},
        )
        for name in DOMAINS
    }
    report = json.loads(json.dumps(run.report_of(domains, 0.001, {"draw_samples": 2.0, "total": 3.0})))
    rounded = {"images_seen": 64, "images_per_s": 8.0}
    assert {name: value for name, value in report.items() if name.startswith("train_")} == {
        f"train_{name}": rounded[name] for name in measured if name in rounded
    }
    assert (report["images_requested"], report["images_downloaded"], report["embeddings"]) == (18, 15, 15)
    assert list(report["database_uris"]) == list(report["images"]) == list(DOMAINS)
    assert (report["clip_score_knn"], report["evaluation_samples"], report["parameters"]) == (0.3457, 4, 7)
    assert report["seconds"] == {name: {"download": 1.23} for name in DOMAINS} | {"draw_samples": 2.0}
    assert report["total_seconds"] == 3.0


@pytest.mark.slow
def test_run_demo_writes_figure_and_report_and_skips_everything_when_repeated(
    domain: Any, ray: WithoutRay, migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infra.settings import Settings
    from tasks.serve.load import load_pipeline

    tiny = domain.result.trained.generator.reference.uri + "/pipeline"
    write_lists = images.write_lists

    def first_rows(root: Path, address: str) -> dict[str, Path]:
        paths = write_lists(root, address)
        for path in paths.values():
            pq.write_table(pq.read_table(path).slice(0, 24), path)
        return paths

    drawings = images.openmoji_drawings()[:24]
    monkeypatch.setattr(images, "openmoji_drawings", lambda: drawings)
    changes = {"write_lists": first_rows, "BUNDLED_GENERATOR": tiny, "PROMPTS": ("a red heart", "a cat")}
    for name, value in {**changes, "EVALUATION_SAMPLES": 8, "DIVERSITY_PROMPTS": 1}.items():
        monkeypatch.setattr(run, name, value)
    (tmp_path / "data").mkdir()
    shutil.copy(migrated_database, tmp_path / "data" / "mlflow.db")
    figure, path = run.run_demo(tmp_path)
    report = json.loads(path.read_text())
    assert report["images"] == dict.fromkeys(DOMAINS, 24)
    assert report["evaluation_samples"] == 8
    assert -1 <= report["clip_score_knn"] <= 1
    assert set(report["skipped"][FIRST]) >= {"adopt", "evaluate", "register_generator"}
    with Image.open(figure) as sheet:
        assert sheet.width > 3 * 6 * 72
    pipeline = load_pipeline("knn-diffusion", OPENMOJI, Settings(root=str(tmp_path / "data")))
    assert len(pipeline("a red heart", num_inference_steps=1).images) == 1
    _, path = run.run_demo(tmp_path)
    again = json.loads(path.read_text())
    assert all(skipped for stages in again["skipped"].values() for skipped in stages.values())
    assert again["model_uri"] == report["model_uri"]
