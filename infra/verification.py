"""Check that the files a manifest lists are still stored: by size, or by digest."""

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
    """A file that a manifest lists: the folder it is stored in, and its shard, if it belongs to one."""

    folder: str
    file: File
    shard: str | None = None

    @property
    def uri(self) -> str:
        """Where it is stored."""
        return storage.join(self.folder, self.file.name)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """A listed file that is not as it was committed, and how it differs."""

    listed: Listed
    reason: str


def listed_files(folder_uri: str, manifest: Manifest) -> Iterator[Listed]:
    """Every file of the shards of the manifest at ``folder_uri``, wherever an earlier version keeps it."""
    for shard in manifest.shards:
        for file in shard.files:
            yield Listed(folder=shard.folder or folder_uri, file=file, shard=shard.name)


def find_damage(files: Iterable[Listed], *, digests: bool = False) -> list[Damage]:
    """Find files that are missing or have another size, and with ``digests`` those whose bytes differ.

    Sizes cost a listing of each folder in S3 and a look at each file elsewhere; ``digests`` reads every byte.
    """
    by_folder: defaultdict[str, list[Listed]] = defaultdict(list)
    for listed in files:
        by_folder[listed.folder].append(listed)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        sizes: dict[str, int | None] = {}
        for found in pool.map(_listing, [folder for folder in by_folder if folder.startswith("s3://")]):
            sizes |= found
        wanted = [listed for several in by_folder.values() for listed in several]
        single = [listed.uri for listed in wanted if not listed.folder.startswith("s3://")]
        sizes |= dict(zip(single, pool.map(_size, single), strict=True))
        reasons = list(pool.map(lambda listed: _reason(listed, sizes, digests=digests), wanted))
    return [Damage(listed=listed, reason=reason) for listed, reason in zip(wanted, reasons, strict=True) if reason]


def require_undamaged(damage: list[Damage]) -> None:
    """Raise ``IntegrityError`` naming the first damaged file, how many more there are, and the fix."""
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
        if storage.exists(uri):  # there, but not readable: that message says more
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
