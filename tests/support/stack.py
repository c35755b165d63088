"""The services of ``knn-diffusion up`` on free ports, a project with small deployments, and its runs."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.deployment_runs import connected, start_run
from infra.deploy.processes import read_started
from infra.prefect_server import free_port

CHECKOUT = Path(__file__).parents[2]
OWN = ("PREFECT_", "RAY_", "MLFLOW_", "KNN_DIFFUSION_")
"""Prefixes of variables that services must not inherit from other tests."""


class Stack:
    """Services in ``folder``, and the runs of their deployments."""

    def __init__(self, folder: Path, tracking: str | None) -> None:
        self.folder, self.root = folder, folder / "root"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
        self.environment |= {"KNN_DIFFUSION_CACHE": str(folder / "cache"), "PYTHONPATH": str(CHECKOUT)}
        if tracking is not None:
            self.environment["MLFLOW_TRACKING_URI"] = tracking
        self.ports = {name: free_port() for name in ("prefect", "mlflow", "ray")}
        self.variables: dict[str, str] = {}

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run ``knn-diffusion`` in a process of its own."""
        return subprocess.run(
            [sys.executable, "-m", "flows.cli.app", *arguments],
            env=self.environment | self.variables, cwd=self.folder, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def up(self) -> None:
        """Start the services that do not run."""
        options = ["--root", str(self.root), "--stack", str(self.folder / "stack")]
        ports = [f"--{name}-port={port}" for name, port in self.ports.items()]
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli.app", "up", *options, *ports],
            env=self.environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (line.removeprefix("export ").partition("=") for line in done.stdout.splitlines())
        self.variables = {name: value for name, _, value in lines}

    def kill(self, name: str) -> None:
        """Kill a service and its children."""
        (found,) = [one for one in read_started(self.folder / "stack") if one.name == name]
        os.killpg(found.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(found.pid, 0)

    def deploy(self, *deployments: dict[str, Any]) -> Any:
        """Deploy a project with the probe and these deployments of the real flows."""
        from flows.deploy import deploy

        project = self.folder / "project"
        project.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / "tests" / "support" / "probe_flow.py", project / "probe.py")
        if not (project / "flows").exists():
            (project / "flows").symlink_to(CHECKOUT / "flows")
        pool = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["definitions"]["work_pools"]["default"]
        pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(project)}}]
        entries = [{"work_pool": pool, "parameters": {"config": {}}, **entry} for entry in deployments]
        content = {"name": "knn-diffusion", "prefect-version": "3.8.8", "pull": pull, "deployments": entries}
        (project / "prefect.yaml").write_text(yaml.safe_dump(content))
        return deploy(project)

    def start(self, deployment: str, **parameters: Any) -> FlowRun:
        return start_run(deployment, [f"{name}={value}" for name, value in parameters.items()])

    def state(self, run: FlowRun | UUID) -> State[Any]:
        with connected() as client:
            state = client.read_flow_run(run if isinstance(run, UUID) else run.id).state
        assert state is not None
        return state

    def ended(self, run: FlowRun, timeout_s: float = 120) -> State[Any]:
        """Wait until a run has ended, and return its state."""
        wait_for(lambda: self.state(run).is_final(), timeout_s)
        return self.state(run)

    def running(self, run: FlowRun, domain: str) -> int:
        """Wait until a probe holds the lease of its domain, and return its process."""
        file = self.root / domain / "process"
        wait_for(lambda: self.state(run).is_running() and file.exists() and file.read_text() != "")
        return int(file.read_text())

    def heartbeats(self, run: FlowRun) -> int:
        """Return the number of heartbeats of a run that the server has received."""
        names, ids = ["prefect.flow-run.heartbeat"], [f"prefect.flow-run.{run.id}"]
        with connected() as client:
            found = client.request(
                "POST", "/events/filter", json={"filter": {"event": {"name": names}, "resource": {"id": ids}}}
            )
        return int(found.json()["total"])

    def stages(self, run: FlowRun) -> dict[str, str]:
        """Return the state of each stage of a run, by the name of its task."""
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        with connected() as client:
            found = client.read_task_runs(flow_run_filter=wanted)
        return {one.name.rpartition("-")[0]: one.state_name or "" for one in found}

    def log(self, run: FlowRun) -> str:
        with connected() as client:
            logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
        return "\n".join(one.message for one in logs)

    def ended_runs_of(self, deployment: str) -> list[FlowRun]:
        """Return the ended runs of a deployment, oldest first."""
        wanted = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
        with connected() as client:
            runs = client.read_flow_runs(deployment_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
        return [run for run in runs if run.state is not None and run.state.is_final()]


def wait_for(condition: Callable[[], object], timeout_s: float = 120, *, poll_s: float = 0.5) -> None:
    """Wait until the condition holds, and evaluate it every ``poll_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(poll_s)


def drain_events() -> None:
    """Send the events of this process, so that the next ones go to the server that is configured then.

    Prefect has one sender per process, which keeps the address that it started with.
    """
    EventsWorker.drain_all(timeout=30)


@contextlib.contextmanager
def started(folder: Path, tracking: str | None) -> Iterator[Stack]:
    """Run the services within the block, and use their Prefect server in this process."""
    stack = Stack(folder, tracking)
    url = f"http://127.0.0.1:{stack.ports['prefect']}/api"
    before = os.environ.get("PREFECT_API_URL")
    os.environ["PREFECT_API_URL"] = url
    try:
        drain_events()
        with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: None}):
            stack.up()
            yield stack
    finally:
        drain_events()
        stack.command("down", "--stack", str(folder / "stack"))
        os.environ.pop("PREFECT_API_URL")
        if before is not None:
            os.environ["PREFECT_API_URL"] = before
