"""Access to the page: the same API keys as the routes, asked for once per browser."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

COOKIE = "knn_diffusion_playground"
_SESSIONS = 10_000
_MAX_FORM_BYTES = 4_096

_FORM = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>knn-diffusion</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="playground/static/key.css"></head>
<body><main><h1>knn-diffusion</h1><p>This service requires an API key.</p>
<form method="post" action="playground/key"><label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Open the playground</button></form>{notice}</main></body></html>"""


class Access:
    """Sessions of browsers that sent a valid key. The key itself is never stored."""

    def __init__(self, accepts: Callable[[str], bool] | None) -> None:
        """Create the access check. ``accepts`` compares a key in constant time; None: no key is required."""
        self._accepts = accepts
        self._sessions: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def allows(self, request: Request) -> bool:
        """Return True if no key is required, or if the browser has sent one."""
        return self._accepts is None or request.cookies.get(COOKIE) in self._sessions

    def form(self, request: Request) -> Response:
        """Return the page that asks for the key."""
        refused = request.query_params.get("key") == "refused"
        notice = '<p role="alert">This key is not valid.</p>' if refused else ""
        return HTMLResponse(_FORM.format(notice=notice), status_code=401, headers={"Cache-Control": "no-store"})

    async def enter(self, request: Request) -> Response:
        """Start a session if the form contains a valid key."""
        length = request.headers.get("content-length", "")
        fits = length.isdecimal() and int(length) <= _MAX_FORM_BYTES
        key = (await request.form()).get("key") if fits else None
        if self._accepts is None or not isinstance(key, str) or not self._accepts(key):
            return RedirectResponse("../?key=refused", status_code=303)
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._sessions[token] = None
            while len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
        response = RedirectResponse("..", status_code=303)
        response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return response
