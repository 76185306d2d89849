"""What the guard lets through to the page, asked without a server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from invdiff.app import guard
from invdiff.app.guard import Guard

HOST = "127.0.0.1:7860"
FOREIGN = "This page takes no requests from other sites."
PASSED = (200, "passed")


async def page(scope: Any, receive: Any, send: Any) -> None:
    """What is guarded."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b"passed"})


async def sent_by(
    guarded: Guard, path: str = "/", *, method: str = "GET", kind: str = "http", **headers: str | None
) -> list[Any]:
    """The messages of an answer; headers are those of a request to `HOST`, None for one that is absent."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": f"{kind}.{'connect' if kind == 'websocket' else 'request'}"}

    async def send(message: Any) -> None:
        sent.append(message)

    named = {"host": HOST, **headers}
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in named.items() if value]
    await guarded({"type": kind, "method": method, "path": path, "headers": pairs}, receive, send)
    return sent


def ask(path: str = "/", *, only: str | None = "127.0.0.1", **request: Any) -> tuple[int, str]:
    """Status and text of an answer; `only` is the one name of a page for this machine alone."""
    start, body = asyncio.run(sent_by(Guard(page, host=only), path, **request))
    return start["status"], body["body"].decode().strip()


@pytest.mark.parametrize("only", ["127.0.0.1", None])
@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (HOST, "http://127.0.0.1:7860"),
        ("localhost:7860", "http://LOCALHOST:7860"),
        ("[::1]:7860", "http://[::1]:7860"),
        ("localhost", "http://localhost"),
        ("localhost:443", "https://localhost"),
        ("localhost", "https://localhost:443"),
    ],
)
def test_its_own_scripts_may_ask(host: str, origin: str, only: str | None) -> None:
    own = {"host": host, "origin": origin, "sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"}
    assert ask("/gradio_api/queue/join", method="POST", only=only, **own) == PASSED


@pytest.mark.parametrize("only", ["127.0.0.1", None])
@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://127.0.0.1",
        "http://127.0.0.1:8000",
        "https://127.0.0.1",
        "http://localhost:7860",
        "http://127.0.0.1:7860.evil.example",
        "http://evil@127.0.0.1:7860",
        "http://127.0.0.1:7860/x",
        "http://127.0.0.1:port",
        "http://[::1",
        "file://127.0.0.1:7860",
        "null",
        "\u00ff",
    ],
)
def test_no_other_origin_may_ask(origin: str, only: str | None) -> None:
    for method in ("POST", "GET", "OPTIONS"):
        assert ask("/gradio_api/queue/join", method=method, only=only, origin=origin) == (403, FOREIGN)


def test_behind_a_server_the_name_that_visitors_use_counts() -> None:
    assert ask(only=None, host="pics.example", origin="https://pics.example") == PASSED
    assert ask(only=None, host="pics.example:8443", origin="https://pics.example:8443") == PASSED
    assert ask(only=None, host=HOST, origin="https://pics.example") == (403, FOREIGN)
    assert ask(only=None, host=None, origin="https://pics.example") == (403, FOREIGN)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.8.7:80", "localhost:1", "LocalHost", "[::1]", "[::1]:7860", "desk", "DESK:7860"]
)
def test_a_page_for_this_machine_answers_to_its_names(host: str) -> None:
    assert ask(only="Desk", host=host) == PASSED


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:7860",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil@127.0.0.1:7860",
        "127.0.0.1:7860/evil",
        "127.0.0.1:99999999",
        "10.0.0.1:7860",
        "[::2]:7860",
        "0.0.0.0:7860",
        "127.0.0.1, evil.example",
        "desktop",
        None,
    ],
)
def test_it_answers_to_no_name_that_somebody_else_points_to_it(host: str | None) -> None:
    status, text = ask(only="desk", host=host, sec_fetch_site="same-origin")
    assert (status, text.count(".")) == (403, 1)
    assert "names of this machine" in text


def test_two_hosts_are_no_host() -> None:
    async def twice() -> Any:
        return await sent_by(Guard(page, host="127.0.0.1"), Host="evil.example")

    assert asyncio.run(twice())[0]["status"] == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_to_it_and_do_nothing_else(site: str) -> None:
    link = {"sec_fetch_site": site, "sec_fetch_mode": "navigate"}
    assert ask(**link, sec_fetch_dest="document") == PASSED
    assert ask(**link) == PASSED
    assert ask(**link, sec_fetch_dest="iframe") == (403, FOREIGN)
    for mode in ("no-cors", "cors", "websocket", None):
        assert ask(sec_fetch_site=site, sec_fetch_mode=mode) == (403, FOREIGN)


def test_somebody_who_types_the_address_may_come() -> None:
    assert ask(sec_fetch_site="none", sec_fetch_mode="navigate", sec_fetch_dest="document") == PASSED
    assert ask() == PASSED


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/config", "/login", "/logout", "/assets/index.js", "/static/js/x.js", "/theme.css", "/favicon.ico"),
        *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/heartbeat/abc", "/gradio_api/cancel"),
        *("/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/file=/tmp/x.png", "/gradio_api/theme.css"),
    ],
)
def test_what_the_page_uses_is_open(path: str) -> None:
    assert ask(path) == PASSED


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/upload_progress", "/root/gradio_api/upload"),
        *("//gradio_api/upload", "/gradio_api//upload", "/gradio_api", "/gradio_api/", "/GRADIO_API/upload"),
        *("/gradio_api/component_server", "/gradio_api/stream/x", "/gradio_api/stream/s/r/1/playlist.m3u8"),
        *("/gradio_api/deep_link", "/gradio_api/process_recording", "/gradio_api/mcp/sse", "/gradio_api/runs"),
        *("/gradio_api/run/predict", "/gradio_api/api/predict", "/gradio_api/call/x", "/gradio_api/call/v2/x"),
        *("/gradio_api/run-history/connect", "/gradio_api/vibe-code", "/gradio_api/proxy=https://x.hf.space/"),
        *("/gradio_api/token", "/gradio_api/dev/reload", "/gradio_api/custom_component/x/client/y/z"),
        *("/gradio_api/openapi.json", "/gradio_api/profiling/traces", "/gradio_api/file/tmp/x"),
        *("/gradio_api/file=http://192.0.2.1/x", "/gradio_api/file=HTTPS://x", "/gradio_api/file=http:/x"),
        *("/monitoring", "/monitoring/summary", "/pwa_icon", "/docs", "/openapi.json"),
    ],
)
def test_what_it_does_not_use_is_closed(path: str) -> None:
    for method in ("GET", "POST"):
        assert ask(path, method=method) == (404, "This page has nothing here.")


def test_websockets_are_judged_as_well() -> None:
    def kinds(**request: Any) -> list[str]:
        sent = asyncio.run(sent_by(Guard(page, host="127.0.0.1"), kind="websocket", **request))
        return [message["type"] for message in sent]

    assert kinds(origin=f"http://{HOST}") == ["websocket.accept"]
    assert kinds(origin="https://evil.example") == ["websocket.close"]
    assert kinds(host="evil.example") == ["websocket.close"]
    assert kinds(path="/gradio_api/mcp") == ["websocket.close"]


def test_starting_and_stopping_is_handed_on() -> None:
    seen: list[str] = []

    async def start(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(start, host="127.0.0.1")({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


def test_answers_are_for_no_other_site() -> None:
    headers = dict(asyncio.run(sent_by(Guard(page, host=None)))[0]["headers"])
    assert headers[b"x"] == b"y"
    assert headers[b"content-security-policy"] == b"frame-ancestors 'self'"
    assert headers[b"cross-origin-resource-policy"] == b"same-origin"


def test_a_refusal_of_head_has_no_body() -> None:
    assert ask("/monitoring", method="HEAD") == (404, "")


def test_logins_wait_for_their_turn_and_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SECONDS_PER_LOGIN", 0.2)
    guarded = Guard(page, host=None)
    ends: dict[str, float] = {}

    async def one(name: str, path: str, method: str) -> None:
        await sent_by(guarded, path, method=method)
        ends[name] = time.monotonic()

    async def all_at_once() -> None:
        logins = [one(f"login {n}", ("/login", "/login/")[n % 2], "POST") for n in range(4)]
        await asyncio.gather(*logins, one("page", "/", "GET"), one("draw", "/gradio_api/queue/join", "POST"))

    begun = time.monotonic()
    asyncio.run(all_at_once())
    assert ends["login 3"] - begun >= 0.6 - 0.01
    assert max(ends["page"], ends["draw"]) < ends["login 1"]


def test_who_would_wait_long_to_log_in_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LONGEST_WAIT", 0.0)
    monkeypatch.setattr(guard, "SECONDS_PER_LOGIN", 60.0)
    guarded = Guard(page, host=None)
    answers = [asyncio.run(sent_by(guarded, "/login", method="POST"))[0]["status"] for _ in range(3)]
    assert answers == [200, 429, 429]


def test_logins_from_elsewhere_take_no_turn() -> None:
    guarded = Guard(page, host=None)
    begun = time.monotonic()
    for _ in range(5):
        asyncio.run(sent_by(guarded, "/login", method="POST", origin="https://evil.example"))
    asyncio.run(sent_by(guarded, "/login", method="POST"))
    assert time.monotonic() - begun < 2  # five turns would take longer
