"""A report says what the audit and the results say, shows hostile text as text, and asks no server for anything."""

import base64
import html
import io
import json
import re
import shutil
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from browser import LAYOUT, needs_browser, open_browser
from invdiff import Audit, Results, load_captioned_images, save_report
from invdiff.auditing.edits import apply
from invdiff.auditing.result import WORDS, AuditWords, GroupWords, Word
from invdiff.errors import AuditError, ConfigError, DataError
from invdiff.evaluation.fairness.intervals import share_interval
from invdiff.report.figures import percent
from invdiff.report.read import find_parts
from invdiff.text import one_line
from runs import LAND, NASTY, SCRIPT, WATER, Page, make_audit, make_images, measured, report, undrawn
from test_cli import fail, succeed

pytestmark = pytest.mark.usefixtures("plain")


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    """The report of the whole run with all its pictures, written by the command."""
    folder = tmp_path_factory.mktemp("report")
    assert str(folder / "report.html") in succeed("report", finished, "--output", folder)
    return folder


@pytest.fixture(scope="module")
def page(written):
    return Page((written / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def twin(written):
    """The Markdown, as text."""
    return html.unescape((written / "report.md").read_text(encoding="utf-8"))


def test_figures_and_groups_are_those_of_the_results_and_of_the_audit(finished, page, twin):
    results = Results.load(finished / "results.json")
    for model, count in (("base", 18), ("guided", 11)):
        bias = results.models[model]["1.0"].first.overall["bias"]
        assert f"{bias.value:.2f} {bias.low:.2f} to {bias.high:.2f}" in page.words
        assert f"{bias.value:.2f} ({bias.low:.2f} to {bias.high:.2f})" in twin
        assert f"the {bias.floor:.2f} that a fair sampler" in page.words
        low, high = (percent(end) for end in share_interval(count, 20))
        assert f"{percent(count / 20)} {low} to {high}" in page.words
        assert f"{percent(count / 20)} ({low} to {high})" in twin
    low, high = (percent(end) for end in share_interval(2, 20))
    assert f"group 1 10% {low} to {high}" in page.words
    assert f"group 1: 10% ({low} to {high})" in twin
    assert "separation 0.80 agreement 0.90" in page.words
    alts = page.values("alt")
    assert sum("typical of group 0: images/0-" in alt for alt in alts) == 12
    assert sum("typical of group 1: images/0-" in alt for alt in alts) == 2
    assert [alt for alt in alts if alt.startswith("Bias over guidance scale. Base model: 0.")]
    pairs = [alt for alt in alts if ", seed " in alt]
    assert len(pairs) == 2 * (8 + 2 * 8)  # the glance, and each of two prompts
    assert pairs[:2] == [f"Base model: {LAND}, seed 0", f"With guidance: {LAND}, seed 0"]


def test_it_says_how_to_reproduce_it_and_what_it_does_not_prove(page, twin):
    folders = [f"{name}=images/{name}-cfg-{scale}" for name in ("base", "guided") for scale in (1, 3)]
    for text in (page.words, " ".join(twin.split())):
        for words in (
            "Under 2 of 2 prompts",
            f"contrast, {LAND}",
            "numbers, not names",
            "invdiff train org/birds data audit --output module --steps 77 --seed 5",
            f"invdiff evaluate {' '.join(folders)} --annotator labels --attribute background",
            "0123456789abcdef",
            "2.13.0",
            "They say nothing about training",
            "inferred without labels",
        ):
            assert words in text
        assert "eople changed" not in text


def test_an_audit_whose_cuts_people_moved_away_hides_nothing(finished, tmp_path):
    found = Audit.load(audit := shutil.copytree(finished / "audit", tmp_path / "audit"))
    apply(found, found.edits.with_cuts(0, 0, [99.0]).with_cuts(0, 1, [99.0])).save_edits(audit)
    page, twin = report(tmp_path / "out", audit=audit)
    for text in (page.words, twin):
        assert "No hidden bias was found" in text
        assert "People put the images of every prompt in one group" in text


def test_people_s_edits_are_said_and_shares_are_of_the_images_kept(finished, tmp_path):
    inferred = Audit.load(audit := shutil.copytree(finished / "audit", tmp_path / "audit"))
    edits = inferred.edits.with_name(0, 0, "on land").with_name(0, 1, "on water")
    apply(inferred, edits.without_images([0, 18, 21]).with_cuts(0, 1, [0.0])).save_edits(audit)
    scores = inferred.scores[0]
    above = int((scores[20:] >= 0).sum()) - int(scores[21] >= 0)
    found, markdown = report(tmp_path / "out", audit=audit, data=finished / "data", results=finished / "results.json")
    assert "on water 6% 1% to 26%" in found.words  # 1 of 18
    low, high = share_interval(above, 19)
    assert f"on water {percent(above / 19)} {percent(low)} to {percent(high)}" in found.words
    assert f"on water: {percent(above / 19)} ({percent(low)} to {percent(high)})" in markdown
    alts = " ".join(found.values("alt"))
    for text in (found.words, markdown):
        assert "3 images are left out, cuts between groups were moved by hand under 1 prompt and groups have" in text
        assert "put its curation.json beside the one that these commands make" in text
        assert "Names of groups are people's words for what they saw" in text
        assert "numbers, not names" not in text
        assert "group 0" not in text + alts
    assert "typical of on water: images/0-19.png" in alts
    assert not {"0-0.png", "0-18.png", "1-1.png"} & set(re.findall(r"\d-\d+\.png", alts))
    assert "on land from " in alts
    assert (tmp_path / "out" / "report-groups.png").is_file()


@pytest.mark.parametrize(
    ("guided", "verdict"),
    [
        ({"low": 0.0, "high": 0.3}, "reaches 0, the true figure of a fair sampler, whose images show about 0.10"),
        ({"low": 0.05, "high": 0.3}, "It is less, but its interval does not reach 0"),
        ({"low": 0.2, "high": 0.99}, "But the two intervals overlap"),
        ({"low": 0.2, "high": 0.99, "value": 0.9}, "It is no less."),
        ({"low": 0.99, "high": 1.0}, "guidance did harm"),
        (  # by the ends that are corrected for the annotator's errors
            {"low": 0.02, "high": 0.3, "corrected": 0.8, "corrected_low": 0.5, "corrected_high": 1.0},
            "0.80 (0.50 to 1.00) corrected for the annotator's errors. But the two intervals overlap",
        ),
        (
            {"low": 0.0, "high": 0.3, "corrected": 0.4, "corrected_low": 0.0, "corrected_high": 0.6}
            | {"corrected_floor": 0.33},
            "whose images show about 0.33 by chance alone; as much as 0.60",
        ),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(finished, tmp_path, guided, verdict):
    document = json.loads((finished / "results.json").read_text())
    for model, stated in (("base", {"low": 0.7, "high": 0.98, "value": 0.9}), ("guided", guided)):
        bias = document["models"][model]["1.0"]["attributes"]["background"]["overall"]["bias"]
        bias |= stated | {"floor": 0.1}
    (tmp_path / "results.json").write_text(json.dumps(document))
    page, twin = report(tmp_path / "out", results=tmp_path / "results.json")
    assert verdict in page.words
    assert verdict in twin


def test_the_verdict_counts_prompts_that_are_uneven_by_themselves(finished, tmp_path):
    document = json.loads((finished / "results.json").read_text())
    guided = document["models"]["guided"]["1.0"]["attributes"]["background"]
    guided["overall"]["bias"]["low"] = guided["by_prompt"][WATER]["bias"]["low"] = 0.0
    guided["by_prompt"][LAND]["bias"]["low"] = 0.5
    (tmp_path / "results.json").write_text(json.dumps(document))
    page, _ = report(tmp_path / "out", results=tmp_path / "results.json")
    assert "That of 1 of 2 prompts alone does not reach 0." in page.words


def test_every_image_is_a_data_uri_and_nothing_is_fetched(written, page):
    uris = [*page.values("src"), *page.values("srcset")]
    assert len(uris) > 60
    for uri in uris:
        head, _, data = uri.partition(",")
        assert head in ("data:image/png;base64", "data:image/jpeg;base64")
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).load()
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")
    assert len(page.values("srcset")) == 3  # two histograms and Bias, on dark paper
    assert all(target.startswith(("#", "data:")) for target in page.values("href"))
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "base", "form", "svg"}
    source = (written / "report.html").read_text(encoding="utf-8")
    assert not [call for call in ("url(", "@import") if call in source]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_pictures_of_the_markdown_lie_beside_it_and_earlier_ones_are_removed(finished, tmp_path, written, twin):
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", twin)
    assert names == ["report-before-after.png", "report-groups.png", "report-bias.png"]
    for name in names:
        Image.open(written / name).load()
        (tmp_path / name).write_bytes(b"old")
    save_report(tmp_path, audit=finished / "audit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_the_same_parts_give_the_same_bytes(finished, tmp_path):
    for name in ("a", "b"):
        save_report(tmp_path / name, **vars(find_parts(finished)))
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory):
    """A report in which every name and caption is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    prompts = tuple(text for text in NASTY if text.strip())
    make_audit(folder / "audit", prompts=prompts[:8], per_prompt=4)
    audit = json.loads((folder / "audit" / "audit.json").read_text())
    audit["names"] = [f"{NASTY[k % len(NASTY)]}{k}" for k in range(len(audit["names"]))]
    audit["prompts"][0] |= {"found": False, "reason": SCRIPT}
    audit["settings"] = {"data_fingerprint": SCRIPT, "solver": NASTY[1], "vision_encoder": NASTY[6]}
    (folder / "audit" / "audit.json").write_text(json.dumps(audit))
    said = GroupWords(None, 0, 0, tuple(Word(text, 2.0, 0.001) for text in NASTY), "")
    found, groups = Audit.load(folder / "audit"), (said, replace(said, prompt=1))
    words = AuditWords(NASTY[1], found.fingerprint, 512, 40, 0.01, groups)
    (folder / "audit" / WORDS).write_text(json.dumps(asdict(words)))
    named = found.edits.with_name(0, 0, one_line(NASTY[1], 60)).with_name(0, 1, NASTY[5][:60])
    apply(found, named).save_edits(folder / "audit")
    shares = {text.encode("utf-8", "replace").decode(): 2 for text in prompts}
    folders = {
        name: [make_images(folder / f"images-{k}", shares, count=3, classes=(NASTY[1], NASTY[5]))]
        for k, name in enumerate(("base", SCRIPT + "x" * 10_000))
    }
    results = measured(folders)
    document = json.loads(json.dumps(results.to_dict()).replace('"background"', json.dumps("b" * 500 + SCRIPT)))
    document["notes"] = list(NASTY)
    (folder / "results.json").write_text(json.dumps(document))
    (folder / "module").mkdir()
    config = {"base_model": SCRIPT, "record": {"training": {"steps": SCRIPT, "seed": 1}, "versions": {SCRIPT: SCRIPT}}}
    (folder / "module" / "config.json").write_text(json.dumps(config))
    parts = {"audit": folder / "audit", "results": folder / "results.json", "module": folder / "module"}
    with undrawn():
        save_report(folder / "out", **parts, images=folders, title=f"\u202e{SCRIPT}\ud800")
    return folder / "out"


def test_hostile_text_is_shown_makes_no_element_and_is_cut_but_for_commands(page, hostile_folder):
    source, markdown = ((hostile_folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    found = Page(source)
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in page.elements} | {"summary", "details"}
    known = {name for _, attributes in page.elements for name in attributes}
    assert {name for _, attributes in found.elements for name in attributes} <= known
    assert all(uri.startswith("data:image/") for uri in found.values("src"))
    for text in (*NASTY[:6], NASTY[1] + " 50%", NASTY[5][:59]):
        assert one_line(text) in found.words
    assert f"Words: {SCRIPT}, {NASTY[1]}" in found.words
    for character in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200e\u200f":  # these turn the direction of text
        assert character not in found.text + markdown
    assert re.search("x{9000}.*</code>", source)
    outside = re.sub("<pre.*?</pre>", "", source, flags=re.DOTALL)
    assert "x" * 250 in outside
    assert "x" * 301 not in outside


def test_hostile_text_is_text_in_markdown_too(hostile_folder):
    markdown = (hostile_folder / "report.md").read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    flat = [*tokens, *(child for token in tokens for child in token.children or [])]
    assert not {token.type for token in flat} & {"html_block", "html_inline", "link_open", "code_inline"}
    pictures = [token.attrs["src"] for token in flat if token.type == "image"]
    assert all(re.fullmatch(r"report-[a-z-]+\.png", str(source)) for source in pictures)
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"] + ["h2"] * 6
    assert SCRIPT in "".join(token.content for token in flat if token.type == "text")


@pytest.mark.parametrize(
    ("given", "both", "page_only"),
    [
        (
            ["audit"],
            ["Under 2 of 2 prompts", "nothing was measured here", "invdiff evaluate base=DIR guided=DIR"],
            "audited images were not given",
        ),
        (
            ["results"],
            ["No audit was given", "invdiff audit MODEL DATA --output audit", "No generated images were given"],
            "without reference images",
        ),
        (["audit", "images"], ["These images were not measured"], f"Base model: {LAND}, seed 7"),
    ],
)
def test_absent_parts_are_said(finished, tmp_path, given, both, page_only):
    images = {name: finished / "images" / f"{name}-cfg-1" for name in ("base", "guided")}
    parts = {"audit": finished / "audit", "results": finished / "results.json", "images": images}
    page, twin = report(tmp_path, **{name: parts[name] for name in given})
    alts = " ".join(page.values("alt"))
    assert all(words in page.words and words in twin for words in both)
    assert page_only in page.words + alts
    assert "typical of" not in alts


def test_nothing_found_and_one_model_alone_are_said_plainly(tmp_path):
    make_audit(tmp_path / "audit", found=False)
    folder = make_images(tmp_path / "base", {LAND: 18})
    measured({"base": folder}).save(tmp_path / "results.json")
    parts = {"audit": tmp_path / "audit", "results": tmp_path / "results.json", "images": {"base": folder}}
    page, twin = report(tmp_path / "out", **parts)
    for text in (page.words, " ".join(twin.split())):
        assert "The audit found no hidden group in 40 images under 2 prompts." in text
        assert f"one hump, not {LAND}" in text
        assert "No other model was measured beside it" in text
        assert "Bias, measured" in text
        assert "nothing is compared" in text


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (10, 4, "is 0.42; with guidance it is 0.00. Its interval reaches 0, the true figure of a sampler on target"),
        (4, 20, "is 0.00; with guidance it is 1.13. It is more: on these images guidance did harm."),
    ],
)
def test_with_a_target_the_verdict_is_by_the_distance_to_it(tmp_path, before, after, words):
    folders = {name: make_images(tmp_path / name, {LAND: n}) for name, n in (("base", before), ("guided", after))}
    measured(folders, target={"land": 0.2, "water": 0.8}).save(tmp_path / "results.json")
    page, twin = report(tmp_path / "out", results=tmp_path / "results.json")
    lead = "Distance to the target of “background” in images of the base model "
    assert all(lead + words in " ".join(text.split()) for text in (page.words, twin))
    assert "Distance to the target at guidance scale 3" in page.words
    glance = twin.partition("What did the audit find?")[0]
    assert "| Distance to the target (95% interval) | A sampler on target shows |" in glance
    assert "0 is on target, 1.1 is farthest." in glance
    assert "Bias (" not in glance


def test_a_figure_that_no_class_has_is_a_sentence_and_no_column(finished, tmp_path):
    document = json.loads((finished / "results.json").read_text())
    for by_scale in document["models"].values():
        for measures in by_scale.values():
            distance = {"Frechet distance (net)": {"value": None, "note": "not defined at 4 against 9, ..."}}
            measures["by_group"] = {name: {"images": {"value": 4.0}} | distance for name in ("land", "water")}
    (tmp_path / "results.json").write_text(json.dumps(document))
    page, twin = report(tmp_path / "out", results=tmp_path / "results.json")
    assert "Model Class images Base model land 4" in page.words
    assert page.words.count("Fréchet distance (net): not defined at 4 against 9, ...") == 1
    assert "| Model | Class | images |\n" in twin


def test_scales_of_one_module_make_a_curve(tmp_path):
    folders = {
        f"m-{scale:g}": make_images(tmp_path / f"{scale:g}", {LAND: 20 - int(8 * scale)}, scale=scale)
        for scale in (0.5, 1.0, 1.25)
    }
    folders["base"] = make_images(tmp_path / "base", {LAND: 20}, scale=0.0)
    measured(folders).save(tmp_path / "results.json")
    page, twin = report(tmp_path / "out", results=tmp_path / "results.json", images=folders)
    assert "of “m-1” it is 0.20" in page.words  # the strength that the module was trained for is compared
    (alt,) = (alt for alt in page.values("alt") if alt.startswith("Bias over the module's scale."))
    assert alt == "Bias over the module's scale. m: 1.00 at 0, 0.60 at 0.5, 0.20 at 1, 0.00 at 1.25."
    assert "Every scale of the module, at guidance scale 3" in page.words
    assert "Every guidance scale" not in page.words
    assert "| m | 0.5 | 0.60 (" in twin
    assert "(report-module-scale.png)" in twin
    assert (tmp_path / "out" / "report-module-scale.png").is_file()
    assert not (tmp_path / "out" / "report-bias.png").exists()


def test_parts_that_do_not_fit_are_errors_and_nothing_is_written(finished, tmp_path):
    images = {name: make_images(tmp_path / name, {LAND: 18, WATER: 2}) for name in ("base", "guided")}
    (images["guided"] / "0-0.png").write_text("no image")
    (tmp_path / "results.json").write_text("{")
    other = make_audit(tmp_path / "other", per_prompt=4)
    lost = load_captioned_images(shutil.copytree(tmp_path / "other", tmp_path / "lost"))
    (tmp_path / "lost" / "images" / "0-0.png").unlink()
    wrong = [
        ({}, ConfigError, "Expected audit/ or results.json in what is given"),
        ({"audit": finished / "audit", "data": other}, AuditError, r"without 32 of 40, first images/0-4\.png\. Give"),
        ({"audit": tmp_path / "other", "data": lost}, DataError, r"images/0-0\.png: the file does not exist"),
        ({"audit": finished / "audit", "images": images}, DataError, r"Could not read the image .*guided/0-0\.png"),
        ({"audit": finished / "audit", "module": tmp_path}, ConfigError, "Expected a module"),
        ({"results": tmp_path / "results.json"}, DataError, "Expected JSON"),
    ]
    for parts, kind, words in wrong:
        with pytest.raises(kind, match=words):
            save_report(tmp_path / "out", **parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["absent"], ["."], [".", "--caption-column", "text"]])
def test_the_command_says_what_it_lacks(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert fail("report", *words, "--output", "out").startswith("error: Expected")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["written", "hostile_folder"])
def test_a_browser_shows_it_whole_and_asks_for_nothing(request, which, width):
    address = (request.getfixturevalue(which) / "report.html").as_uri()
    with open_browser() as browser:
        view = browser.new_page(viewport={"width": width, "height": 900})
        asked = []
        view.on("request", lambda sent: asked.append(sent.url))
        view.goto(address)
        view.evaluate("Promise.all([...document.images].map(image => image.decode()))")
        seen = view.evaluate(LAYOUT)
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert seen == {"broken": 0, "width": width, "outside": []}
