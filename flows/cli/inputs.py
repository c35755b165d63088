"""Checks of a command's input before anything starts: without Prefect, Ray, torch or the network.

They report what a flow would only report after its servers have started, or after a whole download. A list on an
object store and the weights of a remote encoder are left to the flow.
"""

import importlib.util
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from infra import uris
from infra.errors import InputError, NotFoundError

RECIPE_OPTIONS: dict[str, frozenset[str]] = {
    "own_domain": frozenset({"train", "encoder"}),
    "demo_cpu": frozenset({"train"}),
    "stickers_h100": frozenset(),
    "photos_h100": frozenset({"autoencoder"}),
}
"""Options of ``new-domain`` that each recipe of :mod:`flows.recipes` accepts, in the order of its table."""
CHECKED_BYTES = 64 * 2**20
"""Longest list that is read in advance; parsing it takes less than a second."""

EXPORT_FORMATS = ("parquet", "csv", "clip-retrieval")
"""Formats of :mod:`tasks.serve.export`."""
_DEFAULT_PORTS = {"http": 80, "https": 443}


def check_domain(name: str) -> None:
    """Raise ``ConfigError`` if ``name`` cannot be a domain."""
    from tasks.references.domain_name import require_domain

    require_domain(name)


def check_root(root: str | None) -> None:
    """Raise ``InputError`` if the root of a command that reads is given but does not exist."""
    variable = os.environ.get("KNN_DIFFUSION_ROOT")
    source, given = ("--root", root) if root is not None else ("KNN_DIFFUSION_ROOT", variable)
    if not given or not uris.is_local(given):
        return
    if root is None and os.environ.get("MLFLOW_TRACKING_URI"):  # the registry is elsewhere, and names its own folders
        return
    if not uris.local_path(given).is_dir():
        raise InputError(f"{source} does not exist: {given}; give the folder that new-domain wrote to")


def check_source_root(root: str | None, *databases: str) -> None:
    """Raise ``InputError`` as :func:`check_root` does. If all ``databases`` are folders, the root may be a new one."""
    if not all("/" in name and not name.startswith("models:/") for name in databases):
        check_root(root)


def check_recipe(recipe: str, options: Collection[str]) -> None:
    """Raise ``InputError`` if there is no such recipe, or if it does not accept one of the given ``options``."""
    if recipe not in RECIPE_OPTIONS:
        raise InputError(f"--recipe is unknown: {recipe}; use one of {', '.join(RECIPE_OPTIONS)}")
    accepted = RECIPE_OPTIONS[recipe]
    if unknown := set(options) - accepted:
        raise InputError(f"--{min(unknown)} does not apply to --recipe {recipe}; remove the option")
    if "autoencoder" in accepted and "autoencoder" not in options:
        raise InputError(f"--autoencoder is missing: --recipe {recipe} trains on latents; add --autoencoder FOLDER")


def check_encoder(name: str) -> None:
    """Raise ``InputError`` if no encoder can have this name. Weights that need a download are not requested."""
    from model.encoder.identity import BUNDLED_ENCODER

    if name == BUNDLED_ENCODER:
        return
    hint = (
        f"use ARCHITECTURE/WEIGHTS (ViT-B-32/laion2b_s34b_b79k), hf-hub:ORG/NAME, local-dir:FOLDER or {BUNDLED_ENCODER}"
    )
    scheme, _, location = name.partition(":")
    if scheme == "local-dir":
        if not Path(location, "open_clip_config.json").is_file():
            raise InputError(f"--encoder has no open_clip_config.json: {name}; give the folder of a saved encoder")
    elif scheme == "hf-hub":
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", location):
            raise InputError(f"--encoder is not a repository: {name}; use hf-hub:ORG/NAME")
    else:
        architecture, _, weights = name.partition("/")
        known = _architectures()
        if not weights:
            raise InputError(f"--encoder has no weights: {name}; {hint}")
        if known and architecture not in known:
            raise InputError(f"--encoder is unknown: {name}; {hint}")
        if not Path(weights).exists() and not _is_weights_tag(weights):
            raise InputError(f"--encoder has unknown weights: {name}; {hint}")


def check_url_list(
    uri: str | Sequence[str],
    allow_hosts: Sequence[str] | None = None,
    *,
    url_column: str | None = None,
    only_failed: bool = False,
) -> None:
    """Raise an error if a local URL list is missing or unusable.

    With ``allow_hosts``, also raise one if every URL has a blocked address, such as 127.0.0.1.
    """
    if not _is_short(uri):
        return
    from infra.formats.tables import shown_name
    from tasks.download.config import ListOptions
    from tasks.download.listed_rows import read_rows

    table = read_rows(uri, ListOptions(url_column=url_column, only_failed=only_failed))
    if allow_hosts is None:
        return
    urls: list[str | None] = table["url"].to_pylist()
    blocked = {_blocked_host(url or "", allow_hosts) for url in urls}
    if None not in blocked:
        hosts = sorted(host for host in blocked if host)
        raise InputError(
            f"every URL of {shown_name(uri)} has an address that is not public: {hosts[0]}; "
            f"if this is intended, add --allow-host {hosts[0]}"
        )


def check_image_folder(folder: str) -> None:
    """Raise ``NotFoundError`` if a local folder of images does not exist."""
    if uris.is_local(folder) and not uris.local_path(folder).exists():
        raise NotFoundError(f"--folder does not exist: {folder}; check the path")


def check_export(kind: str, out: Path) -> None:
    """Raise ``InputError`` if the format of an export is unknown, or its folder is not empty."""
    if kind not in EXPORT_FORMATS:
        raise InputError(f"--format is unknown: {kind}; use {', '.join(EXPORT_FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out is not an empty folder: {out}; give another folder")
    if not out.parent.is_dir():
        raise InputError(f"folder does not exist: {out.parent}; create it, or write to another folder")


def check_takedown_list(uri: str) -> None:
    """Raise an error if a local takedown list is missing or unusable."""
    if _is_short(uri):
        from tasks.references.takedown import read_takedown_list

        read_takedown_list(uri)


def check_device(device: str) -> None:
    """Raise ``InputError`` if ``device`` has not the form of a device name."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", device):
        raise InputError(f"--device is unknown: {device}; use cpu, cuda, cuda:0 or mps")


def check_folder(option: str, folder: str | None, file: str) -> None:
    """Raise ``InputError`` if the ``folder`` of an option is given but does not hold ``file``."""
    if folder is not None and not Path(folder, file).is_file():
        raise InputError(f"{option} has no {file}: {folder}; check the path")


def _is_short(uri: str | Sequence[str]) -> bool:
    """Return True if a list is local and has at most ``CHECKED_BYTES``, or is missing, so that reading it fails."""
    from infra.formats.list_source import find_files

    given = [uri] if isinstance(uri, str) else uri
    if not all(map(uris.is_local, given)):
        return False
    paths = [uris.local_path(file) for one in given for file in find_files(one)]
    return sum(path.stat().st_size for path in paths if path.exists()) <= CHECKED_BYTES


def _blocked_host(url: str, allow_hosts: Sequence[str]) -> str | None:
    """Return HOST:PORT of a URL whose host is a numeric address or ``localhost`` and that the download will block."""
    from infra.download import public_addresses

    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
        public = public_addresses.is_public("127.0.0.1" if host == "localhost" else host)
    except ValueError:  # a name, which only the download resolves, or no URL at all
        return None
    endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return None if public or endpoint in {one.lower() for one in allow_hosts} else endpoint


def _open_clip_folder() -> Path | None:
    """Return the folder of open_clip, without the import of torch that an import of open_clip brings."""
    spec = importlib.util.find_spec("open_clip")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _architectures() -> frozenset[str]:
    folder = _open_clip_folder()
    return frozenset(path.stem for path in (folder / "model_configs").glob("*.json")) if folder else frozenset()


def _is_weights_tag(tag: str) -> bool:
    """Return True if open_clip's table of weights names ``tag`` for any architecture, or if there is no such table."""
    folder = _open_clip_folder()
    table = folder / "pretrained.py" if folder else None
    if table is None or not table.is_file():
        return True
    normal = tag.lower().replace("-", "_")  # as open_clip compares them
    return (
        re.search(rf"\b{re.escape(normal)}\b", table.read_text(encoding="utf-8").lower().replace("-", "_")) is not None
    )
