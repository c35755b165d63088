"""MLflow's model registry: register, alias, pull.

Two kinds of registered model: ``knn-database.<domain>``, which is a manifest (the index stays where it is and is found
by digest), and ``knn-diffusion``, which carries its weights. Anything is named by

    models:/knn-database.twemoji@champion    an MLflow URI: name and alias, or name and version
    twemoji                                  a short name: that domain's champion
    /data/twemoji/database/1f0c…             a committed folder, local or remote, registered or not
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.entities.paged_list import PagedList
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from infra import artifacts, logs, storage, uris, validation
from infra.errors import IntegrityError, NotFoundError, TransientError
from infra.settings import Settings
from infra.storage import file_cache as caching
from infra.storage.digest_stamps import is_verified
from infra.storage.errors import disk_full_error, is_disk_full, storage_errors
from infra.tracking import connect, experiment_id, is_created, mlflow_errors

DATABASE_PREFIX = "knn-database."
GENERATOR_NAME = "knn-diffusion"
CHAMPION = "champion"
Method = TypeVar("Method", bound=Callable[..., Any])
Parsed = TypeVar("Parsed")
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")
_DIGEST_TAG = "digest"
_FOLDER_TAG = "uri"
_ABSENT = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})  # no such name or version; no such alias


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """A version in the registry: its URI by version, its alias URI, and whether it was there already."""

    name: str
    version: int
    uri: str
    alias_uri: str
    existed: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PulledVersion:
    """What a name led to: the committed folder, its manifest, and the version's files, if it was a registered one.

    The files are where MLflow keeps them, when that is on this machine; else a generator's are in the cache.
    ``foreign`` is True for a folder that was named itself and is outside of the user's root.
    """

    folder_uri: str
    manifest: artifacts.Manifest
    local: Path | None = None
    foreign: bool = False
    name: str | None = None
    version: int | None = None


def _translating_errors(method: Method) -> Method:
    """``method`` of a registry, under :func:`infra.tracking.mlflow_errors`."""

    @functools.wraps(method)
    def call(self: "Registry", *args: Any, **kwargs: Any) -> Any:
        with mlflow_errors(self._settings):
            return method(self, *args, **kwargs)

    return cast(Method, call)


class Registry:
    """The registry behind ``settings``."""

    def __init__(self, settings: Settings) -> None:
        """Keep the settings. The first call that needs the store connects this process's MLflow to it."""
        self._settings = settings

    @functools.cached_property
    def _client(self) -> MlflowClient:
        """Return a client of the store, which is created where there is none."""
        connect(self._settings)
        return MlflowClient(self._settings.tracking_uri, self._settings.tracking_uri)

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
    ) -> RegisteredVersion:
        """Register the committed folder as a new version of ``name`` and move ``alias`` to it.

        Args:
            name: of the registered model.
            folder_uri: the committed folder; its manifest is the artifact.
            script: models-from-code: how the version is loaded, without pickle.
            signature: what it takes and gives.
            tags: shown in the registry; the manifest's digest is added.
            files: further local files or folders to keep with the version, by name.
            model_config: settings that the script reads when it is loaded.
            run_id: the run that made it.
            alias: moved to this version; None leaves aliases alone.

        The same folder with the same digest is found again, not registered twice. The same content in another folder
        is another version: the one before stays with the folder that it was registered with. An alias that moves back
        to an older version is told. Raises ``TransientError``.
        """
        manifest = artifacts.read_manifest(folder_uri)
        existing = self._version_of(name, manifest.digest, folder_uri)
        version = existing or self._create(
            name, folder_uri, manifest, script, signature, files or {}, model_config or {}, run_id
        )
        for key, value in tags.items():
            self._client.set_model_version_tag(name, version, key, value)
        if alias:
            if existing is not None:
                self._tell_older(name, alias, existing)
            self._client.set_registered_model_alias(name, alias, version)
        return RegisteredVersion(
            name=name,
            version=int(version),
            uri=f"models:/{name}/{version}",
            alias_uri=f"models:/{name}@{alias or CHAMPION}",
            existed=existing is not None,
        )

    def pull(self, reference: str, *, kind: str) -> PulledVersion:
        """What ``reference`` names, of ``kind`` ``database`` or ``generator``; any of the three forms above.

        Raises:
            NotFoundError: nothing of that name; the message lists what there is.
            IntegrityError: the folder no longer holds what was registered.
            TransientError: the registry, or where it keeps its files, does not answer.
        """
        reference = uris.hide(reference)
        if not reference.startswith("models:/"):
            if storage.exists(storage.join(reference, artifacts.MANIFEST)):
                folder = storage.absolute(reference)
                foreign = not storage.is_below(folder, self._settings.root)
                return PulledVersion(folder_uri=folder, manifest=self._checked(folder, kind), foreign=foreign)
            if "/" in reference:
                raise NotFoundError(f"{reference} holds no committed {kind}: there is no {artifacts.MANIFEST} in it")
            reference = f"models:/{_full_name(reference, kind)}@{CHAMPION}"
        if not is_created(self._settings):
            raise self._unknown(reference, kind)
        with mlflow_errors(self._settings):
            version = self._resolve(reference, kind)
        uri = f"models:/{version.name}/{version.version}"
        if kind == "generator" or self._place(version):
            local = self._kept(version, uri)
            registered = _registered(local, reference)
        else:
            with storage.scratch() as scratch:
                local, registered = None, _registered(self._downloaded(uri, scratch), reference)
        folder = _checked_tag(version, _FOLDER_TAG, validation.uri) if _FOLDER_TAG in version.tags else ""
        if registered.kind != kind:
            raise NotFoundError(f"{folder} holds {registered.kind}, not a {kind}")
        if kind == "database" and self._checked(folder, kind).digest != registered.digest:
            raise IntegrityError(f"{folder} is no longer what {reference} registered; restore it or register it anew")
        if local is not None:
            for file in registered.files:  # those that came with the version are checked against their digest
                if (local / "artifacts" / file.name).exists():
                    artifacts.fetch_file(str(local / "artifacts"), file, self._settings.cache_folder)
        return PulledVersion(
            folder_uri=folder, manifest=registered, local=local, name=version.name, version=int(version.version)
        )

    def versions(self, kind: str) -> list[dict[str, Any]]:
        """Every registered version of a kind: name, version, aliases, tags, and when it was made."""
        if not is_created(self._settings):
            return []
        with mlflow_errors(self._settings):
            return self._versions(kind)

    def tag(self, name: str, version: int, key: str, value: str) -> None:
        """Put a tag on a version."""
        with mlflow_errors(self._settings):
            self._client.set_model_version_tag(name, str(version), key, value)

    def _versions(self, kind: str) -> list[dict[str, Any]]:
        listed = []
        for model in _paginate(self._client.search_registered_models, max_results=1000):
            if not _is_kind(model.name, kind):
                continue
            aliases = self._client.get_registered_model(model.name).aliases
            for version in _paginate(self._client.search_model_versions, filter_string=f"name='{model.name}'"):
                own = sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))
                fixed = {
                    "name": model.name,
                    "version": int(version.version),
                    "aliases": own,
                    "created_ms": version.creation_timestamp,
                }
                listed.append(_typed_tags(version) | fixed)  # no tag stands in for a field of the version
        return sorted(listed, key=lambda entry: (entry["name"], entry["version"]))

    def _kept(self, version: ModelVersion, uri: str) -> Path:
        """The files of a version on this machine, with their manifest."""
        if place := self._place(version):  # not by MLflow's download, which writes there
            if not _manifest_file(place).exists():
                raise IntegrityError(f"the files of {uri} are not in {place} any more; register it anew")
            return place
        cache = self._settings.cache_folder

        def is_whole(folder: Path) -> bool:
            try:
                files = _registered(folder, uri).files
            except (FileNotFoundError, IntegrityError):
                return False
            return all(is_verified(folder / "artifacts" / one.name, one.sha256, one.bytes, cache) for one in files)

        digest = artifacts.digest_of(version.source)
        if _DIGEST_TAG in version.tags:
            digest = _checked_tag(version, _DIGEST_TAG, validation.digest)
        return caching.fetch_registered(digest, is_whole, lambda to: self._downloaded(uri, to), cache)

    def _place(self, version: ModelVersion) -> Path | None:
        """Where MLflow keeps a version's files, if that is on this machine."""
        with mlflow_errors(self._settings):
            location = self._client.get_model_version_download_uri(version.name, version.version)
        if not location.startswith(("/", "file:")):  # mlflow-artifacts:/ has one slash, and is a server's
            return None
        return Path(local_file_uri_to_path(location))  # type: ignore[no-untyped-call]

    def _downloaded(self, uri: str, to: Path) -> Path:
        """The files of a version, copied to ``to``, with their manifest."""
        with storage_errors(self._settings.artifacts_uri):
            try:
                local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(to)))
                _manifest_file(local).stat()  # of nothing at all, an object store lists nothing
            except (MlflowException, OSError) as error:
                if is_disk_full(error, to):
                    raise disk_full_error(str(to)) from None
                why = f"the files of {uri} cannot be fetched ({uris.masked(' '.join(str(error).split()))})"
                if _says_absent(error):
                    raise IntegrityError(f"{why}; register it anew") from None
                raise TransientError(f"{why}; is the store of MLflow's files up? then run again") from None
        return local

    def _create(
        self,
        name: str,
        folder_uri: str,
        manifest: artifacts.Manifest,
        script: Path,
        signature: ModelSignature,
        files: Mapping[str, Path],
        model_config: Mapping[str, Any],
        run_id: str | None,
    ) -> str:
        with storage.scratch() as scratch:
            path = scratch / artifacts.MANIFEST
            path.write_text(manifest.to_json())
            with mlflow.start_run(run_id=run_id or self._new_run(name)), storage_errors(self._settings.artifacts_uri):
                info = mlflow.pyfunc.log_model(
                    name=name.replace(".", "-"),
                    python_model=str(script),
                    artifacts={"manifest": str(path), **{key: str(value) for key, value in files.items()}},
                    signature=signature,
                    pip_requirements=["knn-diffusion"],
                    model_config=dict(model_config),
                )
        with contextlib.suppress(MlflowException):  # it is there already
            self._client.create_registered_model(name)
        created = self._client.create_model_version(
            name,
            info.model_uri,
            run_id=info.run_id,
            model_id=info.model_id,
            tags={_DIGEST_TAG: manifest.digest, _FOLDER_TAG: folder_uri},
        )
        return str(created.version)

    def _tell_older(self, name: str, alias: str, version: str) -> None:
        """Warn where ``alias`` is at a newer version than this: what was added since is out of sight."""
        try:
            now = self._client.get_model_version_by_alias(name, alias)
        except MlflowException:
            return  # it is nowhere yet
        if int(version) < int(now.version):
            then = self._client.get_model_version(name, version)
            old, new = (f"version {v.version} ({v.tags.get('rows', 'unknown')} rows)" for v in (then, now))
            logs.get("stage").warning("%-11s %s@%s goes back from %s to %s", "register", name, alias, new, old)

    def _new_run(self, name: str) -> str:
        experiment = experiment_id(self._client, "register", self._settings)
        return str(self._client.create_run(experiment, run_name=name).info.run_id)

    def _version_of(self, name: str, digest: str, folder_uri: str) -> str | None:
        """The version that the folder was registered as; the newest, should there be several."""
        try:
            versions = list(_paginate(self._client.search_model_versions, filter_string=f"name='{name}'"))
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
            return None
        place = storage.canonical(folder_uri)
        same = (
            int(version.version)
            for version in versions
            if version.tags.get(_DIGEST_TAG) == digest and storage.canonical(version.tags.get(_FOLDER_TAG, "")) == place
        )
        newest = max(same, default=None)
        return None if newest is None else str(newest)

    def _resolve(self, reference: str, kind: str) -> ModelVersion:
        match = _URI.match(reference)
        if match is None:
            raise NotFoundError(f"{reference} is no MLflow model URI; write models:/NAME@ALIAS or models:/NAME/VERSION")
        name, alias, version = match["name"], match["alias"], match["version"]
        try:
            if alias:
                return self._client.get_model_version_by_alias(name, alias)
            return self._client.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
            raise self._unknown(reference, kind) from None

    def _unknown(self, reference: str, kind: str) -> NotFoundError:
        return NotFoundError(
            f"no {kind} is registered as {reference} at {uris.masked(self._settings.tracking_uri)}; "
            f"registered: {self._there(kind)}"
        )

    def _there(self, kind: str) -> str:
        """What there is of a kind, by alias, or by version where it has none."""
        named = (
            f"{entry['name']}@{entry['aliases'][0]}" if entry["aliases"] else f"{entry['name']}/{entry['version']}"
            for entry in self.versions(kind)
        )
        return ", ".join(sorted(set(named))) or "none at all"

    def _checked(self, folder_uri: str, kind: str) -> artifacts.Manifest:
        manifest = artifacts.read_manifest(folder_uri)
        if manifest.kind != kind:
            raise NotFoundError(f"{folder_uri} holds {manifest.kind}, not a {kind}")
        return manifest


_MEASURED = (
    "recall_", "clip_score_", "fd_", "fid_", "mmd_", "precision_", "nearest_", "copy_rate_", "diversity_",
)  # fmt: skip


def _paginate(search: Callable[..., PagedList[Any]], **asked: Any) -> Iterator[Any]:
    """What a search of MLflow's finds, page after page."""
    token = None
    while True:
        page = search(**asked, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _typed_tags(version: ModelVersion) -> dict[str, str | int | float]:
    """The tags of a version as what they are: they are strings to MLflow. Raises ``IntegrityError``."""
    return {tag: _checked_tag(version, tag, _parser_of(tag)) for tag in version.tags}


def _parser_of(tag: str) -> Callable[[str], str | int | float]:
    if tag in {"rows", "bytes", "images_seen"}:
        return _count
    if tag.startswith(_MEASURED):
        return float
    return {_DIGEST_TAG: validation.digest, _FOLDER_TAG: validation.uri}.get(tag, str)


def _checked_tag(version: ModelVersion, tag: str, parse: Callable[[str], Parsed]) -> Parsed:
    """A tag of a version, as ``parse`` reads it: anyone who may write to the registry may have set it."""
    try:
        return parse(version.tags.get(tag, ""))
    except ValueError as error:
        raise IntegrityError(
            f"models:/{version.name}/{version.version} has an unusable tag {tag}: {error}; register it again"
        ) from error


def _count(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", value):
        raise ValueError(f"a count must be digits, not {validation.shown(value)}")
    return validation.count(int(value), "a count")


def _manifest_file(local: Path) -> Path:
    return local / "artifacts" / artifacts.MANIFEST


def _registered(local: Path, reference: str) -> artifacts.Manifest:
    return artifacts.Manifest.from_json(_manifest_file(local).read_bytes(), reference)


def _says_absent(error: MlflowException | OSError) -> bool:
    """Whether there is nothing to fetch, whoever says so: MLflow, this machine's disk or MLflow's server of files."""
    if isinstance(error, MlflowException):
        return error.error_code in _ABSENT
    response = getattr(error, "response", None)
    return isinstance(error, FileNotFoundError) or getattr(response, "status_code", None) == 404


def _full_name(short: str, kind: str) -> str:
    if kind == "database" and not short.startswith(DATABASE_PREFIX):
        return DATABASE_PREFIX + short
    return short


def _is_kind(name: str, kind: str) -> bool:
    return name.startswith(DATABASE_PREFIX) if kind == "database" else name == GENERATOR_NAME
