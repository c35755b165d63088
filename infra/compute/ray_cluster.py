"""The Ray cluster of this process: a local one or one at an address, and what it has room for."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from infra.compute import interruptible, local_ray, ray_token
from infra.compute.actor_pool import one_line
from infra.errors import InputError, StageError
from infra.quiet import QUIET

_CHECKOUT = Path(__file__).parents[2]
_IS_CHECKOUT = (_CHECKOUT / "pyproject.toml").exists()
_address: str | None = None
_cores: int | None = None
_depth = 0
_local_cluster = contextlib.ExitStack()
_ROUNDING = 1e-6  # five workers of 0.2 cores fit on one core, despite rounding errors

# Ray warns about each start that leaves the handler alone, which _init does on purpose.
logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM handler" not in record.getMessage())


@contextmanager
def cluster(address: str | None = None, cores: int | None = None) -> Iterator[None]:
    """Provide Ray within the block: the cluster at ``address``, or a local cluster with ``cores``.

    Ray starts when the first stage needs it, so a flow whose stages are all committed does not start it. Nested blocks
    share the outer cluster.
    """
    global _address, _cores, _depth
    if _depth == 0:
        _address, _cores = address, cores
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            ray.shutdown()
            _reinstall_handler()
            _local_cluster.close()


def start() -> None:
    """Start or join Ray, if that has not happened yet.

    Raises ``StageError`` outside :func:`cluster` or if no cluster answers, and ``InputError`` for a malformed address.
    """
    if ray.is_initialized():
        return
    if _depth == 0:
        raise StageError("no Ray cluster is open; run stages inside compute.cluster()")
    options: dict[str, Any] = {"address": _address, "runtime_env": _shipped_checkout()}
    if _address is None:
        options = {
            "address": "local",
            "num_cpus": _cores or len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "object_store_memory": 256 << 20,
        }
    quiet = {"logging_level": logging.ERROR, "configure_logging": False, "log_to_driver": False}
    try:
        if _address is None:
            _local_cluster.enter_context(local_ray.private_token())
            with local_ray.loopback(), local_ray.environment(_worker_variables()):
                _init(_temp_dir=local_ray.session_folder(), **quiet, **options)
        else:
            with local_ray.loopback_of(_address):
                _local_cluster.enter_context(ray_token.cluster_token(_address))
                _init(**quiet, **options)
    except ValueError as error:
        if _address is None:
            raise
        raise InputError(
            f"not an address of a Ray cluster: {_address} ({error}); use HOST:PORT, ray://HOST:PORT or auto"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise StageError(
            f"no Ray cluster at {_address or 'this machine'} ({one_line(error)}); start one, or unset the address"
        ) from error


def cpus() -> int:
    """Return the number of CPU cores of the cluster."""
    start()
    return int(ray.cluster_resources().get("CPU", 1))


def gpus() -> float:
    """Return the number of GPUs of the cluster."""
    start()
    return float(ray.cluster_resources().get("GPU", 0))


def clamp_cpus(wanted: float, gpus: float = 0) -> float:
    """Limit ``wanted`` to the cores of the largest machine with ``gpus`` GPUs. Ray would wait indefinitely for more."""
    return min(wanted, max((one.get("CPU", 0) for one in _machines() if one.get("GPU", 0) >= gpus), default=wanted))


def _machines() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def capacity(cpus_each: float, gpus_each: float = 0) -> int:
    """Return the number of workers of this size that the machines can run at once.

    Raises ``StageError`` if no machine has ``gpus_each`` GPUs, because Ray would wait for one indefinitely.
    """
    machines = _machines()
    largest = max((machine.get("GPU", 0) for machine in machines), default=0)
    if gpus_each > largest:
        raise StageError(
            f"{gpus_each:g} GPUs per worker requested, but the largest machine has {largest:g}; request no more than "
            "that, or use a cluster with GPUs (KNN_DIFFUSION_RAY_ADDRESS)"
        )
    requested = [(name, each) for name, each in (("CPU", cpus_each), ("GPU", gpus_each)) if each]
    if not requested:
        return sys.maxsize
    return sum(min(int(machine.get(name, 0) / each + _ROUNDING) for name, each in requested) for machine in machines)


def _init(**options: Any) -> None:
    """Call ``ray.init`` so that the caller's SIGTERM handler remains, and interrupts it.

    In the main thread Ray replaces the handler by one that ends the process. With Prefect's handler, a cancelled run
    unwinds and ends as Cancelled instead of Crashed. Without an earlier handler Ray's is useful: it ends the processes
    of a local cluster.
    """
    if callable(signal.getsignal(signal.SIGTERM)) and threading.current_thread() is threading.main_thread():
        # The processes of a local cluster end with the thread that started them.
        _local_cluster.callback((ended := threading.Event()).set)
        interruptible.call(lambda: ray.init(**options), until=ended)
        _reinstall_handler()
    else:
        ray.init(**options)


def _reinstall_handler() -> None:
    """Install Python's SIGTERM handler again: Ray's native code replaces it at the start and resets it at the end."""
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _worker_variables() -> dict[str, str]:
    """Return the environment variables of the workers of a local cluster."""
    return {
        **({"PYTHONPATH": str(_CHECKOUT)} if _IS_CHECKOUT else {}),
        **QUIET,
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning idle threads slow each other down on shared cores
    }


def _shipped_checkout() -> dict[str, Any]:
    """Return the runtime environment that ships a checkout. An installed package must be on the machines already."""
    if not _IS_CHECKOUT:
        return {}
    return {"working_dir": str(_CHECKOUT), "excludes": [".venv", "build", ".git", "tests", "knn-diffusion-data"]}
