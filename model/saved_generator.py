"""Saved generators: where one lies, what tells its weights from others, and whether these are all there."""

import hashlib
from pathlib import Path
from typing import Any

from safetensors import safe_open

from model.errors import ModelError

EMBEDDED = "sticker-generator"
"""The generator that ships with this package, and the one that everything takes unless told."""
DISCRETE = "sticker-generator-discrete"
"""The discrete one, which ships too; any other name is a folder."""
SHIPPED = (EMBEDDED, DISCRETE)

_PRETRAINED = Path(__file__).parent / "pretrained"


def pretrained_folder(name: str) -> Path:
    """The folder of a saved pipeline: of one that ships with this package, or ``name`` itself."""
    return _PRETRAINED / name / "pipeline" if name in SHIPPED else Path(name)


def weights_digest(name: str) -> str:
    """Hex sha256 over the weight files of a saved pipeline. Raises ``ModelError`` when there are none."""
    digest = hashlib.sha256()
    files = sorted(pretrained_folder(name).rglob("*.safetensors"))
    if not files:
        others = " or ".join(SHIPPED)
        raise ModelError(f"{name} holds no weights (*.safetensors); name a folder of save_pretrained's, or {others}")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def contents_digest(name: str) -> str:
    """Hex sha256 over the weights and the settings (``*.json``) of a saved pipeline or part of one: all it does.

    Raises ``ModelError`` when there are no weights.
    """
    folder, digest = pretrained_folder(name), hashlib.sha256(weights_digest(name).encode())
    for file in sorted(folder.rglob("*.json")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def check_weights(folder: Path, module: Any) -> None:
    """Raise ``ModelError`` unless the safetensors in ``folder`` are all of ``module``'s weights, and these are finite.

    diffusers leaves what is missing as memory was, drops the rest, and warns.
    """
    held: dict[str, None] = {}
    for file in folder.glob("diffusion_pytorch_model*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            held |= dict.fromkeys(weights.keys())
    module._fix_state_dict_keys_on_load(held)  # old autoencoders name their attention otherwise
    wanted = module.state_dict().keys()
    missing, unexpected = len(wanted - held.keys()), len(held.keys() - wanted)
    if held and (missing or unexpected):
        raise ModelError(
            f"{folder.name}: of the {len(wanted)} weights that its config.json asks for {missing} are missing, and "
            f"{unexpected} others are there; copy or download both files again, they are of two networks"
        )
    if not all(weights.isfinite().all() for weights in module.state_dict().values()):
        raise ModelError(f"{folder.name}: its weights are not all finite numbers")
