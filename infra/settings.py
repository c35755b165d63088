"""Settings from the environment: what the line reads of it. Every variable is optional; secrets never print.

KNN_DIFFUSION_ROOT            where artifacts are kept (a folder or s3://…)      ./knn-diffusion-data
KNN_DIFFUSION_CACHE           local cache of remote files, by digest             ~/.cache/knn-diffusion
KNN_DIFFUSION_CACHE_BYTES     how large that may grow, on each machine           50000000000
KNN_DIFFUSION_RAY_ADDRESS     "auto" on a cluster; unset starts a local one
KNN_DIFFUSION_CPUS            cores for a local Ray; unset takes all
MLFLOW_TRACKING_URI           sqlite:///…, postgresql://… or http://…            sqlite below the root
MLFLOW_ARTIFACTS              where files of new MLflow experiments are kept     a folder below the root
AWS_ENDPOINT_URL_S3           the object store, before AWS_ENDPOINT_URL           Amazon's own
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION    read by s3fs itself
PREFECT_API_URL               read by ``infra.prefect_server``                      a server for the command alone
KNN_DIFFUSION_CHECKOUT        read by prefect.yaml: this folder, on the worker
TMPDIR                        where shards are made before they are stored       /tmp

Folders that a command creates for these are closed to users outside of the group; one that exists keeps its mode.

The cache's bound belongs to a machine, not to a run: every process that fetches reads it there. It is meant for what
nobody uses: files in use are kept even above it (see ``infra.storage.file_cache``).
"""

from pathlib import Path

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra import uris


class Settings(BaseSettings):
    """Where things are kept and run. ``Settings()`` reads the environment; arguments override it."""

    model_config = SettingsConfigDict(env_prefix="KNN_DIFFUSION_", extra="ignore", frozen=True, populate_by_name=True)

    root: str = "knn-diffusion-data"
    cache: Path = Path("~/.cache/knn-diffusion")
    cache_bytes: int = Field(default=50_000_000_000, ge=0)
    ray_address: str | None = None
    cpus: int | None = Field(default=None, ge=1)
    tracking: str | None = Field(default=None, validation_alias="MLFLOW_TRACKING_URI", repr=False)
    artifacts: str | None = Field(default=None, validation_alias="MLFLOW_ARTIFACTS", repr=False)
    object_store: str | None = Field(
        default=None, validation_alias=AliasChoices("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), repr=False
    )

    @field_validator("root")
    @classmethod
    def _hide_secrets(cls, uri: str) -> str:
        """Keep the root's password out of every URI below it."""
        return uris.hide(uri)

    @field_validator("tracking", "artifacts", "object_store")
    @classmethod
    def _learn_secrets(cls, uri: str | None) -> str | None:
        """Leave what MLflow and boto open as it is, but know its password, to mask it in their messages."""
        if uri is not None:
            uris.hide(uri)
        return uri

    @property
    def tracking_uri(self) -> str:
        """MLflow's metadata store. A remote root needs one named: sqlite cannot live in an object store."""
        if self.tracking is not None:
            return self.tracking
        if not uris.is_local(self.root):
            raise ValueError(f"the root {self.root} is remote: set MLFLOW_TRACKING_URI to a database or a server")
        return f"sqlite:///{uris.absolute(self.root)}/mlflow.db"

    @property
    def artifacts_uri(self) -> str:
        """MLflow's artifact store for experiments made here."""
        if self.artifacts is None and uris.HIDDEN in self.root:
            raise ValueError(f"the root {self.root} has a password, which MLflow would keep: set MLFLOW_ARTIFACTS")
        return self.artifacts or uris.join(uris.absolute(self.root), "mlflow")

    @property
    def cache_folder(self) -> Path:
        """The local cache, user expanded."""
        return self.cache.expanduser()
