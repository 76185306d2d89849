"""Tab Audit below the browser: what it shows of an audit, and what people change."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from extras import gr
from invdiff.app.audit import AuditBook, AuditTab
from invdiff.auditing.edits import CURATION
from invdiff.auditing.result import Audit
from invdiff.files import fingerprint
from invdiff.report.read import Parts, find_parts
from runs import LAND, NASTY, SCRIPT, WATER, make_audit

pytestmark = pytest.mark.usefixtures("plain")

FILE_NAMES = ('"><img src=x onerror=alert(1)>', "<b onmouseover=alert(1)>", "'{{7*7}}${alert(1)}", "\u202egnp")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("shown")))


class Tab:
    """An audit tab outside a browser; values by the component that they go to."""

    def __init__(self, *runs):
        self.books = [AuditBook(parts) for parts in runs]
        with gr.Blocks():
            self.tab = AuditTab({f"run {place}": book for place, book in enumerate(self.books)})
        self.places = [place for _, place in self.tab._prompt.choices]
        self.values = self.tab.turn_to()

    def __call__(self, event, place, *given):
        self.values = getattr(self.tab, event)(self.places[place], 12, *given)
        return self.shown

    @property
    def shown(self):
        values = {part.elem_id or type(part).__name__: value for part, value in self.values.items()}
        return values | {name: of["value"] for name, of in values.items() if name in self.tab._galleries}

    def pick(self, shelf, index):
        """What a click on an image of the first prompt chooses, and its details."""
        return self.tab.pick(SimpleNamespace(index=index), self.places[0], shelf, self.values[self.tab._positions])[:2]


def rewrite(folder, change):
    tensors, document = load_file(folder / "audit.safetensors"), json.loads((folder / "audit.json").read_text())
    change(tensors, document)
    weights = [tensors[name].tobytes() for name in sorted(tensors) if name.startswith("group_weights")]
    document["fingerprint"] = fingerprint(*weights, tensors["prompt_ids"].tobytes())
    save_file(tensors, folder / "audit.safetensors")
    (folder / "audit.json").write_text(json.dumps(document))


@pytest.fixture
def tab(run):
    return Tab(find_parts(run))


@pytest.fixture
def folder(run):
    return run / "audit"


def test_a_prompt_is_shown_with_its_groups(tab):
    shown = tab.shown
    for part, text in (("group-0", "90%"), ("group-0", "18 images"), ("group-1", "2 images")):
        assert text in shown[part]
    assert (len(shown["typical-0"]), len(shown["typical-1"])) == (12, 2)
    assert shown["audit-cut-0"]["visible"]
    assert "data:image/png" in shown["audit-plot"]
    path, name = shown["typical-1"][0]
    assert name == tab.books[0].audit.names[tab.books[0].page(0, 0).groups[1].typical[0]]
    assert Image.open(path).getpixel((0, 0)) == (40, 40, 200)  # blue is group 1


def test_names_are_saved_beside_the_audit(tab, folder):
    shown = tab("rename", 0, 0, "on <b>land</b>")
    assert "Name saved." in shown["audit-status"]
    assert "on &lt;b&gt;land&lt;/b&gt;" in shown["group-0"]
    assert not any(name.startswith("group-name") for name in shown)  # somebody may be typing there
    assert Audit.load(folder).group_names == (("on <b>land</b>", ""),)
    assert tab("open", 0)["group-name-0"] == "on <b>land</b>"
    (refused,) = tab("rename", 0, 1, "On <b>land</b>").values()
    assert 'role="alert"' in refused
    assert "no other group has" in refused
    assert tab.books[0].group_names == [["on <b>land</b>", "group 1"]]
    tab("rename", 0, 0, "")
    assert not (folder / CURATION).exists()


def test_thresholds_show_what_moves_and_are_kept_and_reset(tab, folder):
    page = tab.books[0].page(0, 0)
    cut = float(np.sort(page.scores[page.labels == 0])[-3])  # moves three images
    shown = tab("show", 0, cut)
    assert "3 images from “group 0” to “group 1”" in shown["audit-moved"]
    moved = [path for path, name in shown["nearest-1"] if name.startswith("moved: ")]
    assert len(moved) == 3
    assert {Image.open(path).getpixel((0, 0)) for path in moved} == {(0xE6, 0x9A, 0x1F)}  # the colour of group 0
    assert not any(name.startswith("moved: ") for _, name in shown["nearest-0"])
    assert "25%" in shown["group-1"]
    assert tab("show", 0, page.cuts[0])["audit-moved"] == ""
    assert not (folder / CURATION).exists()
    shown = tab("keep", 0, cut)
    assert "15 images" in shown["group-0"]
    assert "by hand" in shown["audit-facts"]
    assert shown["audit-cut-0"]["value"] == pytest.approx(cut, abs=1e-3)
    assert Audit.load(folder).split(0, 0).shares == [0.75, 0.25]
    assert "18 images" in tab("keep", 0)["group-0"]
    assert not (folder / CURATION).exists()


def test_an_image_is_chosen_left_out_and_put_back(tab, folder):
    page = tab.books[0].page(0, 0)
    picked, details = tab.pick("typical-1", 1)
    assert picked == (tab.places[0], page.groups[1].typical[1])
    assert tab.books[0].audit.names[picked[1]] in details
    assert tab.pick("typical-1", 9)[0] is None
    shown = tab("count_image", 0, picked, False)
    for part, text in (("status", "counts nowhere now"), ("chosen", "it was left out"), ("facts", ">19<")):
        assert text in shown[f"audit-{part}"]
    assert len(shown["left-out"]) == 1
    assert "1 image<" in shown["group-1"]
    assert Audit.load(folder).edits.left_out == (picked[1],)
    shown = tab("count_image", 0, picked, True)
    assert "counts in training" in shown["audit-status"]
    assert shown["left-out"] == []
    assert "Expected an image to be chosen first" in tab("count_image", 0, None, False)["audit-status"]
    assert not (folder / CURATION).exists()


def test_changes_of_others_are_kept_and_an_audit_made_anew_is_not_changed(tab, folder):
    AuditBook(Parts(audit=folder)).edit(lambda edits: edits.with_name(0, 0, "theirs"))
    tab("rename", 0, 1, "ours")
    assert Audit.load(folder).group_names == (("theirs", "ours"),)
    (folder / CURATION).unlink()
    rewrite(folder, lambda tensors, _: tensors.update({"group_weights.0": 1 - tensors["group_weights.0"]}))
    assert "the audit that was opened" in tab("rename", 0, 1, "ours")["audit-status"]
    assert not (folder / CURATION).exists()


def test_an_image_that_cannot_be_shown_is_crossed_out(run, tmp_path):
    (tmp_path / "secret.png").write_bytes((run / "data" / "images" / "0-0.png").read_bytes())
    for place in (0, 1):
        (run / "data" / "images" / f"0-{place}.png").unlink()
    (run / "data" / "images" / "0-1.png").symlink_to(tmp_path / "secret.png")
    tab = Tab(find_parts(run))
    tiles = [tab.books[0].image(position).getcolors() for position in range(3)]
    assert [len(colours or ()) for colours in tiles] == [2, 2, 1]
    assert len(tab.shown["typical-0"]) == 12


def test_several_audits_are_told_apart(run, tmp_path):
    make_audit(tmp_path / "audit", prompts=("a fish",), rare=5)
    tab = Tab(find_parts(run), Parts(audit=tmp_path / "audit"))
    choices = [f"run 0 · 1. {LAND}", f"run 0 · 2. {WATER}", "run 1 · 1. a fish"]
    assert [choice for choice, _ in tab.tab._prompt.choices] == choices
    picked, _ = tab.pick("typical-0", 0)
    shown = tab("open", 2)
    for part, text in (("group-1", "5 images"), ("audit-facts", "--data DATA"), ("audit-chosen", "Choose an image")):
        assert text in shown[part]
    assert (shown["typical-0"], shown["audit-at"]) == ([], tab.places[2])
    assert "chosen first" in tab("count_image", 2, picked, False)["audit-status"]
    tab("rename", 2, 0, "theirs")
    assert [book.group_names for book in tab.books] == [[["group 0", "group 1"]], [["theirs", "group 1"]]]
    # An audit that is made anew changes the list; a browser that still shows the old one goes on.
    make_audit(tmp_path / "more", factors=2)
    tab.tab.books["run 0"] = AuditBook(Parts(audit=tmp_path / "more"))
    choices = dict(tab.tab.turn_to("run 1")[tab.tab._prompt]["choices"])
    assert (len(choices), choices["run 1 · 1. a fish"]) == (5, tab.places[2])
    tab("rename", 2, 1, "late")
    assert tab.books[1].group_names == [["theirs", "late"]]


def test_groups_that_scores_do_not_part_have_no_threshold(tmp_path):
    make_audit(tmp_path / "audit", rare=4)

    def third_group(tensors, document):
        labels = tensors["group_weights.0"].argmax(axis=1)
        labels[labels == 1] = [1, 1, 2, 2] * 2
        tensors["group_weights.0"] = np.eye(3, dtype=np.float32)[labels]
        tensors["scores"] = (10.0 * labels + np.linspace(0, 1, len(labels))).astype(np.float32)[None]
        document["num_groups"] = [3]
        for split in document["factors"][0]["splits"]:
            split |= {"shares": [0.8, 0.1, 0.1], "intervals": [[0, 1]] * 3}

    rewrite(tmp_path / "audit", third_group)
    tab = Tab(Parts(audit=tmp_path / "audit"))
    assert [tab.shown[f"audit-cut-{k}"]["visible"] for k in (0, 1)] == [True, True]
    page = tab.books[0].page(0, 0)
    tab.books[0].edit(lambda edits: edits.without_images(page.rows[page.labels == 2].tolist()))
    assert [tab("open", 0)[f"audit-cut-{k}"]["visible"] for k in (0, 1)] == [False, False]  # one was emptied by hand
    assert "parted by their scores" in tab("keep", 0, 5.0, 15.0)["audit-status"]
    (tmp_path / "audit" / CURATION).unlink()
    shuffled = np.random.default_rng(0).permutation
    rewrite(tmp_path / "audit", lambda tensors, _: tensors.update(scores=shuffled(tensors["scores"], axis=1)))
    assert not Tab(Parts(audit=tmp_path / "audit")).shown["audit-cut-0"]["visible"]


def test_an_audit_that_found_nothing_says_so(tmp_path):
    make_audit(tmp_path / "audit", found=False)
    tab = Tab(Parts(audit=tmp_path / "audit"))
    assert "No hidden group was found" in tab.shown["audit-facts"]
    assert LAND in tab.shown["audit-tables"]
    assert not tab.shown["audit-cut-0"]["visible"]
    assert "Name saved" in tab("rename", 0, 1, "any")["audit-status"]


def hostile_run(folder):
    """A run whose prompts, captions and names of files are hostile; the first prompt hides nothing."""
    make_audit(folder / "audit", prompts=tuple(text for text in NASTY if text.strip())[:6])
    (folder / "data").mkdir()
    rows = []

    def hostile(_, document):
        for place, name in enumerate(document["names"]):
            file_name = document["names"][place] = f"{place}{FILE_NAMES[place % len(FILE_NAMES)]}.png"
            (folder / "audit" / name).rename(folder / "data" / file_name)
            rows.append(json.dumps({"file_name": file_name, "text": NASTY[place % 7]}))
        document["prompts"] = [prompt | {"reason": SCRIPT} for prompt in document["prompts"]]
        document["prompts"][0]["found"] = False
        splits = [split | {"evidence": SCRIPT} for split in document["factors"][0]["splits"][1:]]
        document["factors"] = [{"name": SCRIPT, "splits": splits}]

    rewrite(folder / "audit", hostile)
    (folder / "data" / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_hostile_text_is_text_in_every_value(tmp_path):
    tab = Tab(find_parts(hostile_run(tmp_path)))
    tab("rename", 0, 0, SCRIPT)
    tab("rename", 0, 1, "\u202e\"'><img src=x>")
    shown = [tab("open", place) for place in range(5)]
    shown += [dict(enumerate(tab.pick("typical-0", at))) for at in range(12)]
    shown.append(tab("rename", 0, 0, NASTY[1]))
    for part, html in (pair for values in shown for pair in values.items()):
        if isinstance(html, str) and not str(part).startswith("group-name"):  # text fields show text as it is
            assert not any(markup in html for markup in ("<script", "<img src=x", "<b onmouseover", "\u202e"))


def test_each_factor_is_browsed_and_cut_alone(tmp_path):
    make_audit(tmp_path / "audit", factors=2)
    tab = Tab(Parts(audit=tmp_path / "audit"))
    choices = [choice for choice, _ in tab.tab._prompt.choices]
    assert choices[1:3] == [f"2. factor 1 · {WATER}", f"3. factor 2 · {LAND}"]
    kept = tab("keep", 2, -99.0)
    assert "100%" in kept["group-1"]
    assert "No image is left in “group 0”." in kept["audit-status"]
    assert "90%" in tab("open", 0)["group-0"]
    assert Audit.load(tmp_path / "audit").edits.cuts == {(1, 0): (-99.0,)}
