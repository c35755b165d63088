"""Adopt stage: commit a saved pipeline, e.g. a bundled one, as a generator without training."""

import shutil
from pathlib import Path

from infra import artifacts, storage
from infra.errors import InputError
from model.saved_generator import BUNDLED_GENERATORS, pretrained_folder
from tasks.references.domain_folder import DomainFolder
from tasks.references.generator import PIPELINE
from tasks.references.types import Generator, StageResult, config_to_dict
from tasks.stage import run_stage, stage_task


@stage_task(name="adopt")
def adopt(name: str, folder: DomainFolder, *, confined_to: str | None = None) -> StageResult[Generator]:
    """Copy the pipeline ``name`` (a local folder, or one that ships with this package) to ``<folder>/generator/<key>``.

    The key depends on the contents of the pipeline's folder, so a change of weights or defaults gives a new generator.
    ``rows`` is 0, because the size of the training set is unknown.

    Args:
        name: Local folder of a saved pipeline, or name of a bundled one.
        folder: Folder of the domain.
        confined_to: None for a trusted pipeline; see :class:`tasks.references.types.Reference`. Default: None.

    Raises:
        InputError: There is no saved pipeline of that name, or it is not trusted and names a custom encoder.
        ModelError: The saved pipeline cannot be loaded.
    """
    saved = pretrained_folder(name)
    if not (saved / "model_index.json").is_file():
        raise InputError(
            f"not a saved pipeline: {name}; give {' or '.join(BUNDLED_GENERATORS)}, "
            "or a folder written by save_pretrained"
        )
    uri = name if name in BUNDLED_GENERATORS else storage.absolute(name)
    inputs = {PIPELINE: {"uri": uri, "digest": _digest(saved)}}
    stage = artifacts.ArtifactBuilder(folder.uri, Generator.kind, inputs=inputs, config={})

    def make() -> artifacts.Manifest:
        from model.pipeline import KNNDiffusionPipeline  # imports torch and diffusers, which takes seconds

        pipeline = KNNDiffusionPipeline.open(saved)
        Generator(uri=uri, rows=0, digest="", confined_to=confined_to).require_known(pipeline.identity)
        info = {"adopted": name, "parameters": sum(weights.numel() for weights in pipeline.transformer.parameters())}
        with storage.scratch() as scratch:
            shutil.copytree(saved, scratch / PIPELINE)
            done = artifacts.commit_shard(stage.uri, PIPELINE, scratch, rows=0, info=info)
        return stage.commit([done], identity={"encoder": config_to_dict(pipeline.identity)}, info=info)

    return run_stage(stage, Generator, make, note=_note)


def _digest(folder: Path) -> str:
    """Return the hex sha256 over the names and contents of all files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return artifacts.digest_of({path.relative_to(folder).as_posix(): storage.sha256(str(path)) for path in files})


def _note(manifest: artifacts.Manifest) -> str:
    return f"{manifest.info['adopted']} adopted, {manifest.info['parameters'] / 1e6:.1f} M parameters"
