"""Open the page to a browser: on this machine alone, unless somebody says otherwise and sets a password."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError

LOOPBACK = "127.0.0.1"
PORT = 7860
SHORTEST_PASSWORD = 8
USER = "invdiff"


def check_address(host: str, *, public: bool, password: str | None) -> None:
    """Raise `ConfigError` unless the page may listen on `host`.

    A loopback address may always be listened on. Any other one shows the page, the model and the data to the network:
    that takes both an explicit wish and a password.

    Args:
        host: A name or an address of this machine.
        public: Whether the user asked for it in so many words.
        password: What visitors are asked for.

    Raises:
        ConfigError: The address is not known here, or is public without the wish or the password.
    """
    if password is not None and len(password) < SHORTEST_PASSWORD:
        raise ConfigError(
            f"Expected a password of at least {SHORTEST_PASSWORD} characters, got {len(password)}. Take a longer one."
        )
    if is_loopback(host):
        return
    if not public:
        raise ConfigError(
            f"Expected an address of this machine alone, such as {LOOPBACK}, got {host}, which the network can reach. "
            "Whoever opens the page sees the data and uses the model; if that is what you want, add --public and a "
            "password."
        )
    if password is None:
        raise ConfigError(
            f"Expected a password beside --public, got none: {host} can be reached from the network. Set "
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
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((host, number))
            except OSError as error:
                reason = error.strerror or str(error)
                continue
            return int(trial.getsockname()[1])
    asked = f"port {port}" if port is not None else f"a port from {PORT} to {PORT + 99}"
    raise ConfigError(f"Could not listen on {asked} of {host}: {reason}. Choose another with --port.")


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


def launch(page: Any, *, host: str, port: int, password: str | None, browser: bool) -> str:
    """Serve a page in the background and return its address.

    Args:
        page: What `build_page` returned.
        host: See `check_address`, which must have been called.
        port: From `free_port`.
        password: What visitors are asked for, beside the user name "invdiff"; None for nothing.
        browser: Open a browser.
    """
    from .page import looks

    page.queue(default_concurrency_limit=4, api_open=False)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=browser,
        auth=(USER, password) if password is not None else None,
        auth_message="The user is “invdiff”." if password is not None else None,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size="1kb",  # nothing is ever uploaded
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        **looks(),
    )
    return str(address)
