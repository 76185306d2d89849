"""Where the page listens, and whom it answers: asked over the network, and by another site."""

import contextlib
import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request

import pytest

from extras import own_files
from invdiff.app.page import build_page, open_studio, open_workspace
from invdiff.app.serve import check_address, launch
from invdiff.errors import ConfigError
from runs import make_audit

PASSWORD = "correct horse"


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as trial:
        trial.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_audit(folder / "audit")
    return folder


@contextlib.contextmanager
def served(*runs, host="127.0.0.1", **options):
    """The address of a page, and the folder of the files that it serves."""
    with own_files() as files:
        workspace = open_workspace(runs)
        page = build_page(workspace, open_studio(workspace))
        try:
            yield launch(page, host=host, port=None, browser=False, **{"password": None, **options}), files
        finally:
            page.close(verbose=False)


@pytest.fixture(scope="module")
def shown(folder):
    with served(folder) as page:
        yield page


@pytest.fixture(scope="module")
def locked(folder):
    """The address of a page with a password, which answers to every name."""
    with served(folder, password=PASSWORD, public=True) as (address, _):
        yield address


def ask(url, data=None, headers=None):
    asked = urllib.request.Request(url, data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def status(*asked, **headers):
    return ask(*asked, **headers)[0]


def log_in(address, password=PASSWORD, headers=None):
    form = urllib.parse.urlencode({"username": "invdiff", "password": password}).encode()
    code, _, answered = ask(f"{address}login", form, headers)
    return code, "; ".join(value.partition(";")[0] for value in answered.get_all("Set-Cookie", []))


def join(address, headers, cookie=""):
    body = json.dumps({"data": [], "fn_index": 0, "session_hash": "visitor"}).encode()
    sent = {"Content-Type": "application/json", "Cookie": cookie, **headers}
    return status(f"{address}gradio_api/queue/join", body, sent)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.3.2.1", "::1"])
def test_this_machine_alone_may_always_open_it(host):
    check_address(host, public=False, password=None)
    with pytest.raises(ConfigError, match="Expected a password beside --public"):  # a proxy may stand before it
        check_address(host, public=True, password=None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "both.example"])
def test_the_network_needs_a_wish_and_a_long_password(host, monkeypatch):
    if host == "both.example":  # a name is loopback only with all its addresses
        answers = [(0, 0, 0, "", (address, 0)) for address in ("127.0.0.1", "192.0.2.7")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answers)
    with pytest.raises(ConfigError, match="--public and a password"):
        check_address(host, public=False, password="long enough")
    with pytest.raises(ConfigError, match="Expected a password beside --public"):
        check_address(host, public=True, password=None)
    with pytest.raises(ConfigError, match="at least 8 characters, got 7"):
        check_address(host, public=True, password="1234567")
    check_address(host, public=True, password="long enough")


def test_what_cannot_be_listened_on_is_an_error(folder):
    with pytest.raises(ConfigError, match="Expected an address of this machine"):
        check_address("", public=False, password=None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        page, options = build_page(open_workspace([folder]), None), {"password": None, "browser": False}
        with own_files(), pytest.raises(ConfigError, match=f"free port on 127.0.0.1, found {port} taken"):
            launch(page, host="127.0.0.1", port=port, **options)


@needs_ipv6
@pytest.mark.parametrize(("host", "public"), [("::1", False), ("::", True)])
def test_it_listens_on_ipv6(host, public, folder):
    with served(folder, host=host, public=public, password=PASSWORD if public else None) as (address, _):
        assert address.startswith("http://[::1]:")
        assert status(address) == 200
        assert status(address, headers={"Host": "evil.example"}) == (200 if public else 400)


@pytest.mark.parametrize("given", ["intranet.example", "*"])
def test_the_environment_neither_opens_the_page_nor_leads_it_to_a_proxy(given, folder, monkeypatch, tmp_path):
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    proxies = {"NO_PROXY": given, "HTTP_PROXY": "http://127.0.0.1:9"}  # nothing listens
    for name, value in (proxies | {"GRADIO_ALLOWED_PATHS": str(tmp_path), "GRADIO_SHARE": "True"}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "secret.txt").write_text("secret")
    before = dict(os.environ)
    with served(folder) as (address, files):
        gradios = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
        assert gradios == {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(files)}
        assert status(address) == 200
        assert status(f"{address}gradio_api/file={tmp_path / 'secret.txt'}") == 403
        assert bool(urllib.request.proxy_bypass("hub.example")) is (given == "*")
        assert urllib.request.proxy_bypass("intranet.example")
    assert not files.exists()
    assert dict(os.environ) == before


@pytest.mark.parametrize("host", ["evil.example:7990", "localhost.evil.example", "10.0.0.1:7860"])
def test_it_answers_to_no_name_that_somebody_else_points_to_it(host, shown):
    own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert status(shown[0], headers=own) == 400
    assert join(shown[0], own) == 400


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
def test_it_answers_its_own_scripts_by_every_name_of_this_machine(name, shown):
    host = f"{name}:{urllib.parse.urlsplit(shown[0]).port}"
    assert join(shown[0], {"Host": host, "Origin": f"http://{host.lower()}", "Sec-Fetch-Site": "same-origin"}) == 200


SITES = ("https://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1:7860.evil.example")
FETCHES = (("cross-site", "no-cors", "image"), ("same-site", "cors", "empty"), ("cross-site", "navigate", "iframe"))


@pytest.mark.parametrize(
    "headers",
    [{"Origin": site} for site in SITES]
    + [dict(zip(("Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest"), fetch, strict=True)) for fetch in FETCHES],
)
def test_another_site_gets_nothing(headers, shown, locked):
    address, files = shown
    (files / "shown.txt").write_text("shown")
    assert join(address, headers) == 403
    for path in ("", "config", f"gradio_api/file={files / 'shown.txt'}"):
        assert status(f"{address}{path}", headers=headers) == 403
    # Nor by the cookie of a visitor, nor by logging in; behind a proxy the page has the name that visitors use.
    behind = {"Host": "pics.example", **headers}
    assert join(locked, behind, log_in(locked)[1]) == 403
    assert log_in(locked, headers=behind) == (403, "")


def test_others_may_link_to_it(shown):
    for site in ("cross-site", "same-site", "none"):
        link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        assert status(shown[0], headers=link) == 200


def test_a_password_is_asked_for(locked):
    own = {"Host": "pics.example", "Origin": "https://pics.example", "Sec-Fetch-Site": "same-origin"}
    assert status(f"{locked}config") == 401
    assert log_in(locked, "wrong horse")[0] == 400
    code, cookie = log_in(locked, headers=own)
    assert code == 200
    assert status(f"{locked}config", headers={"Cookie": cookie}) == 200
    assert join(locked, own, cookie) == 200
    assert join(locked, own) == 401


def test_files_are_served_of_its_own_folder_only(shown, folder, monkeypatch, tmp_path):
    address, files = shown
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    (files / "shown.txt").write_text("shown")
    assert ask(f"{address}gradio_api/file={files / 'shown.txt'}")[:2] == (200, b"shown")
    own = [tmp_path / "secret.txt", folder / "audit" / "audit.json", files, f"{files}/../secret.txt"]
    for path in (*own, "/etc/passwd", "secret.txt", f"{files}/../../etc/passwd"):
        for form in (str(path), urllib.parse.quote(str(path), safe="")):
            assert status(f"{address}gradio_api/file={form}") in (403, 404), path


def test_it_takes_nothing_in_and_fetches_nothing_for_a_visitor(shown):
    address, files = shown
    for url in ("http://192.0.2.1/x", "HTTPS://example.com/"):
        for form in (url, urllib.parse.quote(url, safe="")):
            assert status(f"{address}gradio_api/file={form}") == 403
            assert status(f"{address}gradio_api/proxy={form}") in (400, 403, 404)
    before = set(files.rglob("*"))
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n0\r\n--x--'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for path in ("upload", "upload?upload_id=x", "upload/", "//upload", "process_recording", "component_server"):
        assert status(f"{address}gradio_api/{path}", body, headers) in (403, 404), path
    assert set(files.rglob("*")) == before
    info = json.loads(ask(f"{address}gradio_api/info")[1])
    assert info["named_endpoints"] == info["unnamed_endpoints"] == {}  # no call has a name
