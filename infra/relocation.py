"""Repair of a local root that was moved or copied: its manifests and its registry hold absolute paths.

A copy would otherwise read the files of the original. Only locations are rewritten. Keys, digests and checksums do not
depend on them, so they remain valid.
"""

import contextlib
import dataclasses
import functools
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from infra import artifacts, storage, uris
from infra.errors import InputError
from infra.manifest import MAX_MANIFEST_BYTES, MAX_MARKER_BYTES, Manifest, Shard, marker_json, parse_shard
from infra.settings import Settings
from infra.storage.errors import storage_errors
from infra.storage.local_writes import atomic_write

_DEPTH = 3  # of a committed folder below the root: domain, kind and key
_FOLDER_TAG = "uri"

Rewrite = Callable[[str], str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Relocation:
    """Result of :func:`relocate`: the former paths of the root, and the number of files that were rewritten."""

    former: tuple[str, ...]
    files: int


def former_root(uri: str, root: str) -> str | None:
    """Return the root that ``uri``, a committed folder, was stored in if ``root`` is a copy of that root, else None."""
    if not (uris.is_local(uri) and uris.is_local(root)) or uris.is_below(uri, root):
        return None
    parts = Path(uris.absolute(uri)).parts
    if len(parts) <= _DEPTH:
        return None
    counterpart = Path(uris.absolute(root), *parts[-_DEPTH:], artifacts.MANIFEST)
    return str(Path(*parts[:-_DEPTH])) if counterpart.is_file() else None


def require_in_place(uri: str, root: str) -> None:
    """Raise ``InputError`` if ``uri`` is in another root, and ``root`` is a copy of that one."""
    if former := former_root(uri, root):
        root = uris.absolute(root)
        raise InputError(
            f"{root} was moved or copied from {former}, whose files would be read; run knn-diffusion relocate {root}"
        )


def relocate(settings: Settings) -> Relocation:
    """Rewrite the locations in all manifests and in the SQLite registry of a root that was moved or copied.

    Nothing else may use the root while the command runs. A run that was interrupted can be repeated.

    Raises:
        InputError: The root is remote.
        IntegrityError: A manifest is damaged.
    """
    if not uris.is_local(settings.root):
        raise InputError(f"the root is remote: {settings.root}; a bucket is copied under the same name, or not at all")
    root = Path(uris.absolute(settings.root))
    from infra import registry_database  # imports MLflow

    database = registry_database.path_of(settings.tracking_uri)
    if database is not None and not (database.exists() and uris.is_below(str(database), str(root))):
        database = None
    manifests = sorted(root.glob("*/*/*/" + artifacts.MANIFEST))
    former = _former_roots(root, manifests, database)
    if not former:
        return Relocation(former=(), files=0)
    rewrite = functools.partial(_rewritten, former=former, root=str(root))
    changed = sum(_rewrite_manifest(path, rewrite) for path in manifests)
    changed += sum(_rewrite_marker(path, rewrite) for path in sorted(root.glob("*/*/*/shards/*.json")))
    changed += sum(
        _rewrite_manifest(path, rewrite) for path in sorted(root.glob(f"mlflow/**/artifacts/{artifacts.MANIFEST}"))
    )
    changed += sum(_rewrite_text(path, rewrite) for path in sorted(root.glob("mlflow/**/MLmodel")))
    if database is not None:  # last: it is what shows that the root was moved
        _rewrite_database(database, rewrite)
        changed += 1
    return Relocation(former=tuple(sorted(former)), files=changed)


def _former_roots(root: Path, manifests: list[Path], database: Path | None) -> frozenset[str]:
    stored = {uri for path in manifests for uri in _locations(_manifest(path))}
    if database is not None:
        with _connection(database) as connection:
            rows = connection.execute("SELECT value FROM model_version_tags WHERE key = ?", (_FOLDER_TAG,))
            stored |= {str(value) for (value,) in rows}
    found = {former_root(uri, str(root)) for uri in stored}
    return frozenset(one for one in found if one is not None)


def _rewritten(text: str, *, former: frozenset[str], root: str) -> str:
    """Replace former roots in a path, a ``file://`` URI or a text that quotes one."""
    for one in former:
        path = rf"(?<![\w./-])((?:file://)?){re.escape(one)}(?=/|[\"'\s]|$)"
        text = re.sub(path, lambda found: found[1] + root, text)
    return text


def _manifest(path: Path) -> Manifest:
    return Manifest.from_json(storage.read_bytes(str(path), MAX_MANIFEST_BYTES), str(path))


def _locations(manifest: Manifest) -> set[str]:
    """Return the URIs of committed folders in a manifest."""
    inputs = (source["uri"] for source in manifest.inputs.values())
    shards = (shard.folder for shard in manifest.shards)
    seen = (file["folder"] for file in manifest.info.get("seen", ()))
    return {uri for uri in (*inputs, *shards, *seen) if uri}


def _rewrite_manifest(path: Path, rewrite: Rewrite) -> bool:
    manifest = _manifest(path)
    info = dict(manifest.info)
    if "seen" in info:
        info["seen"] = [{**file, "folder": rewrite(file["folder"])} for file in info["seen"]]
    moved = dataclasses.replace(
        manifest,
        inputs={name: {**source, "uri": rewrite(source["uri"])} for name, source in manifest.inputs.items()},
        shards=tuple(_moved(shard, rewrite) for shard in manifest.shards),
        info=info,
    )
    if moved == manifest:
        return False
    _replace(path, moved.to_json().encode())
    return True


def _moved(shard: Shard, rewrite: Rewrite) -> Shard:
    return shard if shard.folder is None else dataclasses.replace(shard, folder=rewrite(shard.folder))


def _rewrite_marker(path: Path, rewrite: Rewrite) -> bool:
    shard = parse_shard(storage.read_bytes(str(path), MAX_MARKER_BYTES), path.stem)
    moved = _moved(shard, rewrite)
    if moved == shard:
        return False
    _replace(path, marker_json(moved).encode())
    return True


def _rewrite_text(path: Path, rewrite: Rewrite) -> bool:
    text = path.read_text(encoding="utf-8")
    if (moved := rewrite(text)) == text:
        return False
    _replace(path, moved.encode())
    return True


def _replace(path: Path, data: bytes) -> None:
    """Replace a file, with a modification time one microsecond after its former one.

    Garbage collection orders its deletions by time, and a process that has read a manifest notices the change by it.
    """
    before = path.stat()
    with storage_errors(str(path)), atomic_write(path) as stream:
        stream.write(data)
        stream.flush()
        os.utime(stream.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns + 1_000))


def _rewrite_database(database: Path, rewrite: Rewrite) -> None:
    """Rewrite every text of the registry in one transaction."""
    with _connection(database) as connection:
        connection.create_function("rewritten", 1, rewrite, deterministic=True)
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name != ?",
            ("alembic_version",),
        ).fetchall()
        with connection:
            for (table,) in tables:
                for _, column, *_ in connection.execute(f'PRAGMA table_info("{table}")').fetchall():
                    is_changed = f'typeof("{column}") = \'text\' AND rewritten("{column}") != "{column}"'
                    connection.execute(
                        f'UPDATE "{table}" SET "{column}" = rewritten("{column}") WHERE {is_changed}'  # noqa: S608
                    )


@contextlib.contextmanager
def _connection(database: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=20)) as opened:
        yield opened
