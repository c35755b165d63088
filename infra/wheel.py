"""Wheel of this package, which is stored with registered versions: no index is asked for the package's name.

The wheel is made of the installed files, from a checkout as from another wheel. Equal files give equal bytes. Weights
are large, so only those that a version needs are included.
"""

import base64
import dataclasses
import hashlib
import importlib.metadata
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from infra import logs
from infra.storage.folders import make_folder

NAME = "knn-diffusion"
_PACKAGES = ("flows", "infra", "model", "tasks")
_WEIGHTS = ".safetensors"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_TAG = "Wheel-Version: 1.0\nGenerator: knn-diffusion\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """Requirement of a registered version on this package: its line, and the wheel with its digest if there is one."""

    requirement: str
    wheel: Path | None = None
    sha256: str | None = None


def package(cache: Path, weights: Collection[str] = ()) -> Package:
    """Return the requirement on this package, with a wheel in ``cache`` unless it cannot be made.

    Args:
        cache: Local folder for the wheel.
        weights: Folders of ``model/pretrained`` whose weights are included.
    """
    root = Path(__file__).parents[1]
    try:
        distribution = importlib.metadata.distribution(NAME)
        wheel = _write_wheel(distribution, root, cache / "wheels", frozenset(weights))
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        version = _version()
        logs.get("stage").warning(
            "%-11s the version is stored without the package (%s: %s); where it is served, install %s yourself",
            "register", type(error).__name__, error, version,
        )  # fmt: skip
        return Package(requirement=version)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    # MLflow runs pip in the folder of the model. pip checks the digest of the fragment, and of no other requirement.
    return Package(requirement=f"file:artifacts/{wheel.name}#sha256={digest}", wheel=wheel, sha256=digest)


def _version() -> str:
    try:
        return f"{NAME}=={importlib.metadata.version(NAME)}"
    except importlib.metadata.PackageNotFoundError:
        return NAME


def _write_wheel(
    distribution: importlib.metadata.Distribution, root: Path, folder: Path, weights: frozenset[str]
) -> Path:
    """Write the wheel below ``folder``, in a folder named by the digest of its content, and return its path."""
    version = distribution.version
    info = f"{NAME.replace('-', '_')}-{version}.dist-info"
    sources = dict(sorted(_sources(root, weights)))
    digests = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in sources.items()}
    written = {f"{info}/{name}": text.encode() for name, text in _metadata(distribution).items()}
    digests |= {name: hashlib.sha256(data).digest() for name, data in written.items()}
    record = "".join(f"{name},sha256={_base64(digest)},\n" for name, digest in digests.items())
    written[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    key = hashlib.sha256(record.encode()).hexdigest()[:16]
    wheel = folder / key / f"{NAME.replace('-', '_')}-{version}-py3-none-any.whl"
    if wheel.exists():
        return wheel
    make_folder(wheel.parent)
    partial = wheel.with_name(f"{wheel.name}.partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name in [*sources, *written]:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(_WEIGHTS) else zipfile.ZIP_DEFLATED
            archive.writestr(entry, written[name] if name in written else sources[name].read_bytes())
    partial.replace(wheel)
    return wheel


def _sources(root: Path, weights: frozenset[str]) -> Iterator[tuple[str, Path]]:
    """Yield the files of the packages with their names in the wheel."""
    for package_name in _PACKAGES:
        for path in (root / package_name).rglob("*"):
            name = path.relative_to(root).as_posix()
            is_source = path.is_file() and "__pycache__" not in path.parts
            if is_source and (path.suffix != _WEIGHTS or not weights.isdisjoint(PurePosixPath(name).parts)):
                yield name, path


def _metadata(distribution: importlib.metadata.Distribution) -> dict[str, str]:
    texts = {name: distribution.read_text(name) for name in ("METADATA", "entry_points.txt")}
    return {"WHEEL": _TAG, **{name: text for name, text in texts.items() if text is not None}}


def _base64(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
