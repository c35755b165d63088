"""Tests of the wheel that is stored with registered versions."""

import base64
import csv
import hashlib
import importlib.metadata
import io
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from infra import wheel
from infra.wheel import package

WEIGHTS = "model/pretrained/sticker-clip/open_clip_model.safetensors"


def test_package_is_a_wheel_of_the_sources_with_valid_records(tmp_path: Path) -> None:
    made = package(tmp_path)
    assert made.wheel is not None
    assert made.sha256 == hashlib.sha256(made.wheel.read_bytes()).hexdigest()
    assert made.requirement == f"file:artifacts/{made.wheel.name}#sha256={made.sha256}"
    with zipfile.ZipFile(made.wheel) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith("/RECORD"))
        rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
        assert [row[0] for row in rows] == names
        for name, digest, _ in rows[:-1]:
            encoded = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
            assert digest == f"sha256={encoded}"
    assert {"infra/wheel.py", "tasks/templates/base.html.j2"} <= set(names)
    assert WEIGHTS not in names
    assert not any("__pycache__" in name for name in names)


def test_package_has_only_the_weights_that_are_asked_for_and_equal_bytes_elsewhere(tmp_path: Path) -> None:
    first, second = package(tmp_path / "a", {"sticker-clip"}), package(tmp_path / "b", {"sticker-clip"})
    assert first.wheel is not None
    assert first.sha256 == second.sha256
    with zipfile.ZipFile(first.wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".safetensors")] == [WEIGHTS]


def test_package_is_installed_by_pip_only_with_its_digest(tmp_path: Path) -> None:
    made = package(tmp_path / "cache")
    assert made.wheel is not None and made.sha256 is not None
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / made.wheel.name).write_bytes(made.wheel.read_bytes())

    def install(requirement: str) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "requirements.txt").write_text(requirement)
        options = ["--no-deps", "--no-index", "--quiet", "--target", "to", "-r", "requirements.txt"]
        return subprocess.run(
            [sys.executable, "-m", "pip", "install", *options], cwd=tmp_path, capture_output=True, text=True
        )

    wrong = install(made.requirement.replace(made.sha256, "0" * 64))
    assert wrong.returncode != 0
    assert "Expected sha256 0000" in wrong.stderr + wrong.stdout
    right = install(made.requirement)
    assert right.returncode == 0, right.stderr
    assert (tmp_path / "to" / "infra" / "wheel.py").exists()


def test_package_without_metadata_is_a_requirement_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wheel, "NAME", "a-package-that-is-not-installed")
    with caplog.at_level(logging.WARNING, logger="knn_diffusion"):
        made = package(tmp_path)
    assert (made.requirement, made.wheel) == ("a-package-that-is-not-installed", None)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "where it is served, install a-package-that-is-not-installed yourself" in line
    monkeypatch.undo()
    (tmp_path / "wheels").write_text("no folder")
    assert package(tmp_path).requirement == f"knn-diffusion=={importlib.metadata.version('knn-diffusion')}"
