"""Tab Audit: what it shows of an audit, and what people change."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from invdiff.app.archive import AuditBook
from invdiff.app.pictures import Pictures, framed, nothing_to_show
from invdiff.app.serve import own_files
from invdiff.auditing.edits import CURATION
from invdiff.errors import AuditError, ConfigError
from invdiff.report.read import Parts, find_parts
from runs import LAND, NASTY, SCRIPT, WATER, make_audit

with own_files():
    gr = pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")
    from invdiff.app.audit_tab import AuditTab
    from invdiff.app.pieces import refusal

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gradio's own imports


@pytest.fixture
def book(run: Path) -> AuditBook:
    return AuditBook(find_parts(run))


def reopened(book: AuditBook) -> AuditBook:
    return AuditBook(Parts(audit=book.folder))


def test_names_are_saved_beside_the_audit(book: AuditBook) -> None:
    book.rename(0, 0, "on land")
    assert (book.folder / CURATION).is_file()
    assert reopened(book).group_names() == [["on land", "group 1"]]
    with pytest.raises(ConfigError, match="no other group has"):
        book.rename(0, 1, "On land")
    assert reopened(book).group_names() == [["on land", "group 1"]]
    book.rename(0, 0, "")
    assert not (book.folder / CURATION).exists()


def test_images_left_out_are_in_no_group_and_can_be_put_back(book: AuditBook) -> None:
    before = book.pages[0].groups[0].size
    position = book.pages[0].groups[0].typical[0]
    book.leave_out([position])
    assert book.pages[0].groups[0].size == before - 1
    assert [page.prompt.prompt for page in book.pages] == [LAND, WATER]  # in their places, though one is smaller
    assert reopened(book).edits.left_out == (position,)
    book.put_back([position])
    assert reopened(book).pages[0].groups[0].size == before


def test_a_whole_prompt_is_never_left_out(book: AuditBook) -> None:
    with pytest.raises(AuditError, match="at least one image"):
        book.leave_out(book.pages[0].rows.tolist())
    assert book.edits.left_out == ()
    assert not (book.folder / CURATION).exists()


def test_changes_of_others_are_kept(book: AuditBook) -> None:
    other = reopened(book)
    other.rename(0, 0, "theirs")
    book.leave_out([0])
    book.rename(0, 1, "ours")
    kept = reopened(book)
    assert kept.group_names() == [["theirs", "ours"]]
    assert kept.edits.left_out == (0,)


def test_a_moved_cut_moves_images_and_is_kept_only_when_asked(book: AuditBook) -> None:
    page = book.pages[0]
    own = page.scores[page.labels == page.groups[0].index]
    cut = float(np.sort(own)[-3])  # the three highest of the common group
    moved = book.preview(page, [cut])
    assert int((moved.labels != page.labels).sum()) == 3
    assert book.pages[0].groups[0].size == page.groups[0].size
    book.part_at(page, [cut])
    assert reopened(book).pages[0].groups[0].size == page.groups[0].size - 3
    book.part_at(page, None)
    assert reopened(book).pages[0].groups[0].size == page.groups[0].size


def test_an_audit_made_anew_meanwhile_is_not_changed(book: AuditBook, tmp_path: Path) -> None:
    for name in ("audit.json", "audit.safetensors"):
        (tmp_path / name).write_bytes((book.folder / name).read_bytes())
    tensors = load_file(book.folder / "audit.safetensors")
    tensors["group_weights.0"] = tensors["group_weights.0"][:, ::-1].copy()
    save_file(tensors, book.folder / "audit.safetensors")
    with pytest.raises(AuditError, match="made anew meanwhile"):
        book.leave_out([0])
    assert not (book.folder / CURATION).exists()
    for name in ("audit.json", "audit.safetensors"):
        (book.folder / name).write_bytes((tmp_path / name).read_bytes())
    book.leave_out([0])
    assert (book.folder / CURATION).exists()


def test_what_is_no_audit_is_an_error(tmp_path: Path) -> None:
    make_audit(tmp_path / "audit")
    (tmp_path / "audit" / "audit.json").write_text("{}")
    with pytest.raises(AuditError, match="Run `invdiff audit` again"):
        AuditBook(Parts(audit=tmp_path / "audit"))


def test_an_image_that_cannot_be_shown_is_crossed_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((run / "data" / "images" / "0-0.png").read_bytes())
    for place in (0, 1):
        (run / "data" / "images" / f"0-{place}.png").unlink()
    (run / "data" / "images" / "0-1.png").symlink_to(tmp_path / "secret.png")
    book = AuditBook(find_parts(run))
    tile = nothing_to_show(64).tobytes()
    shown = [book.image(position).tobytes() == tile for position in range(3)]
    assert shown == [True, True, False]
    tab = _Tab(book)
    assert len(tab.opened(tab.tab.first())["typical-0"]) == 12


class _Tab:
    """An audit tab outside a browser; values by the component they go to."""

    def __init__(self, *books: AuditBook) -> None:
        with gr.Blocks():
            self.tab = AuditTab({f"run {k}": book for k, book in enumerate(books)}, Pictures())

    def opened(self, values: list[Any]) -> dict[str, Any]:
        return {part.elem_id or type(part).__name__: v for part, v in zip(self.tab.loads, values, strict=True)}

    def shown(self, values: list[Any]) -> dict[str, Any]:
        return {part.elem_id or type(part).__name__: v for part, v in zip(self.tab.outputs, values, strict=True)}

    def at(self, place: int, book: int = 0) -> tuple[str, int, int, str]:
        """What a browser sends of a prompt that is shown."""
        return f"run {book}", place, 12, f"{book} {place}"


def test_a_prompt_is_shown_with_its_groups(book: AuditBook) -> None:
    tab = _Tab(book)
    shown = tab.opened(tab.tab.first())
    assert "90%" in shown["group-0"]
    assert "18 images" in shown["group-0"]
    assert "2 images" in shown["group-1"]
    assert len(shown["typical-0"]) == 12
    assert len(shown["typical-1"]) == 2
    assert shown["audit-cut-0"]["visible"]
    assert "data:image/png" in shown["audit-plot"]
    path, name = shown["typical-1"][0]
    assert name == book.names[book.pages[0].groups[1].typical[0]]
    assert Image.open(path).getpixel((0, 0)) == (40, 40, 200)  # blue is group 1


def test_moved_images_are_framed_and_counted(book: AuditBook) -> None:
    tab = _Tab(book)
    page = book.pages[0]
    cut = float(np.sort(page.scores[page.labels == page.groups[0].index])[-3])
    shown = tab.shown(tab.tab._show(*tab.at(0), cut))
    assert "3 images from “group 0” to “group 1”" in shown["audit-moved"]
    moved = [path for path, name in shown["nearest-1"] if name.startswith("moved: ")]
    assert len(moved) == 3
    assert {Image.open(path).getpixel((0, 0)) for path in moved} == {(0xE6, 0x9A, 0x1F)}  # the colour of group 0
    assert not any(name.startswith("moved: ") for _, name in shown["nearest-0"])
    assert "25%" in shown["group-1"]
    same = tab.shown(tab.tab._show(*tab.at(0), page.cuts[0]))
    assert same["audit-moved"] == ""
    assert 'role="alert"' in tab.shown(tab.tab._show(*tab.at(0), None))["audit-moved"]


def test_a_name_is_saved_alone_and_shown(book: AuditBook) -> None:
    tab = _Tab(book)
    shown = tab.opened(tab.tab._namer(1)(*tab.at(0), "on <b>water</b>"))
    assert "Name saved" in shown["audit-status"]
    assert "on &lt;b&gt;water&lt;/b&gt;" in shown["group-1"]
    assert reopened(book).group_names() == [["group 0", "on <b>water</b>"]]
    refused = tab.opened(tab.tab._namer(0)(*tab.at(0), "x" * 61))
    assert 'role="alert"' in refused["audit-status"]
    assert "at most 60 characters" in refused["audit-status"]


def test_an_image_is_chosen_left_out_and_put_back(book: AuditBook) -> None:
    tab = _Tab(book)
    positions = tab.opened(tab.tab.first())
    states = dict(zip(tab.tab.loads, tab.tab.first(), strict=True))[tab.tab._positions]
    assert positions
    event = type("Event", (), {"index": 1})()
    picked, details = tab.tab._picker("typical 1")(event, "run 0", states)
    assert picked == ("run 0", book.pages[0].groups[1].typical[1])
    assert book.names[picked[1]] in details
    shown = tab.opened(tab.tab._leave_out(*tab.at(0), picked))
    assert "counts nowhere now" in shown["audit-status"]
    assert "it was left out" in shown["audit-chosen"]
    assert len(shown["left-out"]) == 1
    assert "1 image<" in shown["group-1"]
    shown = tab.opened(tab.tab._put_back(*tab.at(0), picked))
    assert "counts again" in shown["audit-status"]
    assert shown["left-out"] == []
    for attempt, words in (
        (tab.tab._leave_out(*tab.at(0), None), "Expected an image to be chosen first"),
        (tab.tab._leave_out(*tab.at(0), ("run 7", 0)), "Expected an image to be chosen first"),
        (tab.tab._put_back(*tab.at(0), picked), "one that was not"),
    ):
        assert words in tab.opened(attempt)["audit-status"]
    assert book.edits.left_out == ()


def test_many_images_left_out_are_counted_and_some_shown(book: AuditBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invdiff.app.audit_view.MOST_PER_GROUP", 8)
    book.leave_out(range(11))
    tab = _Tab(book)
    shown = tab.opened(tab.tab.first())
    assert len(shown["left-out"]) == 8
    assert "11 images left out, of which 8 are shown" in shown["left-out-note"]


def test_thresholds_are_kept_and_reset(book: AuditBook) -> None:
    tab = _Tab(book)
    page = book.pages[0]
    cut = float(np.sort(page.scores[page.labels == page.groups[0].index])[-3])
    shown = tab.opened(tab.tab._keep_cuts(*tab.at(0), cut))
    assert "1 prompt parted by hand" in shown["audit-status"]
    assert "15 images" in shown["group-0"]
    assert shown["audit-cut-0"]["value"] == pytest.approx(cut, abs=1e-3)
    shown = tab.opened(tab.tab._reset_cuts(*tab.at(0)))
    assert "no changes" in shown["audit-status"]
    assert "18 images" in shown["group-0"]


def test_what_is_not_shown_yet_is_not_changed(book: AuditBook) -> None:
    tab = _Tab(book)
    picked = ("run 0", 0)
    stale = ("run 0", 1, 12, "0 0")  # prompt 1 was chosen, the sliders are still those of prompt 0
    for attempt in (
        tab.tab._keep_cuts(*stale, 0.5),
        tab.tab._reset_cuts(*stale),
        tab.tab._namer(0)(*stale, "name"),
        tab.tab._leave_out(*stale, picked),
    ):
        assert "found another still there" in tab.opened(attempt)["audit-status"]
    assert not (book.folder / CURATION).exists()
    assert tab.shown(tab.tab._show(*stale, 99.0))["audit-moved"] == ""


def test_another_audit_is_shown_as_a_whole(book: AuditBook, tmp_path: Path) -> None:
    make_audit(tmp_path / "audit", prompts=("a fish",), rare=5)
    other = AuditBook(Parts(audit=tmp_path / "audit"))
    tab = _Tab(book, other)
    page, *values = tab.tab._open_book("run 1", 12)
    assert page["choices"] == [("1. a fish", 0)]
    shown = tab.opened(values)
    assert "5 images" in shown["group-1"]
    assert shown["audit-at"] == "1 0"
    assert shown["audit-chosen"] == tab.opened(tab.tab.first())["audit-chosen"]
    tab.tab._namer(0)(*tab.at(0, 1), "theirs")
    assert other.group_names() == [["theirs", "group 1"]]
    assert book.group_names() == [["group 0", "group 1"]]


def test_a_group_emptied_by_hand_leaves_no_threshold(tmp_path: Path) -> None:
    make_audit(tmp_path / "audit", rare=4)
    tensors = load_file(tmp_path / "audit" / "audit.safetensors")
    labels = tensors["group_weights.0"].argmax(axis=1)
    labels[labels == 1] = [1, 1, 2, 2] * 2
    tensors["group_weights.0"] = np.eye(3, dtype=np.float32)[labels]
    tensors["scores"] = (10.0 * labels + np.linspace(0, 1, len(labels))).astype(np.float32)
    save_file(tensors, tmp_path / "audit" / "audit.safetensors")
    document = json.loads((tmp_path / "audit" / "audit.json").read_text())
    document["num_groups"] = [3]
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(document))
    book = AuditBook(Parts(audit=tmp_path / "audit"))
    tab = _Tab(book)
    shown = tab.opened(tab.tab.first())
    assert [shown[f"audit-cut-{k}"]["visible"] for k in (0, 1)] == [True, True]
    page = book.pages[0]
    book.leave_out(page.rows[page.labels == 2].tolist())
    shown = tab.opened(tab.tab.first())
    assert [shown[f"audit-cut-{k}"]["visible"] for k in (0, 1)] == [False, False]
    assert "parted by their scores" in tab.opened(tab.tab._keep_cuts(*tab.at(0), 5.0, 15.0))["audit-status"]


def test_an_audit_that_found_nothing_says_so(tmp_path: Path) -> None:
    make_audit(tmp_path / "audit", found=False)
    tab = _Tab(AuditBook(Parts(audit=tmp_path / "audit")))
    shown = tab.opened(tab.tab.first())
    assert "No hidden group was found" in shown["audit-facts"]
    assert LAND in shown["audit-tables"]
    assert not shown["audit-cut-0"]["visible"]


def test_groups_that_scores_do_not_part_have_no_threshold(tmp_path: Path) -> None:
    make_audit(tmp_path / "audit")
    tensors = load_file(tmp_path / "audit" / "audit.safetensors")
    tensors["scores"] = np.random.default_rng(0).permutation(tensors["scores"])
    save_file(tensors, tmp_path / "audit" / "audit.safetensors")
    book = AuditBook(Parts(audit=tmp_path / "audit"))
    tab = _Tab(book)
    assert not tab.opened(tab.tab.first())["audit-cut-0"]["visible"]
    assert "parted by their scores" in tab.opened(tab.tab._keep_cuts(*tab.at(0), 0.0))["audit-status"]


def test_hostile_text_is_text_in_every_piece(tmp_path: Path) -> None:
    prompts = tuple(text for text in NASTY if text.strip())[:6]
    data = make_audit(tmp_path / "audit", prompts=prompts)
    assert data is not None
    document = json.loads((tmp_path / "audit" / "audit.json").read_text())
    document["names"] = [f"{NASTY[k % len(NASTY)]}{k}" for k in range(len(document["names"]))]
    for prompt in document["prompts"]:
        prompt |= {"reason": SCRIPT, "evidence": SCRIPT}
    document["prompts"][0]["found"] = False
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(document))
    book = AuditBook(Parts(audit=tmp_path / "audit"))
    book.rename(0, 0, "<script>alert(1)</script>")
    book.rename(0, 1, "\u202e\"'><img src=x>")
    tab = _Tab(book)
    shown = [tab.tab._open("run 0", place, 12) for place in range(len(book.pages))]
    shown.append([tab.tab._view.details(book, at) for at in range(len(book.names))])
    shown.append([refusal(text) for text in NASTY])
    for html in (value for values in shown for value in values if isinstance(value, str)):
        assert "<script" not in html
        assert "<img src=x" not in html
        assert "\u202e" not in html


def test_each_picture_is_written_once_and_old_ones_go(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, most=2)
    images = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 1, 2)]
    paths = [pictures.path(image) for image in images]
    assert len(set(paths)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(Path(path).name for path in paths[1:])
    before = os.stat(paths[2]).st_mtime_ns
    assert pictures.path(images[2].copy()) == paths[2]
    assert os.stat(paths[2]).st_mtime_ns == before
    assert Image.open(pictures.path(images[0])).tobytes() == images[0].tobytes()


def test_a_frame_leaves_the_image_as_it_was() -> None:
    image = Image.new("RGB", (64, 64), "white")
    marked = framed(image, "#112233")
    assert marked.getpixel((0, 0)) == (0x11, 0x22, 0x33)
    assert marked.getpixel((32, 32)) == (255, 255, 255)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_an_audit_without_its_images_says_that_they_were_not_given(run: Path) -> None:
    tab = _Tab(AuditBook(Parts(audit=run / "audit")))
    shown = tab.opened(tab.tab.first())
    assert "invdiff ui --data DATA" in shown["audit-facts"]
    assert shown["typical-0"] == []
    with_images = _Tab(AuditBook(find_parts(run)))
    assert "--data" not in with_images.opened(with_images.tab.first())["audit-facts"]
