"""Random access to the stored images of a database.

:func:`tasks.references.images.fetch_images` reads whole tars, which suits a batch job. The service reads a few images
many times, so it keeps the offsets of a tar and its open file, which remains readable after the file was deleted.
"""

import io
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

from PIL import Image

from infra import artifacts
from infra.download.images import to_rgb
from infra.errors import IntegrityError
from infra.formats.webdataset import IMAGE_SUFFIXES
from tasks.references.types import ImageShards

_OPEN_TARS = 128


class StoredImages:
    """The images of image shards, by shard and key. Thread-safe."""

    def __init__(self, images: ImageShards, cache: Path) -> None:
        """Read the list of shards; tars are opened when one of their images is needed."""
        shards = {shard.name: shard for shard in images.manifest().shards}
        # Not a bound method: the reference cycle would keep the tars of a replaced version open.
        self._tar: Callable[[str], _Tar] = lru_cache(_OPEN_TARS)(partial(_open, images.uri, shards, cache))

    def __call__(self, places: Sequence[tuple[str, str]]) -> list[Image.Image]:
        """Return the RGB images at ``places``, pairs of shard and key, which may repeat.

        Raises:
            IntegrityError: A tar is missing, differs from the committed one, or lacks a readable image.
        """
        decoded = {place: self._decode(*place) for place in dict.fromkeys(places)}
        return [decoded[place] for place in places]

    def _decode(self, shard: str, key: str) -> Image.Image:
        data = self._tar(shard).read(key)
        try:
            with Image.open(io.BytesIO(data)) as image:
                return to_rgb(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise IntegrityError(f"image {key} of shard {shard} is damaged ({error}); restore the shard") from error


class _Tar:
    """An open tar with the offsets of its images."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("rb")
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                self._places = {
                    PurePosixPath(member.name).stem: (member.offset_data, member.size)
                    for member in archive
                    if member.isfile() and PurePosixPath(member.name).suffix in IMAGE_SUFFIXES
                }
        except tarfile.TarError as error:
            raise IntegrityError(f"{path} is not a complete tar ({error}); restore it") from error

    def read(self, key: str) -> bytes:
        if key not in self._places:
            raise IntegrityError(f"{self._name} lacks the embedded image {key}; embed the images again")
        offset, size = self._places[key]
        return os.pread(self._file.fileno(), size, offset)


def _open(uri: str, shards: Mapping[str, artifacts.Shard], cache: Path, shard: str) -> _Tar:
    return _Tar(artifacts.fetch_shard(uri, shards[shard], ".tar", cache))
