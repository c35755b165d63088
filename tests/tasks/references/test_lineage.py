"""Every function that opens the inputs of a version raises if they have changed since."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny_training

from flows.train_generator import TrainGeneratorConfig, train_generator
from infra import artifacts
from infra.errors import InputError
from tasks.references.images import fetch_images
from tasks.references.types import DatabaseVersion
from tasks.register import _stored_bytes
from tasks.train.data import database_rows
from tasks.train.stored_images import DecodedDatabase


def trained(database: DatabaseVersion, cache: Path) -> Any:
    return train_generator.fn(TrainGeneratorConfig(domain="made", database=database.uri, root=str(cache), trust=True))


READERS: list[Callable[[DatabaseVersion, Path], Any]] = [
    trained,
    database_rows,
    lambda database, cache: DecodedDatabase(database, cache, side=16),
    lambda database, cache: fetch_images(database, [0], cache),
    lambda database, cache: _stored_bytes(database),
]


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> DatabaseVersion:
    """A version whose embeddings were deleted and rebuilt with another encoder."""
    inputs = tiny_training.stored_inputs(tmp_path_factory.mktemp("stored"))
    manifest = inputs.embeddings.manifest()
    stage = artifacts.ArtifactBuilder(
        str(Path(inputs.embeddings.uri).parents[1]), manifest.kind, inputs=manifest.inputs, config=manifest.config
    )
    assert stage.uri == inputs.embeddings.uri
    encoder = {**manifest.identity["encoder"], "weights_digest": "v" * 64}
    stage.commit(manifest.shards, identity={"encoder": encoder}, info={})
    return inputs.database


@pytest.mark.parametrize("read", READERS, ids=["train", "rows", "pixels", "images", "bytes"])
def test_reader_of_version_with_rebuilt_embeddings_raises_input_error(
    read: Callable[[DatabaseVersion, Path], Any], remade: DatabaseVersion, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"embeddings/\w+ has changed since .*database/\w+ was made from it; rebuild"):
        read(remade, tmp_path)
