"""Operation of a deployment on the real services of ``knn-diffusion up``: schedules, kills, cancels and promotion."""

import contextlib
import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient
from prefect.client.schemas.objects import FlowRun
from support.changing_domain import BODY, NAMES
from support.command import run
from support.fakes import LoopbackServer, Reply, WithoutRay
from support.postgres import is_installed, postgres_server
from support.stack import CHECKOUT, Stack, started, wait_for
from support.tiny_domain import write_urls
from typer.testing import Result

from flows.deployment_runs import cancel, connected, list_runs
from infra.errors import StageError
from infra.promotions import Promotions
from infra.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.integration]

CRASHED_S = 120.0
"""Seconds after which a run without heartbeats must be Crashed."""
CANCELLED_S = 60.0
"""Upper bound on a busy machine; an idle one takes less than 10."""
DOMAIN, MODEL = "shapes", "knn-database.shapes"


def run_when_free(*arguments: str) -> Result:
    """Run a command, and repeat it while the deployed sweep holds the lease of the model."""
    results: list[Result] = []

    def finished() -> bool:
        results.append(run(*arguments))
        return "is being written by sweep" not in results[-1].stderr

    wait_for(finished)
    return results[-1]


def probe(name: str, *, cron: bool = False, **config: Any) -> dict[str, Any]:
    """Return a deployment of the probe, on a schedule that fires every minute or on none."""
    schedules = [{"slug": "minute", "cron": "* * * * *", "timezone": "UTC", "active": True}] if cron else []
    return {"name": name, "entrypoint": "probe.py:probe", "parameters": {"config": config}, "schedules": schedules}


def real(name: str) -> dict[str, Any]:
    """Return a deployment of prefect.yaml without its schedule."""
    entries = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]
    (entry,) = [entry for entry in entries if entry["name"] == name]
    return {key: value for key, value in entry.items() if key not in ("work_pool", "schedules")}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The services, with MLflow on PostgreSQL where that is installed."""
    with contextlib.ExitStack() as resources:
        tracking = None
        if is_installed() and importlib.util.find_spec("psycopg"):
            tracking = f"postgresql://{resources.enter_context(postgres_server())}"
        yield resources.enter_context(started(tmp_path_factory.mktemp("stack"), tracking))


@pytest.fixture(scope="module")
def doomed(stack: Stack) -> tuple[FlowRun, datetime]:
    """A run whose worker and process were killed, and when. A new worker runs, and everything is deployed."""
    both = [probe(name, cron=True, domain="scheduled", seconds=20) for name in ("first", "second")]
    stack.deploy(
        probe("probe", domain="any", seconds=600), *both, *map(real, ("new-domain", "train-generator", "sweep"))
    )
    doomed = stack.start("probe/probe", domain="doomed")
    process = stack.running(doomed, "doomed")
    wait_for(lambda: stack.heartbeats(doomed))
    stack.kill("worker")
    os.kill(process, signal.SIGKILL)
    killed = datetime.now(UTC)
    assert stack.command("status", "--stack", str(stack.folder / "stack")).returncode == 1
    stack.up()
    return doomed, killed


@pytest.fixture
def variables(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Use the services in this process."""
    import mlflow

    for name in ("MLFLOW_TRACKING_URI", "KNN_DIFFUSION_ROOT"):
        monkeypatch.setenv(name, stack.variables[name])
    yield stack.variables
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> Iterator[LoopbackServer]:
    with LoopbackServer({path: Reply(body=body) for path, body in BODY.items()}) as server:
        yield server


def test_run_resumes_after_cancels_in_each_stage_and_a_kill_of_mlflow(
    stack: Stack, doomed: tuple[FlowRun, datetime], images: LoopbackServer
) -> None:
    def cancelled(stage: str, deployment: str, **parameters: Any) -> None:
        begun = stack.start(deployment, domain=DOMAIN, **parameters)
        wait_for(lambda: stack.stages(begun).get(stage) == "Running", 180, poll_s=0.2)
        cancel(str(begun.id))
        requested = time.monotonic()
        state = stack.ended(begun)
        assert (stage, state.name, time.monotonic() - requested < CANCELLED_S) == (stage, "Cancelled", True)

    urls = write_urls(stack.folder / "urls.jsonl", [images.url(path) for path in NAMES[:8]])
    options = {
        "urls": urls, "download.policy.allow_hosts": f"['{images.host}']", "download.workers": 1, "embed.workers": 1,
        "index.recall_queries": 4,
    }  # fmt: skip
    for stage in ("download", "embed", "index"):
        cancelled(stage, "new-domain", **options)

    resumed = stack.start("new-domain", domain=DOMAIN, **options)
    wait_for(lambda: "database  " in stack.log(resumed), 240)
    stack.kill("mlflow")  # while the run registers
    time.sleep(2)
    stack.up()
    state = stack.ended(resumed, 240)
    assert state.name == "Completed", state.message
    log = stack.log(resumed).splitlines()
    skipped = [line.split()[0] for line in log if "skipped, already committed" in line]
    assert skipped[:2] == ["images", "embeddings"], "the run did not resume"
    wait_for(lambda: stack.ended_runs_of("sweep"))  # started by the event of the registration
    assert {one.state_name for one in stack.ended_runs_of("sweep")} == {"Completed"}

    (manifest,) = (stack.root / DOMAIN / "database").glob("*/manifest.json")
    network = {"kind": "transformer", "image_size": 16, "layers": 1, "heads": 1, "head_width": 16}
    training = {"images": 10_000_000, "batch_size": 4}
    cancelled(
        "train", "train-generator", database=manifest.parent,
        train=json.dumps({"network": network, "training": training, "cpus_per_worker": 1}),
        **{"train.conditioning.neighbours": 2, "train.conditioning.pool": 4},
    )  # fmt: skip


def test_two_schedules_of_one_domain_end_as_completed_and_skipped(
    stack: Stack, doomed: tuple[FlowRun, datetime]
) -> None:
    def met() -> list[Any]:
        first, second = stack.ended_runs_of("first"), stack.ended_runs_of("second")
        pairs = [(a, b) for a in first for b in second if a.expected_start_time == b.expected_start_time]
        return [pair for pair in pairs if {one.state_name for one in pair} == {"Completed", "Skipped"}]

    wait_for(met, 180)
    skipped = next(one for one in met()[0] if one.state_name == "Skipped")
    assert "is being written by probe scheduled" in (skipped.state.message or "")
    deployed = stack.deploy(
        probe("probe", domain="any", seconds=600),
        probe("first", domain="scheduled", seconds=20),
        *map(real, ("new-domain", "train-generator", "sweep")),
    )
    assert deployed.deleted_deployments == ("probe/second",)
    assert deployed.deleted_schedules == ("probe/first minute",)


def test_run_completes_after_its_server_was_killed_and_restarted(
    stack: Stack, doomed: tuple[FlowRun, datetime]
) -> None:
    begun = stack.start("probe/probe", domain="restart")
    stack.running(begun, "restart")
    stack.kill("prefect-server")
    with pytest.raises(StageError, match="Prefect's server does not answer"):
        list_runs(1)
    stack.up()
    (stack.root / "restart" / "go").touch()
    assert stack.ended(begun).name == "Completed"


def test_promotion_is_refused_forced_and_rolled_back(
    variables: dict[str, str], stack: Stack, images: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.rebuild_config import RebuildIndexConfig
    from flows.rebuild_index import rebuild_index

    WithoutRay().install(monkeypatch)
    urls = write_urls(stack.folder / "more.jsonl", [images.url(path) for path in NAMES[:12]])
    rebuild_index(RebuildIndexConfig(domain=DOMAIN, urls=str(urls)))
    denied = run_when_free("promote", DOMAIN, "--version", "1")
    assert (denied.exit_code, denied.stdout) == (1, "")
    assert "was not promoted because gates failed" in denied.stderr
    forced = run_when_free("promote", DOMAIN, "--version", "1", "--force", "--reason", "the new images are wrong")
    assert forced.exit_code == 0, forced.stderr
    restored = run_when_free("rollback", DOMAIN, "--reason", "they were right")
    assert restored.exit_code == 0, restored.stderr
    history = json.loads(run("history", DOMAIN, "--json").stdout)
    assert [(one["outcome"], one["version"], one["after"]) for one in history] == [
        ("rolled-back", 2, 2), ("promoted", 1, 1), ("refused", 1, 2), ("promoted", 2, 2), ("promoted", 1, 1),
    ]  # fmt: skip


def test_sweep_decides_once_about_a_candidate_whose_event_was_lost(variables: dict[str, str]) -> None:
    from flows.sweep import SweepConfig, sweep

    client = MlflowClient(variables["MLFLOW_TRACKING_URI"])
    client.set_registered_model_alias(MODEL, "candidate", "1")  # as a process leaves it that was killed there
    client.delete_model_version_tag(MODEL, "1", "promotion.state")
    assert sweep(SweepConfig()) == [], "a rollback has pinned the champion"
    before = json.loads(run("history", DOMAIN, "--json").stdout)
    promoted = run_when_free("promote", DOMAIN, "--version", "2")
    assert promoted.exit_code == 0, promoted.stderr
    sweep(SweepConfig())  # at the same time, the deployed sweep may run, started by the registration of version 2
    promotions = Promotions(Settings())
    wait_for(lambda: promotions.undecided(MODEL) is None)
    assert sweep(SweepConfig(name=DOMAIN)) == []
    after = json.loads(run("history", DOMAIN, "--json").stdout)
    decisions = [(one["outcome"], one["version"]) for one in after[: len(after) - len(before)]]
    assert decisions == [("refused", 1), ("promoted", 2)]


def test_run_without_heartbeats_is_crashed_and_blocks_no_domain(stack: Stack, doomed: tuple[FlowRun, datetime]) -> None:
    run_without_process, killed = doomed
    state = stack.ended(run_without_process, CRASHED_S)
    assert state.name == "Crashed"
    assert "No heartbeat for 90 s" in (state.message or "")
    assert (state.timestamp - killed).total_seconds() < CRASHED_S
    again = stack.command("run", "probe/probe", "--param", "domain=doomed", "--param", "seconds=0")
    assert (again.returncode, again.stderr.splitlines()[-1]) == (0, "Completed"), again.stderr
    with connected() as client:
        runs = client.read_flow_runs()
    # A scheduled run whose deployment has just been deleted crashes too, with another message.
    marked = [one.id for one in runs if one.state is not None and "No heartbeat" in (one.state.message or "")]
    assert marked == [run_without_process.id], "a run that has ended was marked too"


def test_down_stops_every_service(stack: Stack) -> None:
    done = stack.command("down", "--stack", str(stack.folder / "stack"))
    assert done.returncode == 0, done.stderr
    names = ["worker", "mlflow", "prefect-server", "ray"]
    assert sorted(line.partition(":")[0] for line in done.stderr.splitlines()) == sorted(names)
    assert not (Path(stack.folder) / "stack" / "services.json").read_text().strip("[]")
