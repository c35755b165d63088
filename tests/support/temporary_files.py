"""Where a run creates its temporary folders."""

import os
import shutil
from pathlib import Path

MEMORY = Path("/dev/shm")  # noqa: S108 - pytest creates a private folder in it
LEAST_FREE = 6 << 30
"""Bytes that must be free, of the file system and of the memory. A run uses less than two GiB."""


def use_memory() -> None:
    """Let pytest create its temporary folders in memory, if there is room.

    On a disk, tests of pipelines spend about half of their time waiting for writes. ``PYTEST_DEBUG_TEMPROOT`` names
    another folder.
    """
    if "PYTEST_DEBUG_TEMPROOT" in os.environ or not MEMORY.is_dir():
        return
    if min(shutil.disk_usage(MEMORY).free, available_memory()) >= LEAST_FREE:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)


def available_memory() -> int:
    """Return the bytes of memory that Linux can still give to processes; 0 on other systems."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    values = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    return int(values["MemAvailable"].split()[0]) << 10
