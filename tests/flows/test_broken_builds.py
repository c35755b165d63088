"""Builds with a full disk or a failing store, in each stage."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from support.changing_domain import BODY, NAMES, Living
from support.fakes import LoopbackServer, Reply, WithoutRay

from infra import artifacts, storage
from infra.errors import StageError
from infra.storage.errors import storage_errors

STAGES = {"images": ".tar", "embeddings": ".npy", "database": ".faiss"}
COMMITTED_SHARDS = {"images": 2, "embeddings": 2, "database": 0}
"""Number of shards that each stage commits before the fault."""
Put = Callable[[Path, str], None]


def failing_put(kind: str, error: Exception, put: Put, seen: list[str]) -> Put:
    """Return a ``put`` that fails once on a file of the stage; ``seen`` collects the URIs of the stage."""

    def fails_once(local: Path, uri: str) -> None:
        if f"/{kind}/" in uri and uri.endswith(STAGES[kind]) and not uri.endswith("quantizer.faiss"):
            seen.append(uri)
            if len(seen) == COMMITTED_SHARDS[kind] + 1:
                with storage_errors(uri):
                    raise error
        put(local, uri)

    return fails_once


def committed(folder: Path) -> dict[str, int]:
    """Return the shard markers in a folder, with their modification times."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.json") if path.parent.name == "shards"}


@pytest.fixture(scope="module")
def unbroken(
    image_server: LoopbackServer, migrated_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> artifacts.Manifest:
    """Manifest of a database built without a fault."""
    image_server.reset({path: Reply(body=body) for path, body in BODY.items()})
    with pytest.MonkeyPatch.context() as patch:
        WithoutRay().install(patch)
        built: Any = Living(image_server, tmp_path_factory.mktemp("unbroken"), migrated_database).build(NAMES[:16])
    manifest: artifacts.Manifest = built.database.reference.manifest()
    return manifest


@pytest.mark.parametrize("kind", STAGES)
def test_build_after_full_disk_reuses_committed_shards(
    kind: str, unbroken: artifacts.Manifest, living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(living.root) / "shapes"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "put", failing_put(kind, full, storage.put, []))
        with pytest.raises(StageError, match=r"no space left for .*free some space or choose another") as caught:
            living.build(NAMES[:16])
    assert "\n" not in str(caught.value)
    assert not list((base / kind).glob("*/manifest.json")), "an incomplete artifact has no manifest"
    assert living.versions() == []
    before = committed(base)

    built: Any = living.build(NAMES[:16])

    assert before.items() <= committed(base).items(), "committed shards are not written again"
    assert living.champion() == set(NAMES[:16])
    assert built.database.reference.digest == unbroken.digest


@pytest.mark.parametrize("kind", STAGES)
def test_build_with_transient_store_failure_retries_only_the_failed_file(
    kind: str, unbroken: artifacts.Manifest, living_on_prefect: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    living = living_on_prefect  # Prefect retries the task of the stage
    down = EndpointConnectionError(endpoint_url="http://store")
    seen: list[str] = []
    monkeypatch.setattr(storage, "put", failing_put(kind, down, storage.put, seen))
    built: Any = living.build(NAMES[:16])
    assert seen.count(seen[COMMITTED_SHARDS[kind]]) == 2, "only the failed file is stored again"
    assert len(seen) == len(set(seen)) + 1
    assert living.champion() == set(NAMES[:16])
    assert built.database.reference.digest == unbroken.digest
