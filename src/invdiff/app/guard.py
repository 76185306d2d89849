"""Let through only what the page itself asks for: nothing from another site, no route that it does not use."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ROUTES = frozenset(
    {"", "config", "login", "logout", "assets", "static", "svelte"}
    | {"favicon.ico", "manifest.json", "robots.txt", "theme.css"}
)
"""First parts of the paths of gradio that the page uses, beside `CALLS`."""
CALLS = frozenset(
    {"app_id", "cancel", "heartbeat", "info", "login_check", "queue", "reset", "startup-events", "theme.css", "user"}
)
"""What the page uses below `/gradio_api/`, beside its files. Uploads and calls by name are not among them."""
_FILE = "file="
_PORTS = {"http": 80, "https": 443}
_OWN_SITE = ("same-origin", "none")
_HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
SECONDS_PER_LOGIN = 0.5
LONGEST_WAIT = 20.0
"""Seconds after which somebody who wants to log in is sent away instead of kept waiting."""


class Guard:
    """An ASGI application before another: it refuses what this page's own scripts would not ask for.

    Browsers let any site send requests to any address, with the visitor's cookies, and let a site's name point to this
    machine. The headers that they add, and that no site can change, tell such requests apart: `Origin` where it names
    another place than `Host`, `Sec-Fetch-Site`, and on a page for this machine alone a `Host` that is not one of its
    names. Such requests get status 403; routes that the page does not use get 404.

    Logins are let through at a steady pace, one each `SECONDS_PER_LOGIN` over all visitors; those who would wait
    longer than `LONGEST_WAIT` get 429. Nobody else waits.

    Args:
        app: The application that is guarded.
        host: The one name, beside those of loopback addresses, that visitors may use; None for all names, where the
            page is open to the network or behind another server.
    """

    def __init__(self, app: Any, *, host: str | None) -> None:
        self.app = app
        self.host = host.lower() if host is not None else None
        self._next_login = 0.0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, or hand on, one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = self._refusal(scope) or await self._slow_down(scope)
        if refused is not None:
            await _refuse(scope, receive, send, *refused)
        else:
            await self.app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Return status and sentence for what is refused; None for what may pass."""
        host = _header(scope, b"host")
        if self.host is not None and not self._is_own(host):
            return 403, "This page answers only to the names of this machine, such as localhost."
        if not _is_own_site(scope, host):
            return 403, "This page takes no requests from other sites."
        if not _is_used(scope["path"]):
            return 404, "This page has nothing here."
        return None

    def _is_own(self, host: str) -> bool:
        address = _address(host, "http")
        if address is None:
            return False
        name = address[0]
        if name in ("localhost", self.host):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    async def _slow_down(self, scope: Message) -> tuple[int, str] | None:
        """Wait for a login's turn; return status and sentence where too many wait already."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            return None
        now = time.monotonic()
        turn = max(now, self._next_login)
        if turn - now > LONGEST_WAIT:
            return 429, "Too many try to log in at once; wait a minute."
        self._next_login = turn + SECONDS_PER_LOGIN
        await asyncio.sleep(turn - now)
        return None


def _is_own_site(scope: Message, host: str) -> bool:
    """Whether the page itself asks, or somebody who follows a link to it."""
    origin = _header(scope, b"origin")
    if origin:
        scheme, _, place = origin.partition("://")
        address = _address(place, scheme)
        if address is None or address != _address(host, scheme):
            return False
    site = _header(scope, b"sec-fetch-site") or "none"
    if site in _OWN_SITE:
        return True
    link = (_header(scope, b"sec-fetch-mode"), _header(scope, b"sec-fetch-dest") or "document")
    return link == ("navigate", "document")


def _is_used(path: str) -> bool:
    """Whether the page uses a path, which starts with a slash."""
    first, _, rest = path[1:].partition("/")
    if first != "gradio_api":
        return first in ROUTES and (first != "" or rest == "")
    if rest.startswith(_FILE):
        # Gradio would fetch an address of the web.
        return not rest[len(_FILE) :].lower().startswith(("http:", "https:"))
    return rest.partition("/")[0] in CALLS


def _header(scope: Message, name: bytes) -> str:
    """Return a header; one sent twice as a list, which is no valid host."""
    return ",".join(value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name)


def _address(place: str, scheme: str) -> tuple[str, int] | None:
    """Return the lower-case name and the port of `name:port`; None for anything else."""
    if scheme not in _PORTS:
        return None
    try:
        parts = urlsplit(f"//{place}")
        port = parts.port
    except ValueError:
        return None
    if parts.netloc != place or "@" in place or "," in place or not parts.hostname:
        return None
    return parts.hostname, _PORTS[scheme] if port is None else port


def _with_headers(send: Send) -> Send:
    """Return a `send` that tells browsers to show no answer inside another site."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *_HEADERS]
        await send(message)

    return sending


async def _refuse(scope: Message, receive: Receive, send: Send, status: int, sentence: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": sentence})
        return
    body = f"{sentence}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})
