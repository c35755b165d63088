"""Trust in databases and generators that the user opens by name.

A registered version and a folder below the user's root are trusted like code. Any other folder is foreign: its
manifest may have been written by somebody else, and it refers to further folders and an encoder. Unless the user
trusts it, only its own root is read and only the bundled encoder is loaded. SECURITY.md explains the model to users.
"""

from infra import artifacts, storage
from infra.registry import PulledVersion, Registry
from infra.settings import Settings
from model.saved_generator import BUNDLED_GENERATORS
from tasks.references.types import Generator, Made


def open_named(kind: type[Made], name: str, settings: Settings, *, trust: bool = False) -> tuple[Made, PulledVersion]:
    """Open a database version or generator by short name, ``models:/`` URI or folder.

    Raises:
        NotFoundError, IntegrityError, TransientError: as :meth:`infra.registry.Registry.pull`.
        InputError: a foreign folder refers to files or to an encoder that may only be used with ``trust``.
    """
    pulled = Registry(settings).pull(name, kind=kind.kind)
    root = own_root(pulled.folder_uri, pulled.manifest) if pulled.foreign and not trust else None
    reference = kind.of(pulled.manifest, pulled.folder_uri, confined_to=root)
    if root is not None:
        reference.manifest()  # for its checks
    return reference, pulled


def open_folder(kind: type[Made], folder_uri: str, settings: Settings, *, trust: bool = False) -> Made:
    """Open a committed folder. Raises as :func:`open_named`."""
    manifest = artifacts.read_manifest(folder_uri)
    foreign = not trust and not storage.is_below(folder_uri, settings.root)
    return kind.of(manifest, folder_uri, confined_to=own_root(folder_uri, manifest) if foreign else None)


def saved_pipeline(name: str, digest: str, settings: Settings, *, trust: bool = False) -> Generator:
    """Return the reference to a saved pipeline without a manifest: a bundled one, or a local folder."""
    bundled = name in BUNDLED_GENERATORS
    uri = name if bundled else storage.absolute(name)
    trusted = trust or bundled or storage.is_below(uri, settings.root)
    return Generator(uri=uri, rows=0, digest=digest, confined_to=None if trusted else uri)


def own_root(folder_uri: str, manifest: artifacts.Manifest) -> str:
    """Return ``<root>`` of ``<root>/<domain>/<kind>/<key>``, or the folder itself if it is laid out otherwise."""
    place = storage.canonical(folder_uri)
    above, _, last = place.rpartition(f"/{manifest.kind}/")
    root = above.rpartition("/")[0]
    is_usable = root.rstrip("/") and not root.rstrip("/").endswith(":")  # neither the whole disk nor a bare scheme
    return root if last == manifest.key and is_usable else place
