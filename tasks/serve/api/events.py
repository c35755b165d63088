"""Progress of a job as server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse

from tasks.serve.api.views import JobView
from tasks.serve.service.jobs import Job

POLL_S = 0.1
KEEP_ALIVE_S = 15.0


def stream(job: Job) -> StreamingResponse:
    """Return the events of a job: ``progress`` after each change, at last ``done``, ``failed`` or ``cancelled``."""
    return StreamingResponse(
        _events(job),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},  # nginx buffers otherwise
    )


async def _events(job: Job) -> AsyncIterator[str]:
    """Yield the events. A comment now and then keeps proxies from closing an idle connection."""
    before, sent = None, time.monotonic()
    while True:
        view = JobView.of(job)
        finished = view.state not in ("queued", "running")
        if view != before:
            name = view.state if finished else "progress"
            yield f"event: {name}\ndata: {json.dumps(view.model_dump(mode='json'))}\n\n"
            before, sent = view, time.monotonic()
        elif time.monotonic() - sent > KEEP_ALIVE_S:
            yield ": keep-alive\n\n"
            sent = time.monotonic()
        if finished:
            return
        await asyncio.sleep(POLL_S)
