"""Check of the database server that ``MLFLOW_TRACKING_URI`` names, before MLflow opens it.

MLflow retries an unreachable database for two minutes and reports a missing driver with a long traceback.
"""

import contextlib

import sqlalchemy
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from infra import uris
from infra.errors import InputError, TransientError

CONNECT_S = 4
"""Seconds to wait for each address of the server; ``localhost`` has two."""
_VARIABLE = "MLFLOW_TRACKING_URI"


def check(tracking_uri: str) -> None:
    """Connect to the database server of ``tracking_uri`` and disconnect. No effect on a file or an MLflow server.

    Raises:
        InputError: The URI is malformed, or its driver is not installed.
        TransientError: The server cannot be reached or refuses the connection.
    """
    scheme = tracking_uri.partition("://")[0]
    if scheme.partition("+")[0] not in {"mssql", "mysql", "postgresql"}:
        return
    shown = uris.masked(tracking_uri)
    arguments = {"connect_timeout": CONNECT_S} if scheme.startswith("postgresql") else {}
    try:
        engine = sqlalchemy.create_engine(tracking_uri, connect_args=arguments, poolclass=sqlalchemy.NullPool)
    except (ImportError, NoSuchModuleError) as error:
        fix = "pip install 'knn-diffusion[postgres]'" if scheme == "postgresql+psycopg" else f"install it for {scheme}"
        raise InputError(f"no driver for the database at {shown} ({_reason(error)}); {fix}") from None
    except (ArgumentError, ValueError) as error:
        raise InputError(
            f"not a database URI: {shown} ({_reason(error)}); set {_VARIABLE} to postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    try:
        with contextlib.closing(engine.connect()):
            pass
    except SQLAlchemyError as error:
        raise TransientError(
            f"no connection to the database at {shown} ({_reason(error)}); check that the server runs, and the host, "
            f"port, user, password and name in {_VARIABLE}"
        ) from None


def _reason(error: Exception) -> str:
    """Return the message of the driver in one line, without SQLAlchemy's additions and secrets."""
    return uris.masked(" ".join(str(getattr(error, "orig", None) or error).split()))[:300]
