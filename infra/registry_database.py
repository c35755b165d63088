"""MLflow's SQLite database, created and upgraded beside its place and then renamed into it.

MLflow migrates a SQLite file in place, one revision after another, outside of a transaction. A kill or a full disk in
between leaves tables without the revision that they belong to: no later command can open the file. Processes that
create one file at the same time fail, too. Here one process at a time migrates a copy, and the rename is atomic.
"""

import contextlib
import functools
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from infra.errors import InputError, IntegrityError, KNNDiffusionError, TransientError
from infra.storage.errors import disk_full_error, is_disk_full

LOCK_S = 300.0
"""How long to wait for another process that creates or upgrades the same database."""
_BUSY_S = 20.0
_FULL = "disk is full"
_JOURNALS = ("-journal", "-wal", "-shm")
_WRITTEN_BY_MIGRATIONS = frozenset({"alembic_version", "workspaces", "experiments"})


def path_of(tracking_uri: str) -> Path | None:
    """Return the file of a SQLite URI, or None for a server, another database and one in memory."""
    name = tracking_uri.removeprefix("sqlite:///").partition("?")[0]
    return None if name in {tracking_uri, "", ":memory:"} else Path(name)


def prepare(database: Path, artifacts_uri: str) -> None:
    """Create ``database``, or upgrade it to the schema of the installed MLflow; do nothing when it is current.

    ``artifacts_uri`` becomes the artifact store of the default experiment. A file that an interrupted migration left is
    replaced when it holds no data, and otherwise upgraded.

    Raises:
        InputError: a newer MLflow wrote the file, it is no database, or its folder cannot be written to.
        IntegrityError: the file holds data and cannot be upgraded.
        StageError: the disk is full.
        TransientError: another process has the database for too long.
    """
    try:
        if _is_current(database):
            return
        with FileLock(database.with_name(f"{database.name}.lock"), timeout=LOCK_S):
            if not _is_current(database):
                _replace(database, artifacts_uri)
    except Timeout:
        raise TransientError(
            f"{database} has been locked by another process for {LOCK_S:.0f} s; run again once that has ended"
        ) from None
    except (OSError, sqlite3.Error, SQLAlchemyError, MlflowException) as error:
        raise _explained(database, error) from error


def _explained(database: Path, error: Exception) -> KNNDiffusionError:
    said = " ".join(str(error).split())[:200]
    if _FULL in said or is_disk_full(error, database.parent):
        return disk_full_error(str(database))
    if isinstance(error, OSError):
        return InputError(
            f"{database} cannot be created or upgraded ({error.strerror}); make its folder writable, or name another "
            "--root"
        )
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        return InputError(
            f"{database} is no SQLite database that can be read ({said}); restore a backup of it, or move it away"
        )
    return TransientError(f"{database} cannot be created or upgraded ({said}); does another process use it? run again")


def _replace(database: Path, artifacts_uri: str) -> None:
    """Migrate a copy of ``database``, or a new file, and rename it into place."""
    prepared = database.with_name(f"{database.name}.new")
    _remove(prepared)  # of a process that was killed
    try:
        if _has_data(database):
            _copy(database, prepared)
            try:
                _upgrade(prepared)
                _initialize(prepared, artifacts_uri)
            except (MlflowException, SQLAlchemyError) as error:
                said = " ".join(str(error).split())[:200]
                if _FULL in said or is_disk_full(error, database.parent):
                    raise
                raise IntegrityError(
                    f"{database} holds data and cannot be upgraded to this MLflow ({said}); restore a backup of it, or "
                    "move it away and register the databases again"
                ) from error
        else:
            prepared.touch(mode=0o660, exist_ok=False)  # less the umask: it is not for every user of the machine
            _initialize(prepared, artifacts_uri)
        _sync(prepared)
        for suffix in _JOURNALS:  # SQLite would roll an old journal back into the new file
            database.with_name(database.name + suffix).unlink(missing_ok=True)
        prepared.replace(database)
        _sync(database.parent)
    finally:
        _remove(prepared)


def _is_current(database: Path) -> bool:
    """Return True if the file has the schema of the installed MLflow. Raises ``InputError`` for a newer one."""
    found = _revision(database)
    if found is None:
        return False
    known = _known_revisions()
    if found not in known:
        raise InputError(
            f"{database} has the schema {found}, which this MLflow does not know; install the newer MLflow that wrote "
            "it, or name another --root"
        )
    return found == known[0]


@functools.cache
def _known_revisions() -> list[str]:
    """The schema revisions of the installed MLflow, the newest first."""
    import mlflow.store
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(mlflow.store.__file__).parent / "db_migrations"))
    return [script.revision for script in scripts.walk_revisions()]


def _upgrade(database: Path) -> None:
    """Bring the tables that there are to the newest revision."""
    from mlflow.store.db import utils

    engine = utils.create_sqlalchemy_engine_with_retry(f"sqlite:///{database}")  # type: ignore[no-untyped-call]
    try:
        utils._upgrade_db(engine)  # type: ignore[no-untyped-call]
    finally:
        engine.dispose()


def _initialize(database: Path, artifacts_uri: str) -> None:
    """Create what is missing: the tables in an empty file, and MLflow's default experiment."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{database}", artifacts_uri)  # type: ignore[no-untyped-call]
    store._dispose_engine()  # type: ignore[no-untyped-call]


def _revision(database: Path) -> str | None:
    with _opened(database) as connection:
        if connection is None or "alembic_version" not in _tables(connection):
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if row is None else str(row[0])


def _has_data(database: Path) -> bool:
    """Return True if there is more in the file than the migrations write."""
    with _opened(database) as connection:
        if connection is None:
            return False
        tables = _tables(connection)
        rows = [f'SELECT 1 FROM "{name}" LIMIT 1' for name in tables - _WRITTEN_BY_MIGRATIONS]  # noqa: S608
        if "experiments" in tables:
            rows.append("SELECT 1 FROM experiments WHERE experiment_id != 0 LIMIT 1")
        return any(connection.execute(query).fetchone() for query in rows)


def _tables(connection: sqlite3.Connection) -> set[str]:
    listed = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return {str(name) for (name,) in listed}


@contextlib.contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection | None]:
    """Yield a connection to an existing file, or None."""
    if not database.exists():
        yield None
        return
    with contextlib.closing(
        sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)
    ) as connection:
        yield connection


def _copy(database: Path, to: Path) -> None:
    """Copy the committed content; no other process writes meanwhile."""
    with (
        contextlib.closing(sqlite3.connect(database, timeout=_BUSY_S, isolation_level=None)) as writer,
        contextlib.closing(sqlite3.connect(database, timeout=_BUSY_S)) as source,
        contextlib.closing(sqlite3.connect(to)) as target,
    ):
        writer.execute("BEGIN IMMEDIATE")  # not on the connection that is read: a backup waits for it to end
        source.backup(target)
        writer.execute("ROLLBACK")
    to.chmod(database.stat().st_mode)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(database: Path) -> None:
    for suffix in ("", *_JOURNALS):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
