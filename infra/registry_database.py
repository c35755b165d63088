"""Atomic creation and upgrade of MLflow's SQLite database.

MLflow migrates a SQLite file in place, one revision after another, without a transaction. A kill or a full disk in
between leaves tables that do not match the recorded revision, and no later command can open the file. Processes that
create the same file concurrently fail as well. Here one process at a time migrates a copy and renames it atomically.
"""

import contextlib
import functools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from infra.errors import InputError, IntegrityError, KNNDiffusionError, TransientError
from infra.storage.errors import disk_full_error, is_disk_full
from infra.storage.local_writes import sync

LOCK_S = 300.0
"""Seconds to wait for another process that creates or upgrades the same database."""
_BUSY_S = 20.0
_FULL = "disk is full"
_JOURNALS = ("-journal", "-wal", "-shm")
_WRITTEN_BY_MIGRATIONS = frozenset({"alembic_version", "workspaces", "experiments"})


def path_of(tracking_uri: str) -> Path | None:
    """Return the file of a SQLite URI, or None for a server, an in-memory database or another database system."""
    name = tracking_uri.removeprefix("sqlite:///").partition("?")[0]
    return None if name in {tracking_uri, "", ":memory:"} else Path(name)


def prepare(database: Path, artifacts_uri: str) -> None:
    """Create ``database``, or upgrade it to the schema of the installed MLflow. No effect on a current database.

    ``artifacts_uri`` becomes the artifact store of the default experiment. A file left by an interrupted migration is
    replaced if it contains no data, and upgraded otherwise.

    Raises:
        InputError: A newer MLflow wrote the file, it is not a database, or its folder is not writable.
        IntegrityError: The file contains data and cannot be upgraded.
        StageError: The disk is full.
        TransientError: Another process locks the database for too long.
    """
    try:
        if _is_current(database):
            return
        with FileLock(database.with_name(f"{database.name}.lock"), timeout=LOCK_S):
            if not _is_current(database):
                _replace(database, artifacts_uri)
    except Timeout:
        raise TransientError(
            f"{database} has been locked by another process for {LOCK_S:.0f} s; run again when that process has ended"
        ) from None
    except (OSError, sqlite3.Error, SQLAlchemyError, MlflowException) as error:
        raise _translated(database, error) from error


def _translated(database: Path, error: Exception) -> KNNDiffusionError:
    reason = " ".join(str(error).split())[:200]
    if _FULL in reason or is_disk_full(error, database.parent):
        return disk_full_error(str(database))
    if isinstance(error, OSError):
        return InputError(
            f"{database} cannot be created or upgraded ({error.strerror}); make its folder writable, or use another "
            "--root"
        )
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        return InputError(
            f"{database} is not a readable SQLite database ({reason}); restore a backup of it, or move it away"
        )
    return TransientError(f"{database} cannot be created or upgraded ({reason}); end other users of it and run again")


def _replace(database: Path, artifacts_uri: str) -> None:
    """Migrate a copy of ``database``, or a new file, and rename it into place."""
    prepared = database.with_name(f"{database.name}.new")
    _remove(prepared)  # left by a killed process
    try:
        if _has_data(database):
            _copy(database, prepared)
            try:
                _upgrade(prepared)
                _initialize(prepared, artifacts_uri)
            except (MlflowException, SQLAlchemyError) as error:
                reason = " ".join(str(error).split())[:200]
                if _FULL in reason or is_disk_full(error, database.parent):
                    raise
                raise IntegrityError(
                    f"{database} holds data and cannot be upgraded to this MLflow ({reason}); restore a backup, or "
                    "move it away and register the databases again"
                ) from error
        else:
            prepared.touch(mode=0o660, exist_ok=False)  # minus the umask: not accessible to all users of the machine
            _initialize(prepared, artifacts_uri)
        sync(prepared)
        for suffix in _JOURNALS:  # SQLite would apply an old journal to the new file
            database.with_name(database.name + suffix).unlink(missing_ok=True)
        prepared.replace(database)
        sync(database.parent)
    finally:
        _remove(prepared)


def _is_current(database: Path) -> bool:
    """Return True if the file has the schema of the installed MLflow. Raises ``InputError`` for a newer schema."""
    found = _revision(database)
    if found is None:
        return False
    revisions = _known_revisions()
    if found not in revisions:
        raise InputError(
            f"{database} has the schema {found}, which is unknown to this MLflow; install the newer MLflow that wrote "
            "it, or use another --root"
        )
    return found == revisions[0]


@functools.cache
def _known_revisions() -> list[str]:
    """Return the schema revisions of the installed MLflow, newest first."""
    import mlflow.store
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(mlflow.store.__file__).parent / "db_migrations"))
    return [script.revision for script in scripts.walk_revisions()]


def _upgrade(database: Path) -> None:
    """Migrate the existing tables to the newest revision."""
    from mlflow.store.db import utils

    engine = utils.create_sqlalchemy_engine_with_retry(f"sqlite:///{database}")  # type: ignore[no-untyped-call]
    try:
        utils._upgrade_db(engine)  # type: ignore[no-untyped-call]
    finally:
        engine.dispose()


def _initialize(database: Path, artifacts_uri: str) -> None:
    """Create the missing parts: tables in an empty file, and MLflow's default experiment."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{database}", artifacts_uri)  # type: ignore[no-untyped-call]
    store._dispose_engine()  # type: ignore[no-untyped-call]


def _revision(database: Path) -> str | None:
    with _connection(database) as connection:
        if connection is None or "alembic_version" not in _tables(connection):
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if row is None else str(row[0])


def _has_data(database: Path) -> bool:
    """Return True if the file contains more than the migrations write."""
    with _connection(database) as connection:
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
def _connection(database: Path) -> Iterator[sqlite3.Connection | None]:
    """Yield a connection to an existing file, or None if there is no file."""
    if not database.exists():
        yield None
        return
    with contextlib.closing(
        sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S)
    ) as connection:
        yield connection


def _copy(database: Path, to: Path) -> None:
    """Copy the committed content while no other process writes."""
    with (
        contextlib.closing(sqlite3.connect(database, timeout=_BUSY_S, isolation_level=None)) as writer,
        contextlib.closing(sqlite3.connect(database, timeout=_BUSY_S)) as source,
        contextlib.closing(sqlite3.connect(to)) as target,
    ):
        writer.execute("BEGIN IMMEDIATE")  # on a second connection: a backup waits for transactions of its source
        source.backup(target)
        writer.execute("ROLLBACK")
    to.chmod(database.stat().st_mode)


def _remove(database: Path) -> None:
    for suffix in ("", *_JOURNALS):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
