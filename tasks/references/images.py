"""Fetch: the stored pictures behind rows of a database."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from infra import artifacts
from infra.download.images import to_rgb
from infra.errors import IntegrityError
from infra.formats import tables
from tasks.references.database import Metadata
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.types import DatabaseVersion


def fetch_images(version: DatabaseVersion, ids: Sequence[int], cache: Path) -> list[Image.Image]:
    """The RGB pictures of rows, in their order; a row may come twice. Reads the image shards that hold them.

    Raises:
        InputError: the version's embeddings or images are no longer what it was made from.
        IntegrityError: a tar differs from what was committed, or lacks a picture that was embedded.
    """
    embeddings = embeddings_of(version)
    images = images_of(embeddings)
    lookup = Metadata(embeddings.uri, embeddings.manifest(), cache)
    # By shard too: in a union of databases the same key is borne by a picture of each.
    rows = sorted(set(ids))
    places = {row: (lookup.shard(row), known["key"]) for row, known in zip(rows, lookup(rows), strict=True)}
    wanted = set(places.values())
    found: dict[tuple[str, str], Image.Image] = {}
    for shard in images.manifest().shards:
        if not any(name == shard.name for name, _ in wanted):
            continue
        for key, encoded in tables.iter_images(artifacts.fetch_shard(images.uri, shard, ".tar", cache)):
            if (shard.name, key) in wanted:
                with Image.open(io.BytesIO(encoded)) as image:
                    found[shard.name, key] = to_rgb(image)
    if absent := sorted(wanted - found.keys()):
        raise IntegrityError(
            f"{images.uri} lacks {len(absent)} embedded pictures, {absent[0][1]} of shard {absent[0][0]} first; "
            "embed it again"
        )
    return [found[places[row]] for row in ids]
