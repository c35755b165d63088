"""Committed folders of a stage, of two shards each."""

from collections.abc import Mapping
from typing import Any

from infra import artifacts, storage
from infra.artifacts import ArtifactBuilder, Manifest, Shard

INPUTS = {"images": {"uri": "/data/images/1", "digest": "11" * 32}, "urls": {"uri": "s3://b/2", "digest": "22" * 32}}
CONFIG = {"size": 64, "name": "ViT-B-32", "limits": {"max_side_px": 1024, "hosts": ["a", "b"]}}


def new_builder(base: str, **changes: Any) -> ArtifactBuilder:
    request = {"kind": "images", "inputs": INPUTS, "config": CONFIG, **changes}
    return ArtifactBuilder(base, request["kind"], inputs=request["inputs"], config=request["config"])


def fill(
    builder: ArtifactBuilder,
    name: str,
    files: Mapping[str, bytes],
    *,
    rows: int = 3,
    info: Mapping[str, Any] | None = None,
) -> Shard:
    """Commit a shard of these files as a worker does."""
    with storage.scratch() as scratch:
        for relative, data in files.items():
            (scratch / relative).parent.mkdir(parents=True, exist_ok=True)
            (scratch / relative).write_bytes(data)
        return artifacts.commit_shard(builder.uri, name, scratch, rows=rows, info=info or {})


def committed(base: str, **changes: Any) -> tuple[ArtifactBuilder, Manifest]:
    """Commit a folder of two shards; return its builder and manifest."""
    builder = new_builder(base, **changes)
    shards = [
        fill(builder, "00000", {"00000.tar": b"tar zero"}),
        fill(builder, "00001", {"00001.tar": b"tar one"}, rows=4),
    ]
    return builder, builder.commit(shards, identity={"encoder": "x"}, info={"seconds": 1.5})
