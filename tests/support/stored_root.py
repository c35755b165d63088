"""The root that release 0.1.0 wrote, for tests of what must stay readable."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from compatibility.make_root import FIXTURE, PLACEHOLDER

PINS: dict[str, Any] = json.loads((FIXTURE.parent / "pins.json").read_text())
FOLDERS: dict[str, str] = PINS["root"]["folders"]
_TEXT_SUFFIXES = {"", ".json", ".jsonl", ".sql", ".yaml"}


def unpack_root(target: Path) -> Path:
    """Place a copy of the stored root at ``target``: its paths absolute, its registry an SQLite file."""
    for source in sorted(path for path in FIXTURE.rglob("*") if path.is_file()):
        data = source.read_bytes()
        if source.suffix in _TEXT_SUFFIXES:
            data = data.replace(PLACEHOLDER.encode(), str(target).encode())
        copy = target / source.relative_to(FIXTURE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
    with closing(sqlite3.connect(target / "mlflow.db")) as database:
        database.executescript((target / "mlflow.sql").read_text())
    (target / "mlflow.sql").unlink()
    return target
