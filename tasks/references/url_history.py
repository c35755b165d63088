"""URL history: the URLs and image bytes that a domain has already processed, without reading its shards.

Each version stores ``seen.npz`` next to the shards that it adds. The file holds sorted 64-bit hashes of the URLs with
a final outcome, of the URLs that failed, and of the image bytes: 16 bytes a row. URLs are hashed in their normal form;
releases before 0.2 hashed them as listed, so both forms are looked up. A version lists its own file and
those of earlier versions (``info["seen"]``). A new file merges the preceding files that are not much larger, so a
database built over a thousand nights has about ten files. Looking up 10,000 URLs among a million rows takes 0.03 s,
most of it for the file's digest. Reading the URL column of the shards would take seconds.

Among 10⁹ URLs, two share a hash with probability 3 %. A new URL matches an old hash once in 10¹⁰ and is then skipped.
"""

import dataclasses
import hashlib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra import artifacts, storage, validation
from infra.errors import IntegrityError
from infra.formats import tables
from infra.formats.urls import normal_urls
from infra.formats.webdataset import DUPLICATE, TAKEN_DOWN
from tasks.references.types import ImageShards

Hashed = NDArray[np.uint64]

FINAL_OUTCOMES = ("success", DUPLICATE, TAKEN_DOWN)
"""Outcomes after which a URL is not requested again, even when failed URLs are retried."""
_FILE = "seen.npz"
_MERGE_RATIO = 2  # an older file with up to this many times the rows of the new one is merged into it


@dataclasses.dataclass(frozen=True, slots=True)
class Hashes:
    """Sorted unique hashes of URLs with a final outcome, of URLs that failed, and of image bytes."""

    answered: Hashed
    failed: Hashed
    content: Hashed

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the union of several."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(_union([getattr(part, name) for part in parts]) for name in names))

    def __len__(self) -> int:
        return len(self.answered) + len(self.failed)


class UrlHistory:
    """URLs and image bytes that a version of image shards has processed."""

    def __init__(self, parts: list[Hashes], files: list[dict[str, Any]]) -> None:
        """Create a history from ``parts`` in the order of ``files``; a part without a file comes last."""
        self._parts, self._files = parts, files

    @classmethod
    def of(cls, images: ImageShards, cache: Path) -> Self:
        """Open the files that the version lists; if it lists none, read the columns of its shards."""
        manifest = images.manifest()
        files = manifest.info.get("seen")
        if files is None:
            return cls([hashes_of(images.uri, manifest.shards, cache)], [])
        return cls([_read(file, cache) for file in files], list(files))

    def requested(self, urls: Iterable[str], *, failed_too: bool) -> NDArray[np.bool_]:
        """Return an (n,) mask of the URLs that were requested before. Failed URLs count only with ``failed_too``."""
        listed = pa.array(urls, pa.string())
        normal = normal_urls(listed)
        lists = [part.answered for part in self._parts] + [part.failed for part in self._parts if failed_too]
        found = _is_in_any(hash_texts(normal.to_pylist()), lists)
        return found if normal.equals(listed) else found | _is_in_any(hash_texts(listed.to_pylist()), lists)

    def contains(self, digests: Iterable[str]) -> NDArray[np.bool_]:
        """Return an (n,) mask of the images, given as hex sha256 of their bytes, that the version contains."""
        return _is_in_any(hash_digests(digests), [part.content for part in self._parts])

    def stored_files(self, folder_uri: str) -> list[dict[str, Any]]:
        """Return the list of files for a manifest's ``info``; if there are none, write one to ``folder_uri`` first."""
        return self._files or [write_seen(folder_uri, Hashes.joined(self._parts))]

    def extend(self, folder_uri: str, added: Hashes) -> list[dict[str, Any]]:
        """Write ``added`` next to the shards at ``folder_uri``; return the list of files for the version's ``info``."""
        parts, files = list(self._parts), list(self._files)
        own = [added, *parts[len(files) :]]
        while files and files[-1]["rows"] <= _MERGE_RATIO * sum(len(part) for part in own):
            files.pop()
            own.append(parts[len(files)])
        return [*files, write_seen(folder_uri, Hashes.joined(own))]


def write_seen(folder_uri: str, hashes: Hashes) -> dict[str, Any]:
    """Store the file in ``folder_uri``; return its entry for a manifest's ``info["seen"]``."""
    with storage.scratch() as folder:
        path = folder / _FILE
        np.savez(path, **dataclasses.asdict(hashes))
        storage.put(path, storage.join(folder_uri, _FILE))
        file = artifacts.File(name=_FILE, sha256=storage.sha256(str(path)), bytes=path.stat().st_size)
    return {"folder": folder_uri, "file": dataclasses.asdict(file), "rows": len(hashes)}


def hashes_of(folder_uri: str, of: Iterable[artifacts.Shard], cache: Path) -> Hashes:
    """Compute the hashes of shards of the version at ``folder_uri`` from their tables."""
    parts = [_hashes(artifacts.fetch_shard(folder_uri, shard, ".parquet", cache)) for shard in of]
    return Hashes.joined([Hashes(*(np.empty(0, np.uint64) for _ in range(3))), *parts])


def hash_texts(texts: Iterable[str]) -> Hashed:
    """Return (n,) uint64 hashes of texts; None counts as the empty text."""
    digests = b"".join(hashlib.blake2b((text or "").encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def hash_urls(urls: pa.Array | pa.ChunkedArray) -> Hashed:
    """Return (n,) uint64 hashes of the normal forms of URLs."""
    return hash_texts(normal_urls(urls).to_pylist())


def hash_digests(digests: Iterable[str]) -> Hashed:
    """Return the first 64 bits of hex digests as (n,) uint64."""
    return np.array([int(digest[:16], 16) for digest in digests], dtype=np.uint64)


def _hashes(parquet: Path) -> Hashes:
    table = tables.read_table(parquet, ["url", "sha256", "error_class"])
    answered = pc.is_in(table["error_class"], pa.array(FINAL_OUTCOMES))
    content = table["sha256"].filter(pc.and_(answered, pc.is_valid(table["sha256"])))
    return Hashes(
        answered=hash_urls(table["url"].filter(answered)),
        failed=hash_urls(table["url"].filter(pc.invert(answered))),
        content=hash_digests(content.to_pylist()),
    )


def history_files(manifest: artifacts.Manifest) -> list[tuple[str, artifacts.File]]:
    """Return folder and file of each entry of ``info["seen"]``. Raises ``IntegrityError`` for an invalid entry."""
    return [_located(entry) for entry in manifest.info.get("seen") or ()]


def _located(entry: Any) -> tuple[str, artifacts.File]:
    try:
        return validation.uri(entry["folder"]), artifacts.File(**entry["file"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"the URL history in a manifest is damaged ({error}); download the images again"
        ) from error


def _read(entry: dict[str, Any], cache: Path) -> Hashes:
    path = artifacts.fetch_file(*_located(entry), cache)
    names = [field.name for field in dataclasses.fields(Hashes)]
    try:
        with np.load(path) as stored:
            hashes = [stored[name] for name in names]
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} is not a readable URL history ({error}); download the images again") from error
    if any(array.dtype != np.uint64 or array.ndim != 1 for array in hashes):
        raise IntegrityError(f"{path} is not a URL history of 64-bit hashes; download the images again")
    return Hashes(*hashes)


def _union(arrays: list[Hashed]) -> Hashed:
    return np.unique(np.concatenate(arrays))


def _is_in_any(hashed: Hashed, lists: list[Hashed]) -> NDArray[np.bool_]:
    """Return an (n,) mask of the ``hashed`` values that occur in any of the sorted ``lists``."""
    found = np.zeros(len(hashed), dtype=np.bool_)
    for values in lists:
        if len(values):
            places = np.minimum(np.searchsorted(values, hashed), len(values) - 1)
            found |= values[places] == hashed
    return found
