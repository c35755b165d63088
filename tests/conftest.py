"""Shared fixtures: quiet libraries, object stores, a Prefect server, and one small domain built by the real flow."""

import contextlib
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support import durations, temporary_files

from infra.quiet import QUIET

sys.path.insert(0, str(Path(__file__).parent))
os.environ.update(
    QUIET
    | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # tests share the cores, and networks this small are slower on several threads
        "OMP_WAIT_POLICY": "PASSIVE",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PYTHONWARNINGS": "ignore",
        "RAY_worker_niceness": "0",  # Ray's default of 15 starves its workers while other tests run
    }
)
for name in ("KNN_DIFFUSION_ROOT", "KNN_DIFFUSION_RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
    os.environ.pop(name, None)
# Without bytecode, every process that a test starts would compile the package again, and each run all the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
temporary_files.use_memory()

INTEGRATION_FIXTURES = frozenset(
    {"bucket", "cluster", "domain", "living", "machines", "mlflow_settings", "moto_bucket", "prefect_server"}
)
"""Fixtures that start a server, a Ray cluster or the whole pipeline."""
DOMAIN_MODULES = frozenset(
    f"tests/{name}.py"
    for name in (
        "flows/cli/test_app", "flows/cli/test_databases", "flows/cli/test_generators", "flows/demo/test_run",
        "flows/test_evaluate_generator", "flows/test_new_domain",
        "tasks/evaluate/test_task", "tasks/promotion/test_generator_comparison", "tasks/serve/test_gallery",
        "tasks/train/test_adopt",
    )
)  # fmt: skip
"""Modules with tests on the built domain: one worker runs them, so that it is built once."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help="write tests/durations.txt from this run")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they need; in a worker of pytest-xdist, start the groups that take longest first."""
    seconds = durations.load()
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & INTEGRATION_FIXTURES or item.get_closest_marker("on_ray"):
            item.add_marker(pytest.mark.integration)
        if seconds.get(item.nodeid, 0.0) >= durations.SLOW_S:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("s3") and "S3_STORE_DIR" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs a real object store: make test-s3"))
        if "domain" in fixtures and group_of(item.nodeid) != "domain":
            raise pytest.UsageError(f"{item.nodeid} uses the domain: add its module to DOMAIN_MODULES in conftest.py")
    if durations.in_worker():
        durations.longest_group_first(items, [group_of(item.nodeid) for item in items], seconds)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Hide the records of Prefect from ``caplog``: its threads log during tests that do not use it."""
    logs: Any = session.config.pluginmanager.get_plugin("logging-plugin")
    logs.caplog_handler.addFilter(lambda record: record.name.partition(".")[0] != "prefect")


def group_of(nodeid: str) -> str:
    """Return the group of a test, which runs on one worker: its module, or all modules that use the domain."""
    module = nodeid.partition("::")[0]
    return "domain" if module in DOMAIN_MODULES else module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule by :func:`group_of`: the loadgroup of pytest-xdist 3.8 has no effect with pytest 9.2.

    It writes the group to a private attribute of the test that pytest no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("record_durations"):
        reports = [report for category in terminalreporter.stats.values() for report in category]
        durations.record(report for report in reports if isinstance(report, pytest.TestReport))


STORES = ["moto", pytest.param("radosgw", marks=pytest.mark.s3)]
"""Object stores on loopback: a mock, and with ``make test-s3`` a real one."""


@pytest.fixture(scope="session")
def moto_store() -> Iterator[Any]:
    from support.object_stores import ObjectStore

    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture(scope="session")
def radosgw_store() -> Any:
    from support.object_stores import RadosGateway

    return RadosGateway()


@pytest.fixture(params=STORES)
def bucket(request: pytest.FixtureRequest) -> Any:
    """An empty bucket for ``s3://`` URIs, in each store."""
    return request.getfixturevalue(f"{request.param}_bucket")


@pytest.fixture
def moto_bucket(moto_store: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from connected_bucket(moto_store, monkeypatch)


@pytest.fixture
def radosgw_bucket(radosgw_store: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from connected_bucket(radosgw_store, monkeypatch)


def connected_bucket(store: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a bucket of ``store``; set its endpoint and credentials, and clear the cache of fsspec."""
    import s3fs

    for name, value in store.keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    yield store.bucket()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that all workers of a run share, for files that take seconds to create."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if durations.in_worker() else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def prefect_server(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prefect API server of the run. The first worker migrates the database, and the others copy it."""
    from infra.prefect_server import prefect_api

    home, migrated = tmp_path_factory.mktemp("prefect"), shared_folder / "prefect.db"
    with contextlib.ExitStack() as server:
        with FileLock(f"{migrated}.lock"):
            if migrated.exists():
                shutil.copy(migrated, home)
            server.enter_context(prefect_api(home))
            if not migrated.exists():
                copy_database(home / "prefect.db", migrated)
        # Earlier tests may have imported Prefect, which reads its settings at import.
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

        settings = (PREFECT_API_URL, PREFECT_API_AUTH_STRING)
        with temporary_settings({setting: os.environ[setting.name] for setting in settings}):
            yield


def copy_database(source: Path, target: Path) -> None:
    """Copy an SQLite file that is in use."""
    with contextlib.closing(sqlite3.connect(source)) as used, contextlib.closing(sqlite3.connect(target)) as copy:
        used.backup(copy)


@pytest.fixture(scope="session")
def migrated_database(shared_folder: Path) -> Path:
    """Empty MLflow database, created once for all workers: its migrations take seconds, so tests get copies."""
    from infra import registry_database

    database = shared_folder / "mlflow.db"
    registry_database.prepare(database, str(shared_folder / "mlflow"))  # locks, so that only one process creates it
    return database


@pytest.fixture(scope="session")
def domain(prefect_server: None, migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A domain of synthetic images, some of them bad, built by the whole flow from download to registered generator.

    Its tests are one group, so that a run builds it once.
    """
    from support.tiny_domain import made

    with made(tmp_path_factory.mktemp("domain"), migrated_database) as small:
        yield small
