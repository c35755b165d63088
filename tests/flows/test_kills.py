"""The command killed at random moments and run again, compared with an uninterrupted run.

``KILLS`` kills (1, or what the environment says; ``make test-kills`` takes 100) hit process groups. The first kill
follows the first file of the embeddings, the second the start of MLflow's migrations. The moments of the others are
random: half of them are a random time after the start; the rest follow the appearance of a file in the root. One to ten
kills in a row hit one new root; the run after them completes it. The uninterrupted run takes place in this process.
"""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command import run
from support.fakes import LoopbackServer, WithoutRay
from support.tiny_domain import good_replies, write_urls

from infra import artifacts
from infra.registry import Registry
from infra.settings import Settings

KILLS = int(os.environ.get("KILLS", "1"))
SEED = int(os.environ.get("KILLS_SEED", "0"))
MAX_IN_A_ROW = 10
IMAGES = 12
CREATED = (
    "mlflow.db.new",
    "mlflow.db.new-journal",
    "mlflow.db",
    "mlflow/*",
    "shapes/*",
    "shapes/images/*/*",
    "shapes/embeddings/*/*",
    "shapes/database/*/*",
)
"""Files that the command creates on its way to a registered database, as patterns below the root."""
FIRST = ("shapes/embeddings/*/*", "mlflow.db.new")
"""Files that the first kills follow, in this order."""
TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Results of a complete run: the digest of each manifest by folder, and the registered versions."""

    digests: dict[str, str]
    versions: list[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """``knn-diffusion new-domain`` on one URL list, as a process group."""

    urls: Path
    host: str
    home: Path

    def arguments(self, root: Path) -> list[str]:
        return ["new-domain", "shapes", "--urls", str(self.urls), "--root", str(root), "--allow-host", self.host]

    @contextlib.contextmanager
    def running(self, root: Path) -> Iterator["subprocess.Popen[str]"]:
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "KNN_DIFFUSION_CACHE": str(self.home / "cache"),
            "KNN_DIFFUSION_CPUS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        with (self.home / "output").open("w+") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli.app", *self.arguments(root)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def completed(self, root: Path) -> float:
        """Run to the end, and return the duration in seconds."""
        started = time.monotonic()
        with self.running(root) as process:
            code = process.wait(TIMEOUT_S)
        assert code == 0, (self.home / "output").read_text()
        return time.monotonic() - started

    def killed(self, root: Path, chance: random.Random, duration_s: float, pattern: str | None = None) -> str | None:
        """Kill a run when a file matches ``pattern``, or at a random moment.

        Return a description of the moment, or None if the run ended before.
        """
        pause_s = 0.0
        if pattern is None:
            pending = [pattern for pattern in CREATED if not any(root.glob(pattern))]
            pattern = chance.choice(pending) if pending and chance.random() < 0.5 else None
            pause_s = chance.uniform(0, duration_s) if pattern is None else chance.uniform(0, 0.6)
        with self.running(root) as process:
            while pattern and process.poll() is None and not any(root.glob(pattern)):
                time.sleep(0.002)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(pause_s)
                return None
        return f"{pause_s:.2f} s after {pattern or 'the start'}"


def results(root: Path) -> Results:
    folders = [manifest.parent for manifest in root.rglob("shapes/**/manifest.json")]
    versions = Registry(Settings(root=str(root))).versions("database")
    return Results(
        digests={str(folder.relative_to(root)): artifacts.read_manifest(str(folder)).digest for folder in folders},
        versions=[
            (entry["name"], entry["version"], entry["aliases"], entry["digest"], Path(entry["uri"]).relative_to(root))
            for entry in versions
        ],
    )


@pytest.fixture
def shapes(prefect_server: None, tmp_path: Path) -> Iterator[Command]:
    images = dict(list(good_replies().items())[:IMAGES])
    (tmp_path / "home").mkdir()
    with LoopbackServer(images) as server:
        urls = write_urls(tmp_path / "urls.jsonl", [server.url(path) for path in images])
        yield Command(urls=urls, host=server.host, home=tmp_path / "home")


@pytest.mark.slow
def test_new_domain_after_kills_equals_uninterrupted_run(
    shapes: Command, migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    shutil.copy(migrated_database, tmp_path / "whole" / "mlflow.db")
    with monkeypatch.context() as patch:
        WithoutRay().install(patch)
        patch.setenv("KNN_DIFFUSION_CACHE", str(shapes.home / "cache"))
        result = run(*shapes.arguments(tmp_path / "whole"))
    assert result.exit_code == 0, result.output
    duration_s = shapes.completed(tmp_path / "timed") if len(FIRST) < KILLS else 0.0
    expected = results(tmp_path / "whole")
    assert len(expected.digests) == 3
    assert len(expected.versions) == 1
    chance, kills, roots = random.Random(SEED), 0, 0
    while kills < KILLS:
        root, moments = tmp_path / f"root-{roots}", []
        for _ in range(min(chance.randint(1, MAX_IN_A_ROW), KILLS - kills)):
            moment = shapes.killed(root, chance, duration_s, FIRST[kills] if kills < len(FIRST) else None)
            if moment is None:
                break  # the root is complete
            moments.append(moment)
            kills += 1
        again_s = shapes.completed(root)
        assert results(root) == expected, moments
        roots += 1
        print(f"{kills} kills, {roots} roots; completed in {again_s:.1f} s after {moments}", flush=True)
