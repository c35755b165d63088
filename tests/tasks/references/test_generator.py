"""The folder of a generator's pipeline."""

from pathlib import Path

from support.object_stores import Bucket

from infra import artifacts, storage
from tasks.references.generator import generator_folder
from tasks.references.types import Generator


def test_generator_folder_replaces_damaged_file_in_cache(moto_bucket: Bucket, tmp_path: Path) -> None:
    stage = artifacts.ArtifactBuilder(f"{moto_bucket.uri}/d", Generator.kind, inputs={}, config={})
    with storage.scratch() as scratch:
        (scratch / "pipeline").mkdir()
        (scratch / "pipeline/weights").write_bytes(b"committed bytes")
        shard = artifacts.commit_shard(stage.uri, "pipeline", scratch, rows=0, info={})
    generator = Generator.of(stage.commit([shard], info={}), stage.uri)
    weights = generator_folder(generator, tmp_path) / "weights"
    weights.write_bytes(b"damaged bytes")
    assert generator_folder(generator, tmp_path) / "weights" == weights
    assert weights.read_bytes() == b"committed bytes"
    assert [path.name for path in weights.parent.parent.iterdir()] == ["pipeline"]
