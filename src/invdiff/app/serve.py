"""Address, security and start of the page: on this machine alone unless the user asks for more, with a password."""

import ipaddress
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from ..errors import ConfigError

LOOPBACK = "127.0.0.1"
SHORTEST_PASSWORD = 8
USER = "invdiff"
# Routes of gradio below `/gradio_api/` that take files in or fetch web addresses, which the page never asks for.
CLOSED = ("upload", "process_recording", "component_server", "file=http:", "file=https:")


def check_address(host: str, *, public: bool, password: str | None) -> None:
    """Raise `ConfigError` unless the page may listen on `host`.

    A loopback address is always allowed. Any other shows the page, the model and the data to the network, and so may a
    proxy in front of the page: that takes both an explicit `public` and a password.
    """
    if password is not None and len(password) < SHORTEST_PASSWORD:
        raise ConfigError(
            f"Expected a password of at least {SHORTEST_PASSWORD} characters, got {len(password)}. Take a longer one."
        )
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"Expected an address of this machine like {LOOPBACK}, got {host!r}: {error}.") from error
    if not public and not all(ipaddress.ip_address(address).is_loopback for address in found):
        raise ConfigError(
            f"Expected an address of this machine alone, such as {LOOPBACK}, got {host}: whoever opens the page sees "
            "the data and uses the model. If you want that, add --public and a password."
        )
    if public and password is None:
        raise ConfigError(
            "Expected a password beside --public, got none. Set INVDIFF_UI_PASSWORD, which no list of processes shows."
        )


@contextmanager
def own_files() -> Iterator[Path]:
    """Keep the files of the page in a temporary folder, the only one that it serves, and gradio's settings to ours.

    Must be entered before gradio is first imported. Gradio's settings from the environment, which could open folders
    or ports, do not reach the page. At the end the folder is removed and the environment as it was.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="invdiff-ui-", ignore_cleanup_errors=True) as folder:
        for name in [name for name in before if name.startswith("GRADIO_")]:
            del os.environ[name]
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": folder}
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the block as Ctrl-C does when the process is told to end or its terminal closes, so that nothing is left.

    Signals that are ignored, as below nohup, stay ignored.
    """
    with ExitStack() as stack:
        for number in [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]:
            if signal.getsignal(number) == signal.SIG_DFL:
                stack.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        yield


def own_site_only(app: Any) -> Any:
    """ASGI middleware: status 403 for requests of other web sites and for routes that take in or fetch files.

    Browsers send requests of any site to any address with the visitor's cookies, and say who asks in headers that no
    site can change: `Origin` and `Sec-Fetch-Site`. Links from elsewhere to the page work.
    """
    refused = PlainTextResponse("This page does not answer that request.\n", 403)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        asked = scope.get("path", "").partition("/gradio_api/")[2].lower()
        is_request = scope["type"] in ("http", "websocket")
        closed = is_request and (asked.startswith(CLOSED) or not _is_own_site(Headers(scope=scope)))
        await (refused if closed else app)(scope, receive, send)

    return guarded


def _is_own_site(headers: Headers) -> bool:
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
        return False
    link = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return link or headers.get("sec-fetch-site", "none") in ("same-origin", "none")


def launch(
    page: Any, *, host: str, port: int | None, password: str | None, browser: bool, public: bool = False
) -> str:
    """Serve the `gr.Blocks` of `build_page` in the background, within `own_files`, and return its address.

    Visitors log in as "invdiff" with `password`, if there is one. Without a port, it is the first free one from 7860.
    `public` answers to any host name, not only to those of this machine; `check_address` says whether that may be.
    """
    from .page import looks

    name = f"[{host}]" if ":" in host else host
    names = ["*"] if public else [name, "localhost", LOOPBACK, "[::1]"]
    unproxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if unproxied.strip() != "*":  # gradio's requests to this page do not go to a proxy
        unproxied = ",".join(filter(None, [*unproxied.split(","), host, "localhost", LOOPBACK, "::1"]))
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = unproxied
    login = {} if password is None else {"auth": (USER, password), "auth_message": f"The user is “{USER}”."}
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(own_site_only)]
    page.queue(default_concurrency_limit=4, api_open=False)
    try:
        _, address, _ = page.launch(
            server_name=name,
            server_port=port,
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            app_kwargs={"middleware": middleware},
            enable_monitoring=False,
            ssr_mode=False,
            **login,
            **looks(),
        )
    except OSError as error:
        found = f"found {port} taken, or not allowed" if port else "found none from 7860 on"
        raise ConfigError(f"Expected a free port on {host}, {found}. Give another with --port.") from error
    return str(address).replace("[::]", "[::1]")  # no browser opens all addresses
