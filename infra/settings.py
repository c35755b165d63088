"""Settings from environment variables. Every variable is optional; secrets are never printed.

Variable                      Meaning                                            Default
KNN_DIFFUSION_ROOT            root of all artifacts (a folder or s3://…)         ./knn-diffusion-data
KNN_DIFFUSION_HOME            one folder for the cache and for the state of         the home folder
                              libraries, see ``infra.home``
KNN_DIFFUSION_CACHE           local cache of remote files, by digest             ~/.cache/knn-diffusion
KNN_DIFFUSION_CACHE_BYTES     size limit of the cache on each machine            50000000000
KNN_DIFFUSION_RAY_ADDRESS     address of a Ray cluster, e.g. "auto"              a local cluster
RAY_AUTH_TOKEN_PATH           token of the Ray cluster; read by Ray itself       ~/.ray/auth_token
KNN_DIFFUSION_CPUS            cores of a local Ray cluster                       all
KNN_DIFFUSION_PROMOTION       "event": promote generators after an event     "at-once"
MLFLOW_TRACKING_URI           sqlite:///…, postgresql://… or http://…            sqlite below the root
MLFLOW_ARTIFACTS              artifact store of new MLflow experiments           a folder below the root
AWS_ENDPOINT_URL_S3           object store; overrides AWS_ENDPOINT_URL           Amazon S3
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION   read by s3fs itself
PREFECT_API_URL               read by ``infra.prefect_server``                   a temporary server per command
KNN_DIFFUSION_API_KEYS        API keys of the service; read by ``tasks.serve.api.keys``
KNN_DIFFUSION_CHECKOUT        read by prefect.yaml: this folder, on the worker
TMPDIR                        scratch space for shards before they are stored    /tmp

Folders that a command creates for these are inaccessible to users outside the group. Existing folders keep their mode.

The cache limit belongs to a machine, not to a run: every process on the machine that fetches files reads it from the
environment. Files in use are kept even above the limit (see ``infra.storage.file_cache``).
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra import uris
from infra.errors import ConfigError
from infra.home import cache_folder


class Settings(BaseSettings):
    """Locations of storage and services. ``Settings()`` reads the environment; arguments override it."""

    model_config = SettingsConfigDict(env_prefix="KNN_DIFFUSION_", extra="ignore", frozen=True, populate_by_name=True)

    root: str = "knn-diffusion-data"
    cache: Path = Field(default_factory=cache_folder)
    cache_bytes: int = Field(default=50_000_000_000, ge=0)
    ray_address: str | None = None
    cpus: int | None = Field(default=None, ge=1)
    promotion: Literal["at-once", "event"] = "at-once"
    tracking: str | None = Field(default=None, validation_alias="MLFLOW_TRACKING_URI", repr=False)
    artifacts: str | None = Field(default=None, validation_alias="MLFLOW_ARTIFACTS", repr=False)
    object_store: str | None = Field(
        default=None, validation_alias=AliasChoices("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), repr=False
    )

    @field_validator("root")
    @classmethod
    def _hide_secrets(cls, uri: str) -> str:
        """Hide the root's password in every URI below it."""
        return uris.hide(uri)

    @field_validator("tracking", "artifacts", "object_store")
    @classmethod
    def _learn_secrets(cls, uri: str | None) -> str | None:
        """Leave URIs that MLflow and boto open unchanged, but learn their passwords, to mask them in messages."""
        if uri is not None:
            uris.hide(uri)
        return uri

    @property
    def tracking_uri(self) -> str:
        """MLflow's metadata store. Required for a remote root, because an object store cannot hold SQLite files."""
        if self.tracking is not None:
            return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", self.tracking)  # the extra's driver
        if not uris.is_local(self.root):
            raise ConfigError(f"the root {self.root} is remote: set MLFLOW_TRACKING_URI to a database or a server")
        return f"sqlite:///{uris.absolute(self.root)}/mlflow.db"

    @property
    def artifacts_uri(self) -> str:
        """MLflow's artifact store for new experiments."""
        if self.artifacts is None and uris.HIDDEN in self.root:
            raise ConfigError(f"the root {self.root} has a password, which MLflow would store: set MLFLOW_ARTIFACTS")
        return self.artifacts or uris.join(uris.absolute(self.root), "mlflow")

    @property
    def cache_folder(self) -> Path:
        """Local cache folder with ``~`` expanded."""
        return self.cache.expanduser()
