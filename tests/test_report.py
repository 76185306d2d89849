"""A report says what the audit and the results say, shows hostile text as text, and asks no server for anything."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from PIL import Image
from typer.testing import CliRunner

from browser import LAYOUT, needs_browser, open_browser
from invdiff import cli, save_report
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit
from invdiff.errors import AuditError, ConfigError, DataError, EvaluationError, InvDiffError
from invdiff.evaluation.quality.intervals import share_interval
from invdiff.evaluation.results import Results
from invdiff.report.audit_view import about_edits
from invdiff.report.figures import percent
from invdiff.text import one_line
from runs import LAND, NASTY, SCRIPT, WATER, Page, make_audit, make_images, make_run, measured, report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the whole run, written by the command."""
    folder = tmp_path_factory.mktemp("report")
    done = CliRunner().invoke(cli.app, ["report", str(run), "--output", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert str(folder / "report.html") in done.output
    return folder


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def twin(written: Path) -> str:
    """The Markdown, as text."""
    return html.unescape((written / "report.md").read_text(encoding="utf-8"))


# What it says.


def test_bias_is_that_of_the_results(run: Path, page: Page, twin: str) -> None:
    results = Results.load(run / "results.json")
    for model in ("base", "guided"):
        bias = results.models[model]["1.0"].first.overall["bias"]
        assert f"{bias.value:.2f} {bias.low:.2f} to {bias.high:.2f}" in page.words
        assert f"{bias.value:.2f} ({bias.low:.2f} to {bias.high:.2f})" in twin
        assert f"the {bias.floor:.2f} that a perfectly fair sampler" in page.words


def test_shares_carry_wilson_intervals_of_the_counts(page: Page, twin: str) -> None:
    for count in (18, 11):
        low, high = (percent(end) for end in share_interval(count, 20))
        assert f"{percent(count / 20)} {low} to {high}" in page.words
        assert f"{percent(count / 20)} ({low} to {high})" in twin


def test_groups_are_those_of_the_audit(page: Page, twin: str) -> None:
    low, high = (percent(end) for end in share_interval(2, 20))
    assert f"group 1 10% {low} to {high}" in page.words
    assert f"group 1: 10% ({low} to {high})" in twin
    for text in (page.words, " ".join(twin.split())):
        assert "Under 2 of 2 prompts" in text
        assert f"contrast, {LAND}" in text
    assert "separation 0.80 stability 0.90" in page.words


def test_typical_images_are_shown_with_their_names(page: Page) -> None:
    alts = page.values("alt")
    assert sum("typical of group 0: images/0-" in alt for alt in alts) == 12
    assert sum("typical of group 1: images/0-" in alt for alt in alts) == 2


def test_people_s_edits_are_said_and_shares_are_of_the_images_kept(run: Path, tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    shutil.copytree(run / "audit", audit)
    inferred = Audit.load(audit)
    edits = inferred.edits.with_name(0, 0, "on land").with_name(0, 1, "on water")
    apply(inferred, edits.without_images([0, 18, 21]).with_cuts(1, [0.0])).save_edits(audit)
    scores = inferred.scores
    above = int((scores[20:] >= 0).sum()) - int(scores[21] >= 0)
    found, markdown = report(tmp_path / "out", audit=audit, data=run / "data", results=run / "results.json")
    assert "on water 6% 1% to 26%" in found.words  # 1 of 18
    low, high = share_interval(above, 19)
    assert f"on water {percent(above / 19)} {percent(low)} to {percent(high)}" in found.words
    assert f"on water: {percent(above / 19)} ({percent(low)} to {percent(high)})" in markdown
    sentence = (
        "People changed this audit: 3 images are left out, cuts between groups were moved by hand under 1 prompt "
        "and groups have names that people gave them. Separation and stability are of the groups as inferred."
    )
    alts = " ".join(found.values("alt"))
    for text in (found.words, markdown):
        assert sentence in text
        assert "put its curation.json beside the one that these commands make" in text
        assert "Names of groups are people's words for what they saw" in text
        assert "numbers, not names" not in text
        assert "group 0" not in text + alts
    assert "typical of on water: images/0-19.png" in alts
    assert not {"0-0.png", "0-18.png", "1-1.png"} & set(re.findall(r"\d-\d+\.png", alts))
    assert "on land from " in alts
    assert (tmp_path / "out" / "report-groups.png").is_file()


def test_nothing_is_said_of_people_without_edits(page: Page, twin: str) -> None:
    for text in (page.words, twin):
        assert "eople changed" not in text
        assert "numbers, not names" in text


def test_each_edit_is_said_alone() -> None:
    names = Edits(names=(("a", ""),))
    assert about_edits(names) == "People changed this audit: groups have names that people gave them."
    assert about_edits(Edits(left_out=(1,))).startswith("People changed this audit: 1 image is left out. Separation")
    moved = Edits(names=(("a", ""),), cuts={0: (1.0,), 2: (1.0,)})
    assert "by hand under 2 prompts and groups have names" in about_edits(moved)
    assert about_edits(Edits(names=(("", ""),))) == ""


def test_one_group_alone_has_no_smallest(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "audit", tmp_path / "audit")
    audit, edits = Audit.load(tmp_path / "audit"), Edits().with_cuts(0, [99.0])
    apply(audit, edits).save_edits(tmp_path / "audit")
    assert "the smallest group holds 10% of" in report(tmp_path / "one", audit=tmp_path / "audit")[1]
    apply(audit, edits.with_cuts(1, [99.0])).save_edits(tmp_path / "audit")
    assert "smallest" not in report(tmp_path / "both", audit=tmp_path / "audit")[1]


def test_pairs_stand_base_above_guided(page: Page) -> None:
    pairs = [alt for alt in page.values("alt") if ", seed " in alt]
    assert len(pairs) == 2 * (8 + 2 * 8)  # the glance, and each of two prompts
    assert pairs[:2] == [f"Base model: {LAND}, seed 0", f"With guidance: {LAND}, seed 0"]


def test_it_says_how_to_reproduce_it(page: Page, twin: str) -> None:
    for text in (page.words, twin):
        assert "invdiff train org/birds data audit --output module --steps 77 --seed 5" in text
        folders = [f"{name}=images/{name}-cfg-{scale}" for name in ("base", "guided") for scale in (1, 3)]
        assert f"invdiff evaluate {' '.join(folders)} --annotator labels --attribute background" in text
        assert "0123456789abcdef" in text
        assert "2.13.0" in text


def test_it_says_what_the_figures_do_not_prove(page: Page, twin: str) -> None:
    for text in (page.words, twin):
        assert "They say nothing about training" in text
        assert "inferred without labels" in text


def test_curves_are_drawn_on_light_and_on_dark_paper(page: Page) -> None:
    dark = [attributes["srcset"] for tag, attributes in page.elements if tag == "source"]
    assert len(dark) == 3  # two histograms, Bias
    corners = [Image.open(io.BytesIO(decoded(uri or ""))).convert("RGB").getpixel((0, 0)) for uri in dark]
    assert corners == [(16, 21, 28)] * 3
    assert [alt for alt in page.values("alt") if alt.startswith("Bias over guidance scale. Base model: 0.")]


def test_headings_are_in_order_and_sections_ask_questions(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.text.count("?\n") >= 6
    assert ("html", {"lang": "en"}) in page.elements


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.02, 0.3), "cannot be distinguished from a fair sampler"),
        ((0.2, 0.3), "It is less, but more than"),
        ((0.2, 0.99), "do not prove a change"),
        ((0.99, 1.0), "guidance did harm"),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(
    run: Path, tmp_path: Path, interval: tuple[float, float], verdict: str
) -> None:
    document = json.loads((run / "results.json").read_text())
    for model, ends in (("base", (0.7, 0.98)), ("guided", interval)):
        bias = document["models"][model]["1.0"]["attributes"]["background"]["overall"]["bias"]
        bias |= {"low": ends[0], "high": ends[1], "floor": 0.1}
    (tmp_path / "results.json").write_text(json.dumps(document))
    page, twin = report(tmp_path / "out", results=tmp_path / "results.json")
    assert verdict in page.words
    assert verdict in twin


# Nothing leaves the page.


def decoded(uri: str) -> bytes:
    head, _, data = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return base64.b64decode(data, validate=True)


def test_every_image_is_a_data_uri_that_decodes(page: Page) -> None:
    uris = [*page.values("src"), *page.values("srcset")]
    assert len(uris) > 60
    for uri in uris:
        Image.open(io.BytesIO(decoded(uri))).load()
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")


def test_nothing_is_fetched(written: Path, page: Page) -> None:
    source = (written / "report.html").read_text(encoding="utf-8")
    assert all(target.startswith(("#", "data:")) for target in page.values("href"))
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "base", "form", "svg"}
    assert "url(" not in source
    assert "@import" not in source


def test_pictures_of_the_markdown_lie_beside_it(written: Path, twin: str) -> None:
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", twin)
    assert names == ["report-before-after.png", "report-groups.png", "report-bias.png"]
    for name in names:
        Image.open(written / name).load()


def test_pictures_of_an_earlier_report_are_removed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report-groups.png").write_bytes(b"old")
    save_report(tmp_path, audit=run / "audit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_the_same_parts_give_the_same_bytes(run: Path, written: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(run), "--output", str(tmp_path)])
    assert done.exit_code == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in written.iterdir()
    }


# What others wrote is text.


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which every name and caption is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    prompts = tuple(text for text in NASTY if text.strip())
    make_audit(folder / "audit", prompts=prompts[:8])
    audit = json.loads((folder / "audit" / "audit.json").read_text())
    audit["names"] = [f"{NASTY[k % len(NASTY)]}{k}" for k in range(len(audit["names"]))]
    audit["prompts"][0] |= {"found": False, "reason": SCRIPT}
    audit["settings"] = {"data_fingerprint": SCRIPT, "solver": NASTY[1], "vision_encoder": NASTY[6]}
    (folder / "audit" / "audit.json").write_text(json.dumps(audit))
    named = Audit.load(folder / "audit").edits.with_name(0, 0, one_line(NASTY[1], 60)).with_name(0, 1, NASTY[5][:60])
    apply(Audit.load(folder / "audit"), named).save_edits(folder / "audit")
    shares = {text.encode("utf-8", "replace").decode(): 5 for text in prompts}
    models = ("base", SCRIPT + "x" * 10_000)
    folders = {
        name: [make_images(folder / f"images-{k}", shares, classes=(NASTY[1], NASTY[5]))]
        for k, name in enumerate(models)
    }
    results = measured(folders)
    document = json.loads(json.dumps(results.to_dict()).replace('"background"', json.dumps("b" * 500 + SCRIPT)))
    document["notes"] = list(NASTY)
    (folder / "results.json").write_text(json.dumps(document))
    (folder / "module").mkdir()
    config = {"base_model": SCRIPT, "record": {"training": {"steps": SCRIPT, "seed": 1}, "versions": {SCRIPT: SCRIPT}}}
    (folder / "module" / "config.json").write_text(json.dumps(config))
    save_report(
        folder / "out",
        audit=folder / "audit",
        results=folder / "results.json",
        images=folders,
        module=folder / "module",
        title=f"\u202e{SCRIPT}\ud800",
    )
    return folder / "out"


@pytest.fixture(scope="module")
def hostile(hostile_folder: Path) -> tuple[Page, str]:
    """The same as a page, and its Markdown as it is."""
    html_text, markdown = ((hostile_folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    return Page(html_text), markdown


def test_hostile_text_makes_no_element_and_no_attribute(page: Page, hostile: tuple[Page, str]) -> None:
    found, _ = hostile
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in page.elements} | {"summary", "details"}
    known = {name for _, attributes in page.elements for name in attributes}
    assert {name for _, attributes in found.elements for name in attributes} <= known
    assert all(uri.startswith("data:image/") for uri in found.values("src"))


def test_hostile_text_is_shown(hostile: tuple[Page, str]) -> None:
    found, _ = hostile
    for text in (*NASTY[:6], NASTY[1] + " 90%", NASTY[5][:59]):
        assert one_line(text) in " ".join(found.text.split())


def test_long_text_is_cut_but_for_commands(hostile_folder: Path) -> None:
    source = (hostile_folder / "report.html").read_text(encoding="utf-8")
    assert re.search("x{9000}.*</code>", source)
    outside = re.sub("<pre.*?</pre>", "", source, flags=re.DOTALL)
    assert "x" * 250 in outside
    assert "x" * 301 not in outside


def test_no_character_turns_the_direction_of_what_follows(hostile: tuple[Page, str]) -> None:
    found, markdown = hostile
    for character in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200e\u200f":
        assert character not in found.text
        assert character not in markdown


def test_hostile_text_is_text_in_markdown_too(hostile: tuple[Page, str]) -> None:
    _, markdown = hostile
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    flat = [*tokens, *(child for token in tokens for child in token.children or [])]
    kinds = {token.type for token in flat}
    assert not kinds & {"html_block", "html_inline", "link_open", "code_inline"}
    pictures = [token.attrs["src"] for token in flat if token.type == "image"]
    assert all(re.fullmatch(r"report-[a-z-]+\.png", str(source)) for source in pictures)
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"] + ["h2"] * 6
    assert SCRIPT in "".join(token.content for token in flat if token.type == "text")


# What is absent or damaged.


def test_an_audit_alone_says_what_was_not_measured(run: Path, tmp_path: Path) -> None:
    page, twin = report(tmp_path, audit=run / "audit")
    for text in (page.words, twin):
        assert "Under 2 of 2 prompts" in text
        assert "nothing was measured here" in text
        assert "invdiff evaluate base=DIR guided=DIR" in text
    assert "audited images were not given" in page.words
    assert "typical of" not in "".join(page.values("alt"))


def test_results_alone_say_that_no_audit_was_given(run: Path, tmp_path: Path) -> None:
    page, twin = report(tmp_path, results=run / "results.json")
    for text in (page.words, twin):
        assert "No audit was given" in text
        assert "invdiff audit MODEL DATA --output audit" in text
        assert "No generated images were given" in text
        assert "without reference images" in text


def test_nothing_found_is_said_plainly(tmp_path: Path) -> None:
    make_audit(tmp_path / "audit", found=False)
    page, twin = report(tmp_path / "out", audit=tmp_path / "audit")
    for text in (page.words, " ".join(twin.split())):
        assert "The audit found no hidden group in 40 images under 2 prompts." in text
        assert f"one hump, not {LAND}" in text


def test_one_model_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "base", {LAND: 18})
    measured({"base": folder}).save(tmp_path / "results.json")
    page, _ = report(tmp_path / "out", results=tmp_path / "results.json", images={"base": folder})
    assert "No guided model was measured beside it" in page.words
    assert "nothing is compared" in page.words


def test_images_without_results_are_shown_and_said_to_be_unmeasured(run: Path, tmp_path: Path) -> None:
    images = {name: run / "images" / f"{name}-cfg-1" for name in ("base", "guided")}
    page, _ = report(tmp_path, audit=run / "audit", images=images)
    assert "These images were not measured" in page.words
    assert sum(", seed " in alt for alt in page.values("alt")) == 2 * (8 + 2 * 8)


@pytest.mark.parametrize("with_images", [True, False])
def test_scales_of_one_module_make_a_curve(tmp_path: Path, with_images: bool) -> None:
    folders = {
        f"m-{scale:g}": make_images(tmp_path / f"{scale:g}", {LAND: 20 - int(8 * scale)}, scale=scale)
        for scale in (0.5, 1.0, 1.25)
    }
    folders["base"] = make_images(tmp_path / "base", {LAND: 20}, scale=0.0)
    measured(folders).save(tmp_path / "results.json")
    parts = {"images": folders} if with_images else {}
    page, twin = report(tmp_path / "out", results=tmp_path / "results.json", **parts)
    assert "of “m-1” it is 0.20" in page.words  # the strength that the module was trained for is compared
    (alt,) = (alt for alt in page.values("alt") if alt.startswith("Bias over the module's scale."))
    assert alt == "Bias over the module's scale. m: 1.00 at 0, 0.60 at 0.5, 0.20 at 1, 0.00 at 1.25."
    assert "Every scale of the module, at guidance scale 3" in page.words
    assert "Every guidance scale" not in page.words
    assert "| m | 0.5 | 0.60 (" in twin
    assert "(report-module-scale.png)" in twin
    assert (tmp_path / "out" / "report-module-scale.png").is_file()
    assert not (tmp_path / "out" / "report-bias.png").exists()


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"models": {}}', '{"models": {"base": 3}}', '{"models": {"base": {"1.0": {}}}}']
)
def test_other_json_is_not_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(EvaluationError, match=r"[Ee]valuate again|invdiff evaluate"):
        save_report(tmp_path / "out", results=tmp_path / "results.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["prompts", "names", "num_groups"])
def test_a_damaged_audit_is_an_error(run: Path, tmp_path: Path, key: str) -> None:
    shutil.copytree(run / "audit", tmp_path / "audit")
    document = json.loads((run / "audit" / "audit.json").read_text())
    del document[key]
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(document))
    with pytest.raises(AuditError, match="Run `invdiff audit` again"):
        save_report(tmp_path, audit=tmp_path / "audit")


def test_parts_that_do_not_fit_are_errors_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    images = {name: make_images(tmp_path / name, {LAND: 18, WATER: 2}) for name in ("base", "guided")}
    (images["guided"] / "0-0.png").write_text("no image")
    (tmp_path / "results.json").write_text("{")
    other = make_audit(tmp_path / "other", per_prompt=4)
    wrong: list[tuple[dict[str, Any], type[InvDiffError], str]] = [
        ({}, ConfigError, "Expected an audit or results"),
        ({"audit": run / "audit", "data": other}, AuditError, "Give the data that the audit was made on"),
        ({"audit": run / "audit", "images": images}, DataError, r"Could not read the image .*guided/0-0\.png"),
        ({"audit": run / "audit", "module": tmp_path}, ConfigError, "Expected a module"),
        ({"results": tmp_path / "results.json"}, DataError, "Expected JSON"),
    ]
    for parts, kind, words in wrong:
        with pytest.raises(kind, match=words):
            save_report(tmp_path / "out", **parts)
    assert not list(tmp_path.glob("out/*.html"))


@pytest.mark.parametrize("words", [[], ["absent"], ["--images", "x"], ["--caption-column", "text"]])
def test_the_command_says_what_it_lacks(tmp_path: Path, words: list[str]) -> None:
    done = CliRunner().invoke(cli.app, ["report", *words, "--output", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: Expected")


def test_an_empty_run_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path), "--output", str(tmp_path / "out")])
    assert "found neither" in " ".join(done.stderr.split())


def test_parts_named_apart_take_the_place_of_the_run_s(run: Path, tmp_path: Path) -> None:
    make_audit(tmp_path / "audit", prompts=("a photo of a fish",))
    words = ["report", str(run), "--audit", str(tmp_path / "audit"), "--data", str(tmp_path / "audit")]
    done = CliRunner().invoke(cli.app, [*words, "--title", "Fish", "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "a photo of a fish" in page.text
    assert ("title", {}) in page.elements
    assert "Fish" in page.text


# In a browser.


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["written", "hostile_folder"])
def test_a_browser_shows_it_whole_and_asks_for_nothing(request: pytest.FixtureRequest, which: str, width: int) -> None:
    address = (request.getfixturevalue(which) / "report.html").as_uri()
    with open_browser() as browser:
        view = browser.new_page(viewport={"width": width, "height": 900})
        asked: list[str] = []
        view.on("request", lambda sent: asked.append(sent.url))
        view.goto(address)
        view.evaluate("Promise.all([...document.images].map(image => image.decode()))")
        seen = view.evaluate(LAYOUT)
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert seen == {"broken": 0, "width": width, "outside": []}
