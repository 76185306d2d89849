"""Where the page listens, and whom it lets in: asked over the network, by another site, and in a browser."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from browser import needs_browser, open_browser
from invdiff.app.serve import check_address, free_port, is_loopback, own_files
from invdiff.app.workspace import open_workspace
from invdiff.errors import ConfigError
from test_pictures import make_audit

with own_files():
    gr = pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")
    from invdiff.app.page import build_page
    from invdiff.app.serve import launch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gradio's own imports and servers

PASSWORD = "correct horse"
FOREIGN = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as trial:
        trial.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an audit and nothing else; read only."""
    folder = tmp_path_factory.mktemp("run")
    make_audit(folder / "audit")
    return folder


@contextlib.contextmanager
def served(
    run: Path, *, host: str = "127.0.0.1", password: str | None = None, public: bool = False
) -> Iterator[tuple[str, Path]]:
    """A page that listens, and the folder of what it shows."""
    with own_files() as files:
        page = build_page(open_workspace([run]), None)
        port = free_port(host, 0)
        try:
            address = launch(page, host=host, port=port, password=password, browser=False, public=public)
            yield address, files
        finally:
            page.close(verbose=False)


@pytest.fixture(scope="module")
def shown(folder: Path) -> Iterator[tuple[str, Path]]:
    """A page for this machine alone."""
    with served(folder) as page:
        yield page


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[str]:
    """The address of a page with a password, which others reach."""
    with served(folder, password=PASSWORD, public=True) as (address, _):
        yield address


def ask(
    url: str, *, data: bytes | None = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, bytes, Any]:
    """Status, body and headers of an answer."""
    asked = urllib.request.Request(url, data=data, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return int(answer.status), bytes(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, bytes(error.read()), error.headers


def status(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> int:
    return ask(url, data=data, headers=headers)[0]


def log_in(address: str, password: str = PASSWORD, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Status, and the cookie of a visitor."""
    form = urllib.parse.urlencode({"username": "invdiff", "password": password}).encode()
    code, _, answered = ask(f"{address}login", data=form, headers=headers)
    return code, "; ".join(value.partition(";")[0] for value in answered.get_all("Set-Cookie", []))


def first_event(address: str, cookie: str = "") -> int:
    """The number of an event that takes no inputs: what the page shows first."""
    config = json.loads(ask(f"{address}config", headers={"Cookie": cookie})[1])
    return next(
        int(event["id"])
        for event in config["dependencies"]
        if event["backend_fn"] and not event["inputs"] and ["load"] in [target[1:] for target in event["targets"]]
    )


def join(address: str, number: int, headers: dict[str, str]) -> tuple[int, bytes]:
    """Try to call what stands behind the page, by its number."""
    body = json.dumps({"data": [], "fn_index": number, "session_hash": "visitor"}).encode()
    return ask(f"{address}gradio_api/queue/join", data=body, headers={"Content-Type": "application/json", **headers})[
        :2
    ]


# Where it listens.


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.3.2.1", "::1"])
def test_this_machine_alone_may_always_open_it(host: str) -> None:
    check_address(host, public=False, password=None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7", "10.0.0.1"])
def test_the_network_needs_a_wish_and_a_password(host: str) -> None:
    with pytest.raises(ConfigError, match="--public and a password"):
        check_address(host, public=False, password="long enough")
    with pytest.raises(ConfigError, match="Expected a password beside --public"):
        check_address(host, public=True, password=None)
    check_address(host, public=True, password="long enough")


def test_a_page_behind_a_server_on_this_machine_needs_a_password() -> None:
    with pytest.raises(ConfigError, match="Expected a password beside --public"):
        check_address("127.0.0.1", public=True, password=None)
    check_address("127.0.0.1", public=True, password="long enough")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_short_password_is_refused_everywhere(host: str) -> None:
    with pytest.raises(ConfigError, match="at least 8 characters, got 7"):
        check_address(host, public=True, password="1234567")


def test_an_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="Expected a name or an address of this machine"):
        is_loopback("no.such.host")


def test_a_name_that_is_also_public_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(0, 0, 0, "", ("127.0.0.1", 0)), (0, 0, 0, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answers)
    assert not is_loopback("both.example")


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_a_port_that_is_taken_is_an_error_and_another_is_found(host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # gradio wants it for ::1 too
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of {host}.*--port"):
            free_port(host, port)
        assert free_port(host, 0) not in (0, port)


@needs_ipv6
@pytest.mark.parametrize(("host", "public"), [("::1", False), ("::", True)])
def test_it_listens_on_ipv6(host: str, public: bool, folder: Path) -> None:
    with served(folder, host=host, public=public, password=PASSWORD if public else None) as (address, _):
        assert address.startswith("http://[::1]:")
        assert status(address) == 200
        assert status(address, headers={"Host": "evil.example"}) == (200 if public else 403)


def test_settings_of_gradio_in_the_environment_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    before = dict(os.environ)
    with own_files() as files:
        assert {name for name in os.environ if name.startswith("GRADIO_")} == {
            "GRADIO_ANALYTICS_ENABLED",
            "GRADIO_TEMP_DIR",
        }
        assert os.environ["GRADIO_TEMP_DIR"] == str(files)
        (files / "kept").mkdir()
    assert not files.exists()
    assert dict(os.environ) == before


@pytest.mark.parametrize("given", ["", "intranet.example", "*"])
def test_a_proxy_is_not_asked_for_the_page_and_still_for_the_rest(
    given: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{nobody.getsockname()[1]}"  # nothing listens
        monkeypatch.setenv("HTTP_PROXY", proxy)
        if given:
            monkeypatch.setenv("NO_PROXY", given)
        before = dict(os.environ)
        with served(folder) as (address, _):
            assert status(address) == 200
            assert urllib.request.getproxies()["http"] == proxy
            assert ("*" in os.environ["NO_PROXY"].split(",")) is (given == "*")
            assert bool(urllib.request.proxy_bypass("hub.example")) is (given == "*")
            assert urllib.request.proxy_bypass("intranet.example") or not given
        assert dict(os.environ) == before


def test_a_gradio_that_takes_no_guard_serves_no_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = gr.Blocks.launch
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, *, app_kwargs, **options: start(page, **options))
    with own_files():
        page = build_page(open_workspace([folder]), None)
        port = free_port("127.0.0.1", 0)
        with pytest.raises(ConfigError, match="lets other sites be kept out"):
            launch(page, host="127.0.0.1", port=port, password=None, browser=False)
        assert not page.is_running
        assert free_port("127.0.0.1", port) == port


# Whom it lets in.


def test_files_are_served_of_its_own_folder_only(
    shown: tuple[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, files = shown
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    (files / "shown.txt").write_text("shown")
    assert ask(f"{address}gradio_api/file={files / 'shown.txt'}")[:2] == (200, b"shown")
    assert status(f"{address}gradio_api/file={files / 'shown.txt'}", headers=FOREIGN) == 403
    refused = [
        tmp_path / "secret.txt",
        folder / "audit" / "audit.json",
        Path("/etc/passwd"),
        Path("secret.txt"),
        files,
        files / ".." / "secret.txt",
        Path(f"{files}/../../etc/passwd"),
    ]
    for path in refused:
        for form in (str(path), urllib.parse.quote(str(path), safe="")):
            assert status(f"{address}gradio_api/file={form}") in (403, 404), path


def test_folders_opened_by_the_environment_stay_shut(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", str(tmp_path))
    (tmp_path / "secret.txt").write_text("secret")
    with served(folder) as (address, _):
        assert status(f"{address}gradio_api/file={tmp_path / 'secret.txt'}") == 403


def test_it_fetches_nothing_for_a_visitor(shown: tuple[str, Path]) -> None:
    for url in ("http://192.0.2.1/x", "https://example.com/", "HTTP://example.com/"):
        for form in (url, urllib.parse.quote(url, safe="")):
            assert status(f"{shown[0]}gradio_api/file={form}") == 404


def test_another_site_cannot_call_what_the_page_can(shown: tuple[str, Path]) -> None:
    address, _ = shown
    number = first_event(address)
    own = {"Origin": address.rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    code, body = join(address, number, own)
    assert code == 200
    assert "event_id" in json.loads(body)
    sentence = b"This page takes no requests from other sites.\n"
    for headers in (FOREIGN, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert join(address, number, headers) == (403, sentence)
    rebound = {"Host": "evil.example:7990", "Origin": "http://evil.example:7990", "Sec-Fetch-Site": "same-origin"}
    assert join(address, number, rebound)[0] == 403
    assert status(address, headers={"Host": "evil.example:7990"}) == 403


def test_no_call_has_a_name(shown: tuple[str, Path]) -> None:
    address, _ = shown
    info = json.loads(ask(f"{address}gradio_api/info")[1])
    assert info["named_endpoints"] == info["unnamed_endpoints"] == {}
    config = json.loads(ask(f"{address}config")[1])
    names = {event["api_name"] for event in config["dependencies"] if event["api_name"]} | {"predict"}
    for name in names:
        for way in ("call", "call/v2", "run", "api"):
            body = json.dumps({"data": [], "fn_index": first_event(address)}).encode()
            headers = {"Content-Type": "application/json"}
            assert status(f"{address}gradio_api/{way}/{name}", body, headers) == 404


def test_nothing_is_taken_in(shown: tuple[str, Path]) -> None:
    address, files = shown
    before = set(files.rglob("*"))
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n0\r\n--x--'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for path in ("upload", "upload?upload_id=x", "upload/", "process_recording", "component_server"):
        assert status(f"{address}gradio_api/{path}", body, headers) == 404
    assert status(f"{address}gradio_api/upload_progress?upload_id=x") == 404
    assert status(f"{address}root/gradio_api/upload", body, headers) == 404
    assert set(files.rglob("*")) == before


def test_a_password_is_asked_for(locked: str) -> None:
    assert status(f"{locked}config") == 401
    assert status(f"{locked}gradio_api/info") == 401
    assert log_in(locked, "wrong horse")[0] == 400
    code, cookie = log_in(locked)
    assert code == 200
    assert status(f"{locked}config", headers={"Cookie": cookie}) == 200


def test_another_site_cannot_act_for_who_has_logged_in(locked: str) -> None:
    cookie = log_in(locked)[1]
    number = first_event(locked, cookie)
    behind = {"Host": "pics.example", "Origin": "https://pics.example", "Sec-Fetch-Site": "same-origin"}
    assert join(locked, number, behind)[0] == 401
    assert join(locked, number, {**behind, "Cookie": cookie})[0] == 200
    assert join(locked, number, {**behind, **FOREIGN, "Cookie": cookie})[0] == 403
    assert join(locked, number, {"Host": "pics.example", "Origin": FOREIGN["Origin"], "Cookie": cookie})[0] == 403
    assert log_in(locked, headers={"Host": "pics.example", **FOREIGN}) == (403, "")


def test_no_other_origin_is_allowed_by_cors(locked: str) -> None:
    cookie = log_in(locked)[1]
    asking = {"Host": "pics.example", "Access-Control-Request-Method": "POST", **FOREIGN}
    code, _, headers = ask(f"{locked}gradio_api/queue/join", headers=asking, method="OPTIONS")
    assert code == 403
    assert headers["Access-Control-Allow-Origin"] is None
    _, _, headers = ask(f"{locked}config", headers={"Host": "pics.example", "Cookie": cookie, **FOREIGN})
    assert headers["Access-Control-Allow-Origin"] is None


def test_guesses_of_the_password_are_few_and_hold_up_nobody(locked: str) -> None:
    begun = time.monotonic()
    with ThreadPoolExecutor(5) as visitors:
        guesses = [visitors.submit(log_in, locked, f"wrong {number}") for number in range(5)]
        time.sleep(0.1)
        asked = time.monotonic()
        assert status(locked) == 200
        assert time.monotonic() - asked < 1.5
        assert [guess.result()[0] for guess in guesses] == [400] * 5
    assert time.monotonic() - begun >= 1.9


@needs_browser
def test_another_site_in_the_same_browser_is_kept_out(shown: tuple[str, Path], tmp_path: Path) -> None:
    address, files = shown
    (files / "shown.txt").write_text("shown")
    routes = {
        "call": "gradio_api/queue/join",
        "file": f"gradio_api/file={files / 'shown.txt'}",
        "frame": "?frame",
        "form": "gradio_api/cancel",
    }
    urls = {name: f"{address}{path}" for name, path in routes.items()}
    (tmp_path / "index.html").write_text(
        f"""<iframe src="{urls["frame"]}"></iframe><img src="{urls["file"]}"><a href="{address}">link</a>
        <iframe name="form"></iframe><form method="post" target="form" action="{urls["form"]}"></form>
        <script>document.forms[0].submit();
        fetch("{urls["call"]}", {{method: "POST", mode: "no-cors", credentials: "include", body: "{{}}"}})</script>"""
    )

    class Site(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(tmp_path))

        def log_message(self, *given: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as evil, open_browser() as browser:
        threading.Thread(target=evil.serve_forever, daemon=True).start()
        view = browser.new_page()
        answers: dict[str, int] = {}
        view.on("response", lambda answer: answers.update({answer.url: answer.status}))
        for site in ("127.0.0.1", "localhost"):
            answers.clear()
            view.goto(f"http://{site}:{evil.server_port}/", wait_until="networkidle")
            assert {name: answers.get(url) for name, url in urls.items()} == dict.fromkeys(urls, 403), site
        view.click("text=link")
        view.wait_for_selector("footer")
        assert view.url == address
        evil.shutdown()
