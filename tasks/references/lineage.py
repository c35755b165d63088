"""Inputs of an artifact, opened from the URIs in its manifest."""

from infra import storage
from infra.errors import InputError
from infra.relocation import require_in_place
from tasks.references.types import DatabaseVersion, EmbeddingShards, ImageShards, Made, Reference, Takedown


def embeddings_of(version: DatabaseVersion) -> EmbeddingShards:
    """Return the embeddings that a version indexes. Raises ``InputError`` if they have changed since."""
    return _input_of(version, "embeddings", EmbeddingShards)


def images_of(embeddings: EmbeddingShards) -> ImageShards:
    """Return the image shards that were embedded. Raises ``InputError`` if they have changed since."""
    return _input_of(embeddings, "images", ImageShards)


def takedown_of(version: DatabaseVersion) -> Takedown | None:
    """Return the takedown that a version applies, or None. Raises ``InputError`` if it has changed since."""
    return _input_of(version, "takedown", Takedown) if "takedown" in version.manifest().inputs else None


def _input_of(output: Reference, name: str, kind: type[Made]) -> Made:
    source = output.manifest().inputs.get(name)
    if source is None:
        raise InputError(f"{output.uri} does not record its {name}; make it again from them")
    output.require_inside(source["uri"])
    require_in_place(source["uri"], storage.join(output.uri).rsplit("/", 3)[0])
    found = kind.open(source["uri"], confined_to=output.confined_to)
    if found.digest != source["digest"]:
        raise InputError(f"{found.uri} has changed since {output.uri} was made from it; rebuild the latter")
    return found
