"""Open the page to a browser: on this machine alone, unless somebody says otherwise and sets a password."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
import webbrowser
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .guard import Guard

LOOPBACK = "127.0.0.1"
PORT = 7860
SHORTEST_PASSWORD = 8
USER = "invdiff"


def check_address(host: str, *, public: bool, password: str | None) -> None:
    """Raise `ConfigError` unless the page may listen on `host`.

    A loopback address may always be listened on. Any other one shows the page, the model and the data to the network,
    and so may a server before the page: that takes both an explicit wish and a password.

    Args:
        host: A name or an address of this machine.
        public: Whether the user asked for it in so many words.
        password: What visitors are asked for.

    Raises:
        ConfigError: The address is not known here, is public without the wish, or the password is short or missing.
    """
    if password is not None and len(password) < SHORTEST_PASSWORD:
        raise ConfigError(
            f"Expected a password of at least {SHORTEST_PASSWORD} characters, got {len(password)}. Take a longer one."
        )
    loopback = is_loopback(host)
    if not loopback and not public:
        raise ConfigError(
            f"Expected an address of this machine alone, such as {LOOPBACK}, got {host}, which the network can reach. "
            "Whoever opens the page sees the data and uses the model; if that is what you want, add --public and a "
            "password."
        )
    if public and password is None:
        raise ConfigError(
            "Expected a password beside --public, got none: whoever reaches the page could use it. Set "
            "INVDIFF_UI_PASSWORD, which no list of processes shows."
        )


def is_loopback(host: str) -> bool:
    """Whether all addresses that a name stands for belong to this machine alone.

    Raises:
        ConfigError: The name is not known here.
    """
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host or "0.0.0.0", None)}  # noqa: S104
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"Expected a name or an address of this machine, such as {LOOPBACK}, got {host!r} ({error})."
        ) from error
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def free_port(host: str, port: int | None) -> int:
    """Return `port`, or where none is asked for the first free one from `PORT` on.

    Raises:
        ConfigError: The port is taken, or all of a hundred are.
    """
    wanted = [port] if port is not None else list(range(PORT, PORT + 100))
    reason = ""
    for number in wanted:
        try:
            free = _bind(host, number)
            _bind(LOOPBACK, free)  # gradio insists on this one too, whatever the host
        except OSError as error:
            reason = error.strerror or str(error)
            continue
        return free
    asked = f"port {port}" if port is not None else f"a port from {PORT} to {PORT + 99}"
    raise ConfigError(f"Could not listen on {asked} of {host}: {reason}. Choose another with --port.")


def _bind(host: str, port: int) -> int:
    """Listen on a port for a moment and return it; for 0 the one that was chosen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind((host, port))
        return int(trial.getsockname()[1])


@contextmanager
def own_files() -> Iterator[Path]:
    """Keep what the page shows in a folder of its own, the only one that it serves, and remove it at the end.

    Must be entered before gradio is first imported. Gradio's settings from the environment, which could open folders
    or ports, do not reach the page.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith("GRADIO_"):
            del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="invdiff-ui-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": folder}
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(before)


def launch(page: Any, *, host: str, port: int, password: str | None, browser: bool, public: bool = False) -> str:
    """Serve a page in the background, behind a `Guard`, and return its address.

    Must be called within `own_files`, which undoes what is changed in the environment.

    Args:
        page: What `build_page` returned.
        host: See `check_address`, which must have been called.
        port: From `free_port`.
        password: What visitors are asked for, beside the user name "invdiff"; None for nothing.
        browser: Open a browser.
        public: Whether visitors may use other names than those of this machine.

    Raises:
        ConfigError: This version of gradio cannot be guarded.
    """
    from .page import looks

    @asynccontextmanager
    async def guarded(app: Any) -> AsyncIterator[None]:
        # Given to gradio as middleware, the guard would come after what answers other sites.
        app.middleware_stack = Guard(app.middleware_stack, host=None if public else host)
        yield

    _reach_without_proxy(host)
    page.queue(default_concurrency_limit=4, api_open=False)
    app, address, _ = page.launch(
        server_name=f"[{host}]" if ":" in host else host or "0.0.0.0",  # noqa: S104
        server_port=port,
        share=False,
        inbrowser=False,
        auth=(USER, password) if password is not None else None,
        auth_message="The user is “invdiff”." if password is not None else None,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        app_kwargs={"lifespan": guarded},
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        **looks(),
    )
    if not isinstance(app.middleware_stack, Guard):
        page.close(verbose=False)
        raise ConfigError(
            "Expected a gradio that lets other sites be kept out, found one that does not. Install another version."
        )
    address = str(address).replace("[::]", "[::1]")  # all addresses are none that a browser opens
    if browser:
        webbrowser.open(address)
    return address


def _reach_without_proxy(host: str) -> None:
    """Keep what this process asks of its own page from a proxy that the environment names for everything else."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [*given.split(","), host, "localhost", LOOPBACK, "::1"]
    if given.strip() != "*":
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, dict.fromkeys(names)))
