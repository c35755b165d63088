"""A disk that fills up and a store that is down in the middle of a build, in each of its stages."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from support.changing_domain import NAMES, Living
from support.fakes import WithoutRay

from infra import storage
from infra.errors import StageError
from infra.storage.errors import storage_errors

STAGES = {"images": ".tar", "embeddings": ".npy", "database": ".faiss"}
SHARDS_LEFT = {"images": 2, "embeddings": 2, "database": 0}
"""That were committed by the stage when the fault came: it strikes the third file, of an index the first."""
Put = Callable[[Path, str], None]


def failing(kind: str, error: Exception, put: Put, seen: list[str]) -> Put:
    """Storage of which a stage's file fails, once; ``seen`` are those that were to be stored."""

    def fails_once(local: Path, uri: str) -> None:
        if f"/{kind}/" in uri and uri.endswith(STAGES[kind]) and not uri.endswith("quantizer.faiss"):
            seen.append(uri)
            if len(seen) == SHARDS_LEFT[kind] + 1:
                with storage_errors(uri):
                    raise error
        put(local, uri)

    return fails_once


def committed(folder: Path) -> dict[str, int]:
    """The shards' markers that are there, and when each was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.json") if path.parent.name == "shards"}


@pytest.mark.parametrize("kind", STAGES)
def test_a_disk_that_fills_up_costs_nothing_that_was_committed(
    kind: str, living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(living.root) / "shapes"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "put", failing(kind, full, storage.put, []))
        with pytest.raises(StageError, match=r"no space left for .*free some space or choose another") as caught:
            living.build(NAMES[:16])
    assert "\n" not in str(caught.value)
    assert not list((base / kind).glob("*/manifest.json")), "what is not whole is no artifact"
    assert living.versions() == []
    kept = committed(base)

    built: Any = living.build(NAMES[:16])

    assert kept.items() <= committed(base).items(), "what was committed is not made again"
    assert living.champion() == set(NAMES[:16])
    unbroken: Any = living.build(NAMES[:16], domain="unbroken")
    assert built.database.reference.digest == unbroken.database.reference.digest


@pytest.mark.parametrize("kind", STAGES)
def test_a_store_that_is_down_for_a_moment_costs_a_try(
    kind: str, living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = EndpointConnectionError(endpoint_url="http://store")
    seen: list[str] = []
    monkeypatch.setattr(storage, "put", failing(kind, down, storage.put, seen))
    built: Any = living.build(NAMES[:16])
    assert seen.count(seen[SHARDS_LEFT[kind]]) == 2, "what failed was stored again, and nothing else"
    assert len(seen) == len(set(seen)) + 1
    assert living.champion() == set(NAMES[:16])
    unbroken: Any = living.build(NAMES[:16], domain="unbroken")
    assert built.database.reference.digest == unbroken.database.reference.digest
