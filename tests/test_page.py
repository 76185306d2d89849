"""The page in a real browser: drawn with, dragged, typed into and looked at."""

import json
import time

import pytest

from browser import LAYOUT, needs_browser, open_browser
from invdiff import Audit
from invdiff.assets import BIRDS_DEMO
from invdiff.data.birds import canonical_prompts
from test_serve import served

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def address(home):
    """The page of the bundled demo, as `invdiff ui` serves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVDIFF_CACHE", str(home))
        with served() as (address, _):
            yield address


class Visit:
    """A browser's page, which must neither complain nor ask elsewhere for anything."""

    def __init__(self, browser, address, *, width=1280):
        self.view = browser.new_page(viewport={"width": width, "height": 900})
        self.asked, self.complaints = [], []
        self.view.on("request", lambda sent: self.asked.append(sent.url))
        self.view.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.view.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.address = address
        self.view.goto(address)
        self.view.wait_for_selector("#draw, .notice")

    def close(self):
        self.view.close()
        assert self.complaints == []
        assert [url for url in self.asked if not url.startswith((self.address, "data:", "blob:"))] == []

    def tab(self, name, shows):
        self.view.get_by_role("tab", name=name).click()
        self.view.wait_for_selector(shows)

    def settle(self):
        """Wait until everything that was asked for is drawn: nothing changes for a second."""
        before, same, deadline = None, 0, time.monotonic() + 60
        while same < 5:
            assert time.monotonic() < deadline, before
            self.view.wait_for_timeout(250)
            now = [self.view.inner_text("#status"), *self.images("base"), *self.images("guided")]
            same = same + 1 if now == before and now[0].startswith("12 of 12") and len(now) == 25 else 0
            before = now

    def images(self, gallery):
        """File names of the images in a gallery, which follow from their pixels."""
        urls = self.view.evaluate("name => [...document.querySelectorAll(`#${name} img`)].map(i => i.src)", gallery)
        return [url.rpartition("/")[2] for url in urls]

    def key(self, name, *keys):
        self.view.locator(f"#{name} input[type=range]").focus()
        for key in keys:
            self.view.keyboard.press(key)

    def type(self, name, text):
        self.view.fill(f"#{name} input, #{name} textarea", text)

    def says(self, name, text):
        self.view.wait_for_selector(f"#{name}:has-text({json.dumps(text)})")

    def on_water(self):
        """How many base and guided images show water, of 12."""
        rows = self.view.locator("#shares .class").filter(has_text="water").first.locator(".figure").all_inner_texts()
        return [int(row.removesuffix(" of 12")) for row in rows]


@pytest.fixture
def visit(browser, address):
    visit = Visit(browser, address)
    yield visit
    visit.close()


def test_guided_images_stand_beside_base_images_and_sliders_draw_them_again(visit):
    view, start = visit.view, time.perf_counter()
    view.click("#draw")
    view.wait_for_selector("#guided img")
    assert time.perf_counter() - start < 10
    visit.settle()
    at_one = visit.images("guided")
    assert visit.images("base") != at_one
    base, guided = visit.on_water()
    assert base in (0, 12)
    assert 1 <= guided <= 11
    visit.key("scale", "Home")
    visit.settle()
    assert visit.images("guided") == visit.images("base")
    visit.key("scale", *["ArrowRight"] * 20)  # 20 steps of 0.05
    view.wait_for_function("document.querySelector('#guided img').src !== document.querySelector('#base img').src")
    visit.settle()
    assert visit.images("guided") == at_one
    visit.key("mix-0-0", "Home")
    visit.settle()
    assert visit.on_water()[1] in (0, 1, 11, 12)
    visit.says("mix", "group 0 0% group 1 100%")
    view.get_by_role("button", name="Images, seed and steps").click()
    visit.key("images", "End")
    view.click("#draw")
    view.wait_for_function("document.querySelectorAll('#base img').length > 12")
    view.click("#stop")
    visit.says("status", "Stopped at")
    view.wait_for_timeout(1500)
    assert "Stopped at" in view.inner_text("#status")
    assert len(visit.images("guided")) < 64


def test_groups_are_browsed_parted_and_named(visit, home):
    view = visit.view
    visit.tab("Audit", "#typical-0 img")
    shown, sizes = set(), {of.prompt: of.num_images for of in Audit.load(BIRDS_DEMO / "audit").prompts}
    for prompt in canonical_prompts()[::-1]:
        view.click("#audit-prompt input")
        view.get_by_role("option", name=prompt).click()
        view.wait_for_selector(f"#audit-facts:has-text('{sizes[prompt]:,}')")
        shown.add(view.inner_text("#group-0"))
    assert len(shown) == 2
    visit.key("audit-cut-0", "PageUp", "PageUp", "PageUp")
    visit.says("audit-moved", "Would move")
    # Names persist, here and in the mix sliders, and after the page is opened anew.
    visit.type("group-name-0", "on land")
    view.click("#group-save-0")
    visit.says("group-0", "on land")
    view.reload()
    view.wait_for_selector("#mix-0-0")
    visit.says("mix", "on land 50% group 1 50%")
    visit.tab("Audit", "#typical-0 img")
    visit.says("group-0", "on land")
    view.locator("#typical-0 button").first.click()
    visit.says("audit-chosen", "images/")
    visit.type("group-name-0", "")
    view.click("#group-save-0")
    visit.says("group-0", "group 0")


def test_an_attribute_is_named_by_clicks(visit, home):
    visit.tab("Audit", "#typical-0 img")
    visit.view.get_by_role("button", name="Name an attribute by clicks").click()
    visit.type("ask", "place: land, water")
    visit.view.click("#ask-begin")
    for slot in (0, 1):
        visit.view.locator(f"#ask-{slot} label").nth(slot).click()
        visit.says("ask-status", f"{9 - slot} of these 10 left")
    (saved,) = home.glob("birds-demo-*/labels-place.csv")
    assert [line.rpartition(",")[2] for line in saved.read_text().splitlines()] == ["place", "land", "water"]
    visit.view.click("#ask-more")
    visit.says("ask-status", "4 more of land, 4 more of water are needed")


@pytest.mark.parametrize("width", [1280, 390])
def test_everything_fits_and_no_image_is_broken(browser, address, width):
    visit = Visit(browser, address, width=width)
    visit.view.click("#draw")
    visit.settle()
    for tab, shows in (("Generate", "#guided img"), ("Audit", "#typical-1 img"), ("Compare", "#compare table")):
        visit.tab(tab, shows)
        visit.view.wait_for_timeout(800)
        assert visit.view.evaluate(LAYOUT) == {"broken": 0, "width": width, "outside": []}
    visit.close()
