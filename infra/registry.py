"""MLflow's model registry: register, alias, pull.

There are two kinds of registered model. ``knn-database.<domain>`` is a manifest; the index is not copied, only checked
against its digest. ``knn-diffusion`` contains its weights. A version is referenced by

    models:/knn-database.twemoji@champion    an MLflow URI: name and alias, or name and version
    twemoji                                  a short name: that domain's champion
    /data/twemoji/database/1f0c…             a committed folder, local or remote, registered or not
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.entities.paged_list import PagedList
from mlflow.tracking import MlflowClient

from infra import artifacts, logs, storage, uris, validation
from infra.errors import IntegrityError, NotFoundError
from infra.registration import NewVersion, Presentation, create_version
from infra.registry_tags import (
    CHAMPION,
    DIGEST_TAG,
    FOLDER_TAG,
    RUN_TAG,
    checked_tag,
    full_name,
    is_kind,
    typed_tags,
)
from infra.relocation import require_in_place
from infra.settings import Settings
from infra.tracking import is_created, mlflow_errors, registry_client
from infra.version_files import NOT_FOUND_CODES, VersionFiles, read_manifest
from infra.wheel import NAME as PACKAGE
from infra.wheel import Package

Method = TypeVar("Method", bound=Callable[..., Any])
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """Version in the registry: its URI by version and by alias, and whether it existed before."""

    name: str
    version: int
    uri: str
    alias_uri: str
    existed: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PulledVersion:
    """Resolved reference: the committed folder, its manifest, and the files of a registered version.

    ``local`` is MLflow's own folder if it is on this machine. Otherwise a generator's files are in the cache.
    ``foreign`` is True for a folder that was referenced by path and is outside the user's root.
    """

    folder_uri: str
    manifest: artifacts.Manifest
    local: Path | None = None
    foreign: bool = False
    name: str | None = None
    version: int | None = None


def _translating_errors(method: Method) -> Method:
    """Wrap a method of a registry in :func:`infra.tracking.mlflow_errors`."""

    @functools.wraps(method)
    def call(self: "Registry", *args: Any, **kwargs: Any) -> Any:
        with mlflow_errors(self._settings):
            return method(self, *args, **kwargs)

    return cast(Method, call)


class Registry:
    """Client of the model registry that ``settings`` name."""

    def __init__(self, settings: Settings) -> None:
        """Store the settings. The first call that needs the store connects this process's MLflow to it."""
        self._settings = settings

    @functools.cached_property
    def _client(self) -> MlflowClient:
        return registry_client(self._settings)

    @_translating_errors
    def register(
        self,
        name: str,
        folder_uri: str,
        *,
        script: Path,
        signature: ModelSignature,
        tags: Mapping[str, str],
        files: Mapping[str, Path] | None = None,
        model_config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        alias: str | None = CHAMPION,
        presentation: Presentation | None = None,
        package: Package | None = None,
    ) -> RegisteredVersion:
        """Register the committed folder as a new version of ``name`` and move ``alias`` to it.

        Args:
            name: Name of the registered model.
            folder_uri: The committed folder; its manifest is the artifact.
            script: Models-from-code script that loads the version without pickle.
            signature: Inputs and outputs of the model.
            tags: Tags of the version. The digest of the manifest is added.
            files: Further local files or folders to store with the version, by name.
            model_config: Settings that the script reads when it is loaded.
            run_id: The run that made the version. Default: a new run.
            alias: Alias to move to this version. None moves no alias.
            presentation: What MLflow's pages show of the version.
            package: This package as a requirement; its wheel is stored with the version. Default: only its name.

        A folder that is already registered with the same digest is reused, not registered twice. The same content in
        another folder becomes a new version; the earlier version continues to refer to its own folder. If the alias
        moves back to an older version, a warning is logged.

        Raises:
            TransientError: The registry does not answer.
        """
        manifest = artifacts.read_manifest(folder_uri)
        existing = self._version_of(name, manifest.digest, folder_uri)
        version = existing or create_version(
            self._client,
            self._settings,
            NewVersion(
                name=name,
                folder_uri=folder_uri,
                manifest=manifest,
                tags=tags,
                script=script,
                signature=signature,
                files=files or {},
                model_config=model_config or {},
                run_id=run_id,
                presentation=presentation or Presentation(),
                package=package or Package(requirement=PACKAGE),
            ),
        )
        if existing is not None:
            for key, value in tags.items():
                self._client.set_model_version_tag(name, version, key, value)
        if alias:
            if existing is not None:
                self.warn_if_older(name, alias, existing)
            self._client.set_registered_model_alias(name, alias, version)
        return RegisteredVersion(
            name=name,
            version=int(version),
            uri=f"models:/{name}/{version}",
            alias_uri=f"models:/{name}@{alias or CHAMPION}",
            existed=existing is not None,
        )

    def pull(self, reference: str, *, kind: str) -> PulledVersion:
        """Resolve ``reference``, in any of the three forms above, and check it.

        Args:
            reference: MLflow URI, short name or folder.
            kind: ``"database"`` or ``"generator"``.

        Raises:
            NotFoundError: Nothing has that name; the message lists the registered versions.
            IntegrityError: The folder differs from what was registered.
            TransientError: The registry or its artifact store does not answer.
        """
        reference = uris.hide(reference)
        if not reference.startswith("models:/"):
            if storage.exists(storage.join(reference, artifacts.MANIFEST)):
                folder = storage.absolute(reference)
                foreign = not storage.is_below(folder, self._settings.root)
                return PulledVersion(folder_uri=folder, manifest=self._checked(folder, kind), foreign=foreign)
            if "/" in reference:
                raise NotFoundError(f"{reference} holds no committed {kind}: there is no {artifacts.MANIFEST} in it")
            reference = f"models:/{full_name(reference, kind)}@{CHAMPION}"
        if not is_created(self._settings):
            raise self._unknown_reference(reference, kind)
        with mlflow_errors(self._settings):
            version = self._resolve(reference, kind)
        folder = self._folder_of(version)
        files = VersionFiles(version, self._client, self._settings)
        local = files.fetch() if kind == "generator" or files.on_this_machine() else None
        registered = files.fetch_manifest(reference) if local is None else read_manifest(local, reference)
        if registered.kind != kind:
            raise NotFoundError(f"{folder} holds {registered.kind}, not a {kind}")
        if kind == "database" and self._checked(folder, kind).digest != registered.digest:
            raise IntegrityError(f"{folder} changed after {reference} was registered; restore it or register it again")
        if local is not None:
            for file in registered.files:  # check the files that MLflow stores with the version
                if (local / "artifacts" / file.name).exists():
                    artifacts.fetch_file(str(local / "artifacts"), file, self._settings.cache_folder)
        return PulledVersion(
            folder_uri=folder, manifest=registered, local=local, name=version.name, version=int(version.version)
        )

    @_translating_errors
    def versions(self, kind: str) -> list[dict[str, Any]]:
        """Return every registered version of a kind: name, version, aliases, tags and ``created_ms``."""
        if not is_created(self._settings):
            return []
        listed = []
        for model in _paginate(self._client.search_registered_models, max_results=1000):
            if not is_kind(model.name, kind):
                continue
            aliases = self._client.get_registered_model(model.name).aliases
            for version in _paginate(self._client.search_model_versions, filter_string=f"name='{model.name}'"):
                self._folder_of(version)
                own = sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))
                fixed = {
                    "name": model.name,
                    "version": int(version.version),
                    "aliases": own,
                    "created_ms": version.creation_timestamp,
                }
                listed.append(typed_tags(version) | fixed)  # a tag never overrides a field of the version
        return sorted(listed, key=lambda entry: (entry["name"], entry["version"]))

    @_translating_errors
    def run_page(self, name: str, version: int) -> str:
        """Return the address of the page of the run that registered a version; empty if the version does not say."""
        return str(self._client.get_model_version(name, str(version)).tags.get(RUN_TAG, ""))

    @_translating_errors
    def tag(self, name: str, version: int, key: str, value: str) -> None:
        """Set a tag of a version."""
        self._client.set_model_version_tag(name, str(version), key, value)

    def _folder_of(self, version: ModelVersion) -> str:
        """Return the folder that a version was registered from. Raises ``InputError`` if the root was moved since."""
        if FOLDER_TAG not in version.tags:
            return ""
        folder: str = checked_tag(version, FOLDER_TAG, validation.uri)
        if self._settings.tracking is None:  # the registry is in the root
            require_in_place(folder, self._settings.root)
        return folder

    @_translating_errors
    def warn_if_older(self, name: str, alias: str, version: str) -> None:
        """Log a warning if ``alias`` is at a newer version, whose additional rows are no longer served."""
        try:
            current = self._client.get_model_version_by_alias(name, alias)
        except MlflowException:
            return  # the alias does not exist yet
        if int(version) < int(current.version):
            older = self._client.get_model_version(name, version)
            old, new = (f"version {v.version} ({v.tags.get('rows', 'unknown')} rows)" for v in (older, current))
            logs.get("stage").warning("%-11s %s@%s moves back from %s to %s", "register", name, alias, new, old)

    def _version_of(self, name: str, digest: str, folder_uri: str) -> str | None:
        """Return the newest version that was registered from the folder, or None."""
        try:
            versions = list(_paginate(self._client.search_model_versions, filter_string=f"name='{name}'"))
        except MlflowException as error:
            if error.error_code not in NOT_FOUND_CODES:
                raise
            return None
        place = storage.canonical(folder_uri)
        same = (
            int(version.version)
            for version in versions
            if version.tags.get(DIGEST_TAG) == digest and storage.canonical(version.tags.get(FOLDER_TAG, "")) == place
        )
        newest = max(same, default=None)
        return None if newest is None else str(newest)

    def _resolve(self, reference: str, kind: str) -> ModelVersion:
        match = _URI.match(reference)
        if match is None:
            raise NotFoundError(f"not an MLflow model URI: {reference}; use models:/NAME@ALIAS or models:/NAME/VERSION")
        name, alias, version = match["name"], match["alias"], match["version"]
        try:
            if alias:
                return self._client.get_model_version_by_alias(name, alias)
            return self._client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code not in NOT_FOUND_CODES:
                raise
            raise self._unknown_reference(reference, kind) from None

    def _unknown_reference(self, reference: str, kind: str) -> NotFoundError:
        return NotFoundError(
            f"no {kind} is registered as {reference} at {uris.masked(self._settings.tracking_uri)}; "
            f"registered: {self._list_registered(kind)}"
        )

    def _list_registered(self, kind: str) -> str:
        """Return the names of the registered versions of a kind, by alias or, without one, by version."""
        named = (
            f"{entry['name']}@{entry['aliases'][0]}" if entry["aliases"] else f"{entry['name']}/{entry['version']}"
            for entry in self.versions(kind)
        )
        return ", ".join(sorted(set(named))) or "none"

    def _checked(self, folder_uri: str, kind: str) -> artifacts.Manifest:
        manifest = artifacts.read_manifest(folder_uri)
        if manifest.kind != kind:
            raise NotFoundError(f"{folder_uri} holds {manifest.kind}, not a {kind}")
        return manifest


def _paginate(search: Callable[..., PagedList[Any]], **arguments: Any) -> Iterator[Any]:
    """Yield all results of a paged MLflow search."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
