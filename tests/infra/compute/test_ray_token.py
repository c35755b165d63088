"""Test of a driver that joins a Ray cluster with authentication, after a local run on the same machine."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LOCAL = """
import os
from infra import compute

with compute.cluster(None, 1):
    print(compute.run(os.getpid) > 0)
"""
DRIVER = """
import os
from infra import compute
from infra.compute import ray_cluster
from infra.errors import StageError
from infra.settings import Settings

ray_cluster._shipped_checkout = dict  # the head has the checkout on its path
try:
    with compute.cluster(Settings().ray_address):
        print(compute.run(os.getpid) > 0)
except StageError as error:
    print(error)
print(os.environ.get("RAY_AUTH_MODE"))
"""
START_S = 60.0


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Environment of a user with a token file, and with a Ray folder short enough for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = Path(folder, "home")
        (home / ".ray").mkdir(parents=True)
        (home / ".ray" / "auth_token").write_text("1" * 64)  # as another program's local cluster leaves it
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        yield {
            **clean,
            "HOME": str(home),
            "KNN_DIFFUSION_RAY_ADDRESS": "auto",
            "PYTHONPATH": str(Path(__file__).parents[3]),
            "RAY_ADDRESS": address,  # what "auto" means: the machine may run clusters of others
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
        }


def output(script: str, environment: dict[str, str]) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.on_ray
def test_driver_joins_a_cluster_that_requires_a_token_after_a_local_run(environment: dict[str, str]) -> None:
    local = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    assert output(LOCAL, local) == ["True"]
    host, _, port = environment["RAY_ADDRESS"].partition(":")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    options = [f"--node-ip-address={host}", "--include-dashboard=false", "--num-cpus=1"]
    folder = [f"--temp-dir={environment['RAY_TMPDIR']}"]
    loopback = {**environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # of the head only: the driver detects it
    with subprocess.Popen([*command, *options, *folder], env=loopback, stdout=subprocess.PIPE, text=True) as head:
        try:
            assert head.stdout is not None
            begun = time.monotonic()
            while "Ray runtime started" not in head.stdout.readline():
                assert time.monotonic() - begun < START_S
            assert output(DRIVER, environment) == ["True", "None"]
            (refused, _) = output(DRIVER, {**environment, "RAY_AUTH_TOKEN": "0" * 64})
            assert refused.startswith(f"the Ray cluster at {environment['RAY_ADDRESS']} requires another token")
            assert "set RAY_AUTH_TOKEN_PATH to the same token file" in refused
            (refused, mode) = output(DRIVER, {**environment, "RAY_AUTH_MODE": "disabled"})
            assert "RAY_AUTH_MODE is disabled" in refused
            assert mode == "disabled"
        finally:
            head.terminate()
