"""Commands and environments of the services of a deployment on one machine. All of them listen on 127.0.0.1."""

import dataclasses
import importlib.metadata
import os
import secrets
import subprocess
import sys
from pathlib import Path

from infra import uris
from infra.deploy.processes import Service
from infra.errors import StageError
from infra.prefect_server import free_port
from infra.quiet import QUIET
from infra.settings import Settings
from infra.storage.folders import PRIVATE, make_folder

POOL = "knn-diffusion"
REQUIREMENTS = Path(__file__).with_name("prefect-server.txt")
HEARTBEAT_S = 30
"""Interval of the heartbeats of a run: the shortest that Prefect allows."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Folder and ports of the services.

    Attributes:
        folder: Folder for Prefect's database, logs, the Ray token and the record of processes.
        checkout: Folder of prefect.yaml.
        prefect_port: Port of Prefect's server.
        mlflow_port: Port of MLflow's server.
        ray_port: Port of the Ray head.
        server_python: Python of an environment with ``prefect-server.txt``. Default: one is created in ``folder``.
    """

    folder: Path
    checkout: Path
    prefect_port: int = 4200
    mlflow_port: int = 5000
    ray_port: int = 6379
    server_python: str | None = None

    @property
    def prefect_url(self) -> str:
        """URL of Prefect's API."""
        return f"http://127.0.0.1:{self.prefect_port}/api"

    @property
    def mlflow_url(self) -> str:
        """URL of MLflow's server."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def ray_token(self) -> Path:
        """File with the token that the Ray head requires."""
        return self.folder / "ray-token"


def services(stack: Stack, settings: Settings) -> list[Service]:
    """Return the services; the last one, the worker, needs the others. Creates the Ray token."""
    make_folder(stack.folder, PRIVATE)
    external = (settings.tracking or "").startswith(("http://", "https://"))
    return [_ray(stack), _prefect(stack), *([] if external else [_mlflow(stack, settings)]), _worker(stack, settings)]


def driver_environment(stack: Stack, settings: Settings) -> dict[str, str]:
    """Return the environment variables that connect a command or worker to the stack."""
    external = settings.tracking if (settings.tracking or "").startswith("http") else None
    return {
        "PREFECT_API_URL": stack.prefect_url,
        "MLFLOW_TRACKING_URI": external or stack.mlflow_url,
        "KNN_DIFFUSION_RAY_ADDRESS": f"127.0.0.1:{stack.ray_port}",
        "KNN_DIFFUSION_ROOT": uris.absolute(settings.root),
        **_ray_authentication(stack),
    }


def server_python(stack: Stack) -> str:
    """Return a Python that can run Prefect's server; creates an environment in the stack's folder if needed.

    Raises ``StageError`` if the requirements cannot be installed.
    """
    if stack.server_python is not None:
        return stack.server_python
    major, minor = importlib.metadata.version("sqlalchemy").split(".")[:2]
    if (int(major), int(minor)) < (2, 1):
        return sys.executable
    environment = stack.folder / "prefect-server"
    python, ready = environment / "bin" / "python", environment / "installed.txt"
    if not ready.exists() or ready.read_text() != REQUIREMENTS.read_text():
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        for command in ([sys.executable, "-m", "venv", str(environment)], [*install, str(REQUIREMENTS)]):
            done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - our own interpreter
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise StageError(
                    f"the environment of Prefect's server cannot be installed ({last}); install {REQUIREMENTS} "
                    "yourself, and give its Python as KNN_DIFFUSION_SERVER_PYTHON"
                )
        ready.write_text(REQUIREMENTS.read_text())
    return str(python)


def _ray_authentication(stack: Stack) -> dict[str, str]:
    """Return the token setting for head, workers and drivers: the user's own, or a token of the stack."""
    if "RAY_AUTH_MODE" in os.environ:
        return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    if not stack.ray_token.exists():
        stack.ray_token.touch(mode=0o600)
        stack.ray_token.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(stack.ray_token)}


def _ray(stack: Stack) -> Service:
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard=false"]
    # Ray's default ports are fixed, and those of workers a range: another head on the machine may use them.
    ports = [f"--port={stack.ray_port}", f"--ray-client-server-port={free_port()}"]
    workers = ["--min-worker-port=0", "--max-worker-port=0"]
    return Service(
        name="ray",
        command=[*command, *ports, *workers, "--node-ip-address=127.0.0.1", "--disable-usage-stats"],
        environment={
            **QUIET,
            **_ray_authentication(stack),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # otherwise Ray replaces 127.0.0.1 by a public address
        },
        port=stack.ray_port,
    )


def _prefect(stack: Stack) -> Service:
    return Service(
        name="prefect-server",
        command=[
            server_python(stack),
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            str(stack.prefect_port),
        ],
        environment={
            **QUIET,
            "PREFECT_HOME": str(stack.folder / "prefect"),
            "PREFECT_API_URL": stack.prefect_url,
            "PREFECT_UI_API_URL": stack.prefect_url,
        },
        health=f"{stack.prefect_url}/health",
        port=stack.prefect_port,
    )


def _mlflow(stack: Stack, settings: Settings) -> Service:
    port = stack.mlflow_port
    return Service(
        name="mlflow",
        command=[
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
            "--artifacts-destination",
            settings.artifacts_uri,
            "--allowed-hosts",
            f"127.0.0.1:{port},localhost:{port}",
        ],
        # The URI may hold a password, and every user of the machine can read command lines.
        environment={
            **QUIET,
            "MLFLOW_BACKEND_STORE_URI": settings.tracking_uri,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else four more processes wait for jobs of MLflow's GenAI
        },
        health=f"{stack.mlflow_url}/health",
        port=port,
    )


def _worker(stack: Stack, settings: Settings) -> Service:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    return Service(
        name="worker",
        command=command,
        environment={
            **QUIET,
            **driver_environment(stack, settings),
            "KNN_DIFFUSION_CHECKOUT": str(stack.checkout),
            "KNN_DIFFUSION_PROMOTION": os.environ.get("KNN_DIFFUSION_PROMOTION", "event"),
            "PREFECT_HOME": str(stack.folder / "worker"),
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
            "PREFECT_WORKER_ENABLE_CANCELLATION": "true",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        },
    )
