"""The page in a real browser: drawn with, dragged, typed into and looked at."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import LAYOUT, needs_browser, open_browser
from invdiff.app.serve import free_port, launch, own_files
from invdiff.app.workspace import open_workspace
from invdiff.auditing.edits import CURATION
from runs import NASTY, SCRIPT, make_audit, make_images, measured

pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")

pytestmark = [needs_browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FILE_NAMES = ('"><img src=x onerror=alert(1)>', "<b onmouseover=alert(1)>", "'{{7*7}}${alert(1)}", "\u202egnp")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """The page of the bundled demo, as `invdiff ui` serves it."""
    with pytest.MonkeyPatch.context() as patch, own_files():
        from invdiff.app.page import build_page
        from invdiff.app.studio import open_studio

        patch.setenv("INVDIFF_CACHE", str(home))
        workspace = open_workspace()
        page = build_page(workspace, open_studio(workspace))
        yield launch(page, host="127.0.0.1", port=free_port(0), password=None, browser=False)
        page.close(verbose=False)


class Visit:
    """A browser's page, and everything that it asked for and complained of."""

    def __init__(self, browser: Any, address: str, *, width: int = 1280) -> None:
        self.view = browser.new_page(viewport={"width": width, "height": 900})
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.view.on("request", lambda sent: self.asked.append(sent.url))
        self.view.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.view.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.address = address
        self.view.goto(address)
        self.view.wait_for_selector("#draw, .notice")

    def open_more(self) -> None:
        self.view.get_by_role("button", name="Images, seed and steps").click()
        self.view.wait_for_selector("#seed input")

    def tab(self, name: str) -> None:
        self.view.get_by_role("tab", name=name).click()

    def draw(self) -> None:
        self.view.click("#draw")
        self.settle()

    def settle(self) -> None:
        """Wait until everything that was asked for is drawn: nothing changes for a second."""
        before, same, deadline = None, 0, time.monotonic() + 60
        while same < 5:
            assert time.monotonic() < deadline, before
            self.view.wait_for_timeout(250)
            now = self.view.evaluate(
                "[document.querySelector('#status').innerText, "
                "...[...document.querySelectorAll('#base img, #guided img')].map(image => image.src)]"
            )
            same = same + 1 if now == before and now[0].startswith("12 of 12") and len(now) == 25 else 0
            before = now

    def images(self, gallery: str) -> list[str]:
        """Digests of the images in a gallery."""
        bodies = self.view.evaluate(
            """async name => Promise.all([...document.querySelectorAll(`#${name} img`)].map(async image =>
                [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]))""",
            gallery,
        )
        return [hashlib.sha256(bytes(body)).hexdigest() for body in bodies]

    def slider(self, name: str) -> Any:
        return self.view.locator(f"#{name} input[type=range]")

    def key(self, name: str, *keys: str) -> None:
        self.slider(name).focus()
        for key in keys:
            self.view.keyboard.press(key)

    def counts(self) -> dict[str, list[str]]:
        """Class to what is counted in base and guided images."""
        rows = self.view.evaluate(
            """() => [...document.querySelectorAll('#shares .class')].map(row =>
                [row.querySelector('p').innerText, [...row.querySelectorAll('.figure')].map(f => f.innerText)])"""
        )
        return dict(rows)


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    visit = Visit(browser, address)
    yield visit
    visit.view.close()
    assert visit.complaints == []
    elsewhere = [url for url in visit.asked if not url.startswith((address, "data:", "blob:"))]
    assert elsewhere == []


def test_guided_images_stand_beside_base_images_within_ten_seconds(visit: Visit) -> None:
    start = time.perf_counter()
    visit.view.click("#draw")
    visit.view.wait_for_selector("#guided img")
    assert time.perf_counter() - start < 10
    visit.settle()
    assert visit.images("base") != visit.images("guided")
    counts = visit.counts()
    assert counts["water"][0] == "12 of 12"
    assert 1 <= int(counts["water"][1].split()[0]) <= 11
    assert counts["waterbird"] == ["12 of 12", "12 of 12"]


def test_scale_0_draws_the_base_model_and_keys_and_mouse_move_it(visit: Visit) -> None:
    visit.draw()
    at_one = visit.images("guided")
    visit.key("scale", "Home")
    visit.settle()
    assert visit.images("guided") == visit.images("base")
    visit.key("scale", *["ArrowRight"] * 20)  # 20 steps of 0.05
    visit.settle()
    assert visit.slider("scale").input_value() == "1"
    assert visit.images("guided") == at_one
    box = visit.slider("scale").bounding_box()
    visit.view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    visit.view.mouse.down()
    visit.view.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2, steps=5)
    visit.view.mouse.up()
    assert float(visit.slider("scale").input_value()) < 0.1
    visit.settle()
    visit.key("scale", "Home")
    visit.settle()
    assert visit.images("guided") == visit.images("base")


def test_the_mix_decides_which_groups_are_drawn(visit: Visit) -> None:
    visit.draw()
    visit.key("mix-0-0", "Home")
    visit.settle()
    one = int(visit.counts()["water"][1].split()[0])
    visit.key("mix-0-0", "End")
    visit.key("mix-0-1", "Home")
    visit.settle()
    other = int(visit.counts()["water"][1].split()[0])
    assert min(one, other) <= 1
    assert max(one, other) >= 11
    assert visit.view.inner_text("#mix").replace("\n", " ").startswith("group 0 100% group 1 0%")
    visit.key("mix-0-0", "Home")
    visit.view.wait_for_selector("#status [role=alert]")
    assert "a share above 0" in visit.view.inner_text("#status")


def test_nothing_moves_where_it_should_not(visit: Visit) -> None:
    visit.draw()
    before = visit.images("guided")
    visit.view.locator("#live input").uncheck()
    visit.key("scale", "Home")
    visit.view.wait_for_timeout(1500)
    assert visit.images("guided") == before
    visit.draw()
    assert visit.images("guided") == visit.images("base")


def test_stop_ends_a_long_run_and_the_next_one_starts(visit: Visit) -> None:
    visit.open_more()
    visit.key("images", "End")
    visit.view.locator("#steps input[type=number]").fill("50")
    visit.view.click("#draw")
    visit.view.wait_for_selector("#base img")
    start = time.perf_counter()
    visit.view.click("#stop")
    visit.view.wait_for_function("document.querySelector('#status').innerText.startsWith('Stopped')")
    assert time.perf_counter() - start < 5
    visit.view.wait_for_timeout(1500)
    assert "Stopped" in visit.view.inner_text("#status")
    assert visit.view.locator("#guided img").count() < 64
    visit.view.locator("#images input[type=number]").fill("12")
    visit.view.locator("#steps input[type=number]").fill("5")
    visit.draw()


def test_a_bad_number_is_told_and_nothing_breaks(visit: Visit) -> None:
    visit.open_more()
    visit.view.locator("#seed input").fill("")
    visit.view.click("#draw")
    visit.view.wait_for_selector("#status [role=alert], .toast-body, #base img")
    assert visit.view.locator("#status [role=alert], .toast-body").count() or visit.images("base")
    visit.view.locator("#seed input").fill("7")
    visit.draw()


def test_groups_are_browsed_parted_named_and_images_left_out(visit: Visit, home: Path) -> None:
    view = visit.view
    visit.tab("Audit")
    view.wait_for_selector("#typical-0 img")
    assert "76 images" in view.inner_text("#group-0")
    view.click("#audit-prompt input")
    view.get_by_role("option", name="landbird").click()
    view.wait_for_function("!document.querySelector('#group-0').innerText.includes('76 images')")
    view.click("#audit-prompt input")
    view.get_by_role("option", name="waterbird").click()
    view.wait_for_function("document.querySelector('#group-0').innerText.includes('76 images')")

    # The score at which groups part moves images.
    visit.key("audit-cut-0", "PageUp", "PageUp", "PageUp")
    view.wait_for_function("document.querySelector('#audit-moved').innerText.includes('Would move')")
    assert view.locator("#nearest-1 .caption-label", has_text="moved").count() > 0
    view.click("#audit-keep")
    view.wait_for_function("document.querySelector('#audit-status').innerText.includes('parted by hand')")
    assert "76 images" not in view.inner_text("#group-0")
    view.click("#audit-reset")
    view.wait_for_function("document.querySelector('#group-0').innerText.includes('76 images')")

    # Names persist, here and in the mix sliders, and after the page is opened anew.
    view.locator("#group-name-0 input, #group-name-0 textarea").fill("on land")
    view.click("#group-save-0")
    view.wait_for_function("document.querySelector('#group-0').innerText.includes('on land')")
    view.reload()
    view.wait_for_selector("#draw")
    visit.tab("Audit")
    view.wait_for_function("document.querySelector('#group-0').innerText.includes('on land')")
    assert view.locator("#group-name-0 input, #group-name-0 textarea").input_value() == "on land"
    view.locator("#group-name-1 input, #group-name-1 textarea").fill("on water")
    view.locator("#group-name-1 input, #group-name-1 textarea").press("Enter")
    view.wait_for_function("document.querySelector('#group-1').innerText.includes('on water')")
    visit.tab("Generate")
    assert "on water" in view.inner_text("#mix-0-1")
    assert "on land 50% on water 50%" in view.inner_text("#mix").replace("\n", " ")
    view.reload()
    view.wait_for_selector("#mix-0-0")
    view.wait_for_function("document.querySelector('#mix-0-0').innerText.includes('on land')")
    assert "on land 50% on water 50%" in view.inner_text("#mix").replace("\n", " ")
    (saved,) = home.glob(f"birds-demo-*/audit/{CURATION}")
    assert json.loads(saved.read_text())["names"] == [["on land", "on water"]]

    # An image is chosen by a click, left out, and put back.
    visit.tab("Audit")
    view.locator("#typical-0 button").first.click()
    view.wait_for_selector("#audit-chosen img")
    assert "images/" in view.inner_text("#audit-chosen")
    view.click("#audit-leave")
    view.wait_for_function("document.querySelector('#group-0').innerText.includes('75 images')")
    assert len(json.loads(saved.read_text())["left_out"]) == 1
    view.click("#audit-back")
    view.wait_for_function("document.querySelector('#group-0').innerText.includes('76 images')")
    assert json.loads(saved.read_text())["left_out"] == []
    for group in (0, 1):
        view.locator(f"#group-name-{group} input, #group-name-{group} textarea").fill("")
        view.click(f"#group-save-{group}")
    view.wait_for_function("document.querySelector('#group-1').innerText.includes('group 1')")
    view.wait_for_timeout(300)
    assert not saved.exists()


@pytest.mark.parametrize("width", [1280, 390])
def test_everything_fits_and_no_image_is_broken(browser: Any, address: str, width: int, home: Path) -> None:
    visit = Visit(browser, address, width=width)
    view = visit.view
    visit.draw()
    view.screenshot(path=home / f"generate-{width}.png", full_page=True)
    assert view.evaluate(LAYOUT) == {"broken": 0, "width": width, "outside": []}
    visit.tab("Audit")
    view.wait_for_selector("#typical-1 img")
    view.wait_for_timeout(800)
    view.screenshot(path=home / f"audit-{width}.png", full_page=True)
    assert view.evaluate(LAYOUT) == {"broken": 0, "width": width, "outside": []}
    visit.tab("Compare")
    view.wait_for_selector("#compare table")
    view.wait_for_timeout(800)
    view.screenshot(path=home / f"compare-{width}.png", full_page=True)
    assert view.evaluate(LAYOUT) == {"broken": 0, "width": width, "outside": []}
    view.close()
    assert visit.complaints == []


def test_hostile_text_is_text(browser: Any, tmp_path: Path) -> None:
    prompts = tuple(text for text in NASTY if text.strip())[:6]
    make_audit(tmp_path / "run" / "audit", prompts=prompts)
    file = tmp_path / "run" / "audit" / "audit.json"
    document = json.loads(file.read_text())
    document["prompts"] = [prompt | {"evidence": SCRIPT, "reason": SCRIPT} for prompt in document["prompts"]]
    document["prompts"][0]["found"] = False
    rows = []
    for place, name in enumerate(document["names"]):  # files that are called so, with captions like that
        hostile = f"{place}{FILE_NAMES[place % len(FILE_NAMES)]}.png"
        (tmp_path / "run" / "data").mkdir(exist_ok=True)
        (tmp_path / "run" / "audit" / name).rename(tmp_path / "run" / "data" / hostile)
        document["names"][place] = hostile
        rows.append(json.dumps({"file_name": hostile, "text": NASTY[place % 7]}))
    (tmp_path / "run" / "data" / "metadata.jsonl").write_text("\n".join(rows))
    file.write_text(json.dumps(document))
    shares = {text.encode("utf-8", "replace").decode(): 5 for text in prompts}
    folder = make_images(tmp_path / "run" / "base", shares, classes=(NASTY[1], NASTY[5]))
    measured({"base": [folder]}).save(tmp_path / "run" / "results.json")
    with own_files():
        from invdiff.app.page import build_page

        page = build_page(open_workspace([tmp_path / "run"]), None)
        address = launch(page, host="127.0.0.1", port=free_port(0), password=None, browser=False)
        visit = Visit(browser, address)
        view = visit.view
        visit.tab("Audit")
        view.wait_for_selector("#group-0 h3")
        view.locator("#group-name-0 input, #group-name-0 textarea").fill("<img src=x onerror=alert(1)>\u202e\"'")
        view.click("#group-save-0")
        view.wait_for_function("document.querySelector('#group-0').innerText.includes('<img src=x')")
        view.wait_for_selector("#typical-0 img")
        for place in range(len(FILE_NAMES)):
            view.locator("#typical-0 button").nth(place).click()
            view.wait_for_timeout(300)
        assert any(name[:12] in view.inner_text("#audit-chosen") for name in FILE_NAMES)
        view.click("#audit-leave")
        view.wait_for_function("document.querySelector('#audit-status').innerText.includes('counts nowhere now')")
        assert view.evaluate(LAYOUT)["broken"] == 0
        visit.tab("Compare")
        view.wait_for_selector("#compare table")
        view.wait_for_timeout(500)
        assert view.locator("img[src=x], img[onerror]").count() == 0
        assert "\u202e" not in view.inner_text("body")
        assert view.evaluate(LAYOUT)["width"] == 1280
        view.close()
        page.close(verbose=False)
    assert visit.complaints == []
    assert [url for url in visit.asked if not url.startswith((address, "data:", "blob:"))] == []
