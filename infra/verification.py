"""Verification, by size or by digest, that the files of a manifest are still stored."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from infra import storage
from infra.errors import IntegrityError, NotFoundError
from infra.manifest import File, Manifest

_FILES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """File that a manifest lists, the folder that stores it and, if any, its shard."""

    folder: str
    file: File
    shard: str | None = None

    @property
    def uri(self) -> str:
        """URI of the file."""
        return storage.join(self.folder, self.file.name)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """Listed file that differs from what was committed, and the reason."""

    listed: Listed
    reason: str


def listed_files(folder_uri: str, manifest: Manifest) -> Iterator[Listed]:
    """Yield every file of the manifest's shards, including files in the folders of earlier versions."""
    for shard in manifest.shards:
        for file in shard.files:
            yield Listed(folder=shard.folder or folder_uri, file=file, shard=shard.name)


def find_damage(files: Iterable[Listed], *, digests: bool = False) -> list[Damage]:
    """Find files that are missing or have another size or, with ``digests``, other bytes.

    Sizes cost one listing per folder in S3 and one stat per file elsewhere; ``digests`` reads every byte.
    """
    by_folder: defaultdict[str, list[Listed]] = defaultdict(list)
    for listed in files:
        by_folder[listed.folder].append(listed)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        sizes: dict[str, int | None] = {}
        for found in pool.map(_listing, [folder for folder in by_folder if folder.startswith("s3://")]):
            sizes |= found
        ordered = [listed for several in by_folder.values() for listed in several]
        single = [listed.uri for listed in ordered if not listed.folder.startswith("s3://")]
        sizes |= dict(zip(single, pool.map(_size, single), strict=True))
        reasons = list(pool.map(lambda listed: _reason(listed, sizes, digests=digests), ordered))
    return [Damage(listed=listed, reason=reason) for listed, reason in zip(ordered, reasons, strict=True) if reason]


def require_undamaged(damage: list[Damage]) -> None:
    """Raise ``IntegrityError`` if there is damage. The message names the first file and the number of others."""
    if damage:
        first, more = damage[0], len(damage) - 1
        others = f" (and {more} more)" if more else ""
        raise IntegrityError(
            f"{first.listed.uri} {first.reason}{others}; restore it, or delete {first.listed.folder} and run again"
        )


def _listing(folder: str) -> dict[str, int | None]:
    return {stored.uri: stored.bytes for stored in storage.walk(folder)}


def _size(uri: str) -> int | None:
    try:
        return storage.local_path(uri).stat().st_size if storage.is_local(uri) else storage.size(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except NotFoundError:
        if storage.exists(uri):  # exists but cannot be read: the original message says more
            raise
        return None


def _reason(listed: Listed, sizes: Mapping[str, int | None], *, digests: bool) -> str:
    size = sizes.get(listed.uri)
    if size is None:
        return "is missing though it was committed"
    if size != listed.file.bytes:
        return f"has {size} bytes, {listed.file.bytes} were committed"
    if digests and storage.sha256(listed.uri) != listed.file.sha256:
        return f"differs from its committed digest {listed.file.sha256[:12]}…"
    return ""
