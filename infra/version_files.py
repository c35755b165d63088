"""Files that MLflow stores with a registered version: in a folder of this machine, or downloaded to the cache."""

from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from infra import artifacts, storage, uris, validation
from infra.errors import IntegrityError, TransientError
from infra.registry_tags import DIGEST_TAG, checked_tag
from infra.settings import Settings
from infra.storage import file_cache
from infra.storage.digest_stamps import is_verified
from infra.storage.errors import disk_full_error, is_disk_full, storage_errors
from infra.tracking import mlflow_errors

NOT_FOUND_CODES = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
"""MLflow's error codes for an unknown name or version, and for an unknown alias."""


class VersionFiles:
    """Files of one version, in a folder with the subfolder ``artifacts``, which holds the manifest."""

    def __init__(self, version: ModelVersion, client: MlflowClient, settings: Settings) -> None:
        """Refer to the files of ``version``, without reading anything."""
        self._version, self._client, self._settings = version, client, settings
        self._uri = f"models:/{version.name}/{version.version}"

    def on_this_machine(self) -> Path | None:
        """Return MLflow's folder of the files if it is on this machine, else None."""
        with mlflow_errors(self._settings):
            location = self._client.get_model_version_download_uri(self._version.name, self._version.version)
        if not location.startswith(("/", "file:")):  # mlflow-artifacts:/ has one slash too, but is remote
            return None
        return Path(local_file_uri_to_path(location))  # type: ignore[no-untyped-call]

    def fetch(self) -> Path:
        """Return a local folder of the files; download it if needed.

        Raises:
            IntegrityError: The files do not exist any more.
            TransientError: The artifact store does not answer.
        """
        if place := self.on_this_machine():  # not through MLflow's download, which writes to the folder
            if not _manifest_file(place).exists():
                raise IntegrityError(
                    f"the files of {self._uri} are missing: {place} does not exist on this machine; mount or restore "
                    "that folder, or register the version again through an MLflow server that stores files"
                )
            return place
        cache = self._settings.cache_folder

        def is_complete(folder: Path) -> bool:
            try:
                files = read_manifest(folder, self._uri).files
            except (FileNotFoundError, IntegrityError):
                return False
            return all(is_verified(folder / "artifacts" / one.name, one.sha256, one.bytes, cache) for one in files)

        digest = artifacts.digest_of(self._version.source)
        if DIGEST_TAG in self._version.tags:
            digest = checked_tag(self._version, DIGEST_TAG, validation.digest)
        return file_cache.fetch_registered(digest, is_complete, self._download, cache)

    def fetch_manifest(self, reference: str) -> artifacts.Manifest:
        """Download only the manifest, and parse it. Errors of the content name ``reference``."""
        with storage.scratch() as scratch:
            return read_manifest(self._download(scratch, f"artifacts/{artifacts.MANIFEST}"), reference)

    def _download(self, to: Path, name: str = "") -> Path:
        """Download the files to ``to``, or only the file ``name``, and return their folder."""
        with storage_errors(self._settings.artifacts_uri):
            try:
                source = f"{self._uri}/{name}" if name else self._uri
                fetched = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(to))
                local = to if name else Path(fetched)
                _manifest_file(local).stat()  # an object store lists no files, without an error, if nothing is there
            except (MlflowException, OSError) as error:
                if is_disk_full(error, to):
                    raise disk_full_error(str(to)) from None
                why = f"the files of {self._uri} cannot be fetched ({uris.masked(' '.join(str(error).split()))})"
                if _is_not_found(error):
                    raise IntegrityError(f"{why}; register it again") from None
                raise TransientError(f"{why}; check that MLflow's artifact store is up and run again") from None
        return local


def read_manifest(folder: Path, reference: str) -> artifacts.Manifest:
    """Return the manifest in a folder of version files. Raises ``IntegrityError``, which names ``reference``."""
    return artifacts.Manifest.from_json(_manifest_file(folder).read_bytes(), reference)


def _manifest_file(folder: Path) -> Path:
    return folder / "artifacts" / artifacts.MANIFEST


def _is_not_found(error: MlflowException | OSError) -> bool:
    """Return True if MLflow, the local disk or MLflow's artifact server reports that the files do not exist."""
    if isinstance(error, MlflowException):
        missing_in_s3 = "(404) when calling the HeadObject" in str(error)  # MLflow wraps botocore's error in text
        return error.error_code in NOT_FOUND_CODES or missing_in_s3
    response = getattr(error, "response", None)
    return isinstance(error, FileNotFoundError) or getattr(response, "status_code", None) == 404
