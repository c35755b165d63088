"""Tests of settings from environment variables."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.settings import Settings

GUARDED = "postgresql://keeper:hunter2@db.internal:5432/mlflow"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all variables that settings read."""
    for name in list(os.environ):
        if name.startswith(("KNN_DIFFUSION_", "MLFLOW_", "AWS_ENDPOINT_URL")):
            monkeypatch.delenv(name)


def test_settings_without_variables_use_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    settings = Settings()
    assert (settings.root, settings.ray_address, settings.cpus) == ("knn-diffusion-data", None, None)
    assert settings.cache_folder == Path("/home/someone/.cache/knn-diffusion")
    assert (settings.cache_bytes, settings.object_store) == (50_000_000_000, None)
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/knn-diffusion-data/mlflow.db"
    assert settings.artifacts_uri == f"{tmp_path}/knn-diffusion-data/mlflow"


def test_settings_read_the_environment_on_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "KNN_DIFFUSION_ROOT": "s3://bucket/line",
        "KNN_DIFFUSION_CACHE": "/var/cache/line",
        "KNN_DIFFUSION_CACHE_BYTES": "1000000",
        "AWS_ENDPOINT_URL": "http://store.internal",
        "KNN_DIFFUSION_RAY_ADDRESS": "auto",
        "KNN_DIFFUSION_CPUS": "3",
        "MLFLOW_TRACKING_URI": "https://mlflow.internal",
        "MLFLOW_ARTIFACTS": "s3://bucket/mlflow",
        "KNN_DIFFUSION_UNKNOWN": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.root, settings.ray_address, settings.cpus) == ("s3://bucket/line", "auto", 3)
    assert settings.cache_folder == Path("/var/cache/line")
    assert (settings.cache_bytes, settings.object_store) == (1_000_000, "http://store.internal")
    assert settings.tracking_uri == "https://mlflow.internal"
    assert settings.artifacts_uri == "s3://bucket/mlflow"
    monkeypatch.setenv("KNN_DIFFUSION_CPUS", "4")
    assert (settings.cpus, Settings().cpus) == (3, 4)


def test_settings_arguments_override_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNN_DIFFUSION_ROOT", "/from/environment")
    monkeypatch.setenv("KNN_DIFFUSION_CPUS", "3")
    settings = Settings(root=str(tmp_path))
    assert (settings.root, settings.cpus) == (str(tmp_path), 3)
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("cpus", ["0", "-1", "many"])
def test_settings_with_an_invalid_number_of_cores_raise_validation_error(
    cpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNN_DIFFUSION_CPUS", cpus)
    with pytest.raises(ValidationError, match=r"(?s)^1 validation error for Settings\ncpus\n"):
        Settings()


@pytest.mark.parametrize("size", ["-1", "50 GB"])
def test_settings_with_an_invalid_cache_size_raise_validation_error(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNN_DIFFUSION_CACHE_BYTES", size)
    with pytest.raises(ValidationError, match=r"(?s)^1 validation error for Settings\ncache_bytes\n"):
        Settings()


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().root = "/elsewhere"  # type: ignore[misc]


def test_tracking_uri_of_a_remote_root_requires_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(root="s3://bucket/line")
    with pytest.raises(ValueError, match="is remote") as caught:
        _ = settings.tracking_uri
    assert str(caught.value) == (
        "the root s3://bucket/line is remote: set MLFLOW_TRACKING_URI to a database or a server"
    )
    assert settings.artifacts_uri == "s3://bucket/line/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.internal")
    assert Settings(root="s3://bucket/line").tracking_uri == "https://mlflow.internal"


def test_settings_never_print_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", GUARDED)
    settings = Settings()
    assert settings.tracking_uri == GUARDED.replace("postgresql", "postgresql+psycopg")
    for text in (repr(settings), str(settings), f"{settings}", repr({"settings": settings})):
        assert "hunter2" not in text
        assert "keeper" not in text
        assert "root='knn-diffusion-data'" in text


def test_settings_hide_the_password_of_the_root() -> None:
    settings = Settings(root="ftp://keeper:hunter2hunter2@host/line")
    assert settings.root == "ftp://keeper:***@host/line"
    with pytest.raises(ValueError, match="set MLFLOW_ARTIFACTS") as caught:
        _ = settings.artifacts_uri
    assert "hunter2" not in str(caught.value)
