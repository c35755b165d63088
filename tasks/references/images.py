"""Stored images behind rows of a database."""

import functools
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from infra import artifacts
from infra.download.images import to_rgb
from infra.errors import IntegrityError, KNNDiffusionError
from infra.formats import webdataset
from model.retrieval.database import Database
from tasks.references.database import Metadata
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.types import DatabaseVersion


def with_stored_images(database: Database, version: DatabaseVersion, cache: Path) -> Database:
    """Return ``database``, which was opened from ``version``, with the images of its rows."""
    images = functools.partial(fetch_images, version, cache=cache)
    return database.with_images(images, errors=(KNNDiffusionError,))


def fetch_images(version: DatabaseVersion, ids: Sequence[int], cache: Path) -> list[Image.Image]:
    """Return the RGB images of rows, in the order of ``ids``, which may repeat. Reads only the image shards needed.

    Raises:
        InputError: the embeddings or images have changed since the version was made from them.
        IntegrityError: a tar differs from the committed one, or lacks an image that was embedded.
    """
    embeddings = embeddings_of(version)
    images = images_of(embeddings)
    lookup = Metadata(embeddings.uri, embeddings.manifest(), cache)
    # A key is unique only within a shard: in a union of databases, images of several databases share it.
    rows = sorted(set(ids))
    places = {row: (lookup.shard(row), record["key"]) for row, record in zip(rows, lookup(rows), strict=True)}
    wanted = set(places.values())
    found: dict[tuple[str, str], Image.Image] = {}
    for shard in images.manifest().shards:
        if not any(name == shard.name for name, _ in wanted):
            continue
        for key, encoded in webdataset.iter_images(artifacts.fetch_shard(images.uri, shard, ".tar", cache)):
            if (shard.name, key) in wanted:
                with Image.open(io.BytesIO(encoded)) as image:
                    found[shard.name, key] = to_rgb(image)
    if absent := sorted(wanted - found.keys()):
        raise IntegrityError(
            f"{images.uri} lacks {len(absent)} embedded images, the first is {absent[0][1]} of shard {absent[0][0]}; "
            "embed the images again"
        )
    return [found[places[row]] for row in ids]
