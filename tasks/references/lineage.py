"""What an artifact was made from, opened again by what its manifest says."""

from infra.errors import InputError
from tasks.references.types import DatabaseVersion, EmbeddingShards, ImageShards, Made, Reference, Takedown


def embeddings_of(version: DatabaseVersion) -> EmbeddingShards:
    """The embeddings that a version indexes. Raises ``InputError`` when they are no longer the same."""
    return _input_of(version, "embeddings", EmbeddingShards)


def images_of(embeddings: EmbeddingShards) -> ImageShards:
    """The image shards that were embedded. Raises ``InputError`` when they are no longer the same."""
    return _input_of(embeddings, "images", ImageShards)


def takedown_of(version: DatabaseVersion) -> Takedown | None:
    """What a version hides on somebody's word, if anything. Raises ``InputError`` when it is no longer the same."""
    return _input_of(version, "takedown", Takedown) if "takedown" in version.manifest().inputs else None


def _input_of(made: Reference, name: str, kind: type[Made]) -> Made:
    source = made.manifest().inputs[name]
    made.require_inside(source["uri"])
    found = kind.open(source["uri"], confined_to=made.confined_to)
    if found.digest != source["digest"]:
        raise InputError(f"{found.uri} is not what {made.uri} was made from; make it again")
    return found
