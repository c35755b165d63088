"""Foreign manifests: consistent digests, arbitrary content."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.fakes import Reply

from infra.artifacts import digest_of

DIGEST = "ab" * 32


def file_entry(name: str = "00000.tar", **changes: Any) -> dict[str, Any]:
    return {"name": name, "sha256": DIGEST, "bytes": 8, **changes}


def shard_entry(name: str = "00000", *files: dict[str, Any], rows: int = 3, **changes: Any) -> dict[str, Any]:
    return {"name": name, "rows": rows, "files": list(files), "info": {}, "folder": None, **changes}


def manifest(kind: str, *shards: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the fields of a manifest, without its digest."""
    return {
        "kind": kind,
        "key": "0123456789abcdef",
        "rows": sum(shard["rows"] for shard in shards),
        "shards": list(shards),
        "inputs": {},
        "config": {},
        "identity": {},
        "info": {},
        "created_at": "2026-01-01T00:00:00+00:00",
        "schema_version": 1,
        **changes,
    }


def signed(fields: Mapping[str, Any]) -> bytes:
    """Return the JSON of a manifest with a valid digest, which an attacker can compute too."""
    digest = digest_of(
        {
            "kind": fields["kind"],
            "rows": fields["rows"],
            "shards": [[shard["name"], shard["rows"], shard["files"]] for shard in fields["shards"]],
            "inputs": {name: source["digest"] for name, source in fields["inputs"].items()},
            "identity": fields["identity"],
        }
    )
    return json.dumps({**fields, "digest": digest}).encode()


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return a manifest of one shard with one input after ``change``, with a valid digest if it can be computed."""
    source = {"uri": "/data/images/1", "digest": DIGEST}
    fields = manifest("images", shard_entry("00000", file_entry()), inputs={"urls": source})
    change(fields)
    try:
        return signed(fields)
    except (AttributeError, KeyError, TypeError, ValueError):
        return json.dumps(fields).encode()


def replies(pages: Mapping[str, bytes]) -> dict[str, Reply]:
    """Return replies that serve these files."""
    return {path: Reply(body=body) for path, body in pages.items()}


def victim(folder: Path) -> Path:
    """Create a folder with a file that must stay unchanged."""
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    return folder


def is_untouched(folder: Path) -> bool:
    return [path.name for path in folder.iterdir()] == ["thesis.txt"]
