"""Training data: the shards of a training set, and the references that it is loaded from.

Legend: ``M`` database rows, ``D`` embedding width.
"""

from pathlib import Path

from infra import artifacts
from model.retrieval.concatenated_rows import ConcatenatedRows
from model.retrieval.stored_rows import StoredRows
from model.training.data import TrainingSet
from model.training.neighbour_rows import RowArray
from tasks.references.lineage import embeddings_of
from tasks.references.types import DatabaseVersion, encoder_of
from tasks.train.inputs import TrainingInputs
from tasks.train.shard_source import ImageProcessing, ShardSource
from tasks.train.stored_images import DecodedDatabase, StoredShard


def load_training_set(
    inputs: TrainingInputs,
    processing: ImageProcessing,
    cache: Path,
    *,
    window_bytes: int,
    rank: int = 0,
    world: int = 1,
) -> TrainingSet:
    """Return the training set of worker ``rank`` of ``world`` workers.

    Rows are shuffled in windows of about ``window_bytes`` over all workers. Images are matched to embedding rows by
    the key in the metadata.
    """
    sources = training_shards(inputs, processing, cache)
    database = database_rows(inputs.database, cache)
    pool = inputs.neighbours.manifest().config["k"]
    row_bytes = processing.row_bytes() + 2 * sources[0].dimension + 8 * pool
    return TrainingSet(
        sources,
        database,
        window_rows=max(1, window_bytes // row_bytes),
        device=processing.device,
        rank=rank,
        world=world,
        database_images=database_images(inputs.database, processing, cache),
    )


def training_shards(inputs: TrainingInputs, processing: ImageProcessing, cache: Path) -> list[ShardSource]:
    """Return one source per shard of ``inputs``. This reads manifests only."""
    embeddings = inputs.embeddings.manifest()
    image_shards = {shard.name: shard for shard in inputs.images.manifest().shards}
    lists = {shard.name: shard for shard in inputs.neighbours.manifest().shards}
    decoded_database = None
    if processing.editing:
        decoded_database = DecodedDatabase(inputs.database, cache, side=processing.side, threads=processing.threads)
    dimension = int(embeddings.identity["encoder"]["dimension"])
    sources = []
    for shard in embeddings.shards:
        stored = StoredShard(
            images_uri=inputs.images.uri, images=image_shards[shard.name],
            embeddings_uri=inputs.embeddings.uri, embeddings=shard, cache=cache, threads=processing.threads,
        )  # fmt: skip
        found = (inputs.neighbours.uri, lists[shard.name].files[0])
        sources.append(ShardSource(stored, found, processing, decoded_database, shard.rows, dimension))
    return sources


def database_images(database: DatabaseVersion, processing: ImageProcessing, cache: Path) -> RowArray | None:
    """Return the images of the database (M, S, S, 3), memory-mapped, or None if the network takes none."""
    if not processing.neighbour_images:
        return None
    return DecodedDatabase(database, cache, side=processing.side, threads=processing.threads).rows()


def database_rows(database: DatabaseVersion, cache: Path) -> RowArray:
    """Return the database embeddings (M, D) float16 that neighbour ids refer to, memory-mapped on access."""
    embeddings = embeddings_of(database)
    manifest = embeddings.manifest()
    dimension = encoder_of(manifest).dimension
    files = [artifacts.fetch_shard(embeddings.uri, shard, ".npy", cache) for shard in manifest.shards]
    return ConcatenatedRows(
        [StoredRows(file, dimension, shard.rows) for file, shard in zip(files, manifest.shards, strict=True)]
    )
