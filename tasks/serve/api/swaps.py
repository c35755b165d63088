"""Swaps on request: one at a time, in a thread of their own."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tasks.serve.service.errors import ServiceClosedError
from tasks.serve.service.responses import ServedDatabase

if TYPE_CHECKING:
    from tasks.serve.service.engine import Engine


class Swaps:
    """Runs swaps for the routes. A swap may take minutes, so it must not occupy the threads of other routes."""

    def __init__(self, engine: "Engine") -> None:
        """Swap the databases of ``engine``."""
        self._engine = engine
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="swap")
        self._requested: set[asyncio.Future[ServedDatabase]] = set()
        self._closed = False

    async def run(self, name: str, version: int | None) -> ServedDatabase:
        """Swap a database after the swaps before. Raises as ``Engine.swap``."""
        if self._closed:
            raise ServiceClosedError("the service is shutting down; try again later")
        swapped = asyncio.wrap_future(self._executor.submit(self._engine.swap, name, version))
        self._requested.add(swapped)
        try:
            return await swapped
        except asyncio.CancelledError:
            if self._closed:
                raise ServiceClosedError("the service was shut down before the swap was finished") from None
            raise
        finally:
            self._requested.discard(swapped)

    async def close(self, deadline: float) -> bool:
        """Wait for the requested swaps until ``deadline``, in seconds of ``time.monotonic``, and fail the rest.

        The engine, which is closed already, refuses those that have not begun. A thread may still run the one that
        has. Return True if all finished in time.
        """
        self._closed = True
        if not self._requested:
            return True
        _, late = await asyncio.wait(set(self._requested), timeout=max(0.0, deadline - time.monotonic()))
        for swapped in late:
            swapped.cancel()
        return not late
