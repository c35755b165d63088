"""Saved generators: locate them, digest their weights, and check that all weights are present and finite."""

import hashlib
from pathlib import Path
from typing import Any

from safetensors import safe_open

from model.errors import ModelError

BUNDLED_GENERATOR = "sticker-generator"
"""Name of the bundled continuous generator; the default everywhere."""
DISCRETE = "sticker-generator-discrete"
"""Name of the bundled discrete generator."""
BUNDLED_GENERATORS = (BUNDLED_GENERATOR, DISCRETE)
"""Names of all bundled generators; any other name is a folder."""

_PRETRAINED = Path(__file__).parent / "pretrained"


def pretrained_folder(name: str) -> Path:
    """Return the folder of a saved pipeline: that of a bundled generator, or ``name`` itself."""
    return _PRETRAINED / name / "pipeline" if name in BUNDLED_GENERATORS else Path(name)


def weights_digest(name: str) -> str:
    """Return the hex sha256 of a saved pipeline's weight files. Raises ``ModelError`` if it has none."""
    digest = hashlib.sha256()
    files = sorted(pretrained_folder(name).rglob("*.safetensors"))
    if not files:
        bundled = " or ".join(BUNDLED_GENERATORS)
        raise ModelError(
            f"no weights (*.safetensors) found: {name}; name a folder written by save_pretrained, or {bundled}"
        )
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def contents_digest(name: str) -> str:
    """Return the hex sha256 of the weights and configs (``*.json``) of a saved pipeline or one of its parts.

    Raises ``ModelError`` if it has no weights.
    """
    folder, digest = pretrained_folder(name), hashlib.sha256(weights_digest(name).encode())
    for file in sorted(folder.rglob("*.json")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def check_weights(folder: Path, module: Any) -> None:
    """Raise ``ModelError`` unless the safetensors in ``folder`` match the weights of ``module`` and are finite.

    diffusers only warns: it leaves missing weights uninitialised and ignores unexpected ones.
    """
    stored: dict[str, None] = {}
    for file in folder.glob("diffusion_pytorch_model*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            stored |= dict.fromkeys(weights.keys())
    module._fix_state_dict_keys_on_load(stored)  # old autoencoders use other names for their attention layers
    expected = module.state_dict().keys()
    missing, unexpected = len(expected - stored.keys()), len(stored.keys() - expected)
    if stored and (missing or unexpected):
        raise ModelError(
            f"{folder.name}: weights do not match config.json: {missing} of {len(expected)} are missing, "
            f"{unexpected} are unexpected; copy or download both files again"
        )
    if not all(weights.isfinite().all() for weights in module.state_dict().values()):
        raise ModelError(f"{folder.name}: some weights are NaN or infinite; download or train the generator again")
