"""Local copies of stored generators."""

import os
import tempfile
from pathlib import Path

from infra import artifacts, storage
from tasks.references.types import Generator

PIPELINE = "pipeline"
"""Subfolder of a generator that ``KNNDiffusionPipeline.from_pretrained`` loads."""


def generator_folder(generator: Generator, cache: Path) -> Path:
    """Return a local copy of a generator's pipeline folder, with every file verified."""
    manifest = generator.manifest()
    paths = [artifacts.fetch_file(generator.uri, file, cache) for file in manifest.files]
    if storage.is_local(generator.uri):
        return storage.local_path(storage.join(generator.uri, PIPELINE))
    folder = cache / "generators" / manifest.digest / PIPELINE
    for file, path in zip(manifest.files, paths, strict=True):
        link = folder.parent / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not (link.exists() and link.samefile(path)):  # missing, or a link to a damaged file that was fetched again
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                os.link(path, Path(temporary, link.name))
                Path(temporary, link.name).replace(link)
    return folder
