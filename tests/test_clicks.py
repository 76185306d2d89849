"""An attribute named by clicks: which images are asked about, what is kept, and what is inferred of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from conftest import make_tiny_pipeline
from extras import gr
from invdiff import Audit, audit, load_captioned_images
from invdiff.app.audit import AuditBook, AuditTab
from invdiff.app.clicks import ClicksPanel
from invdiff.app.page import open_workspace
from invdiff.app.studio import Studio
from invdiff.auditing.asked import labels_asked
from invdiff.auditing.clicks import next_to_label, random_order, random_sample, read_clicks, write_clicks
from invdiff.auditing.edits import apply
from invdiff.errors import DataError
from invdiff.report.audit_view import another
from invdiff.report.read import find_parts, read_run
from test_labels import SMALL, VALUES, write_labelled_folder

pytestmark = pytest.mark.usefixtures("plain")


def test_half_are_least_certain_from_each_cell_in_turn_and_half_the_next_in_random_order():
    prompt_ids, asked = np.repeat([0, 1], 50), np.zeros(100, dtype=bool)
    sure = 0.504 + 0.004 * np.arange(100)  # of group 0 where even, of group 1 where odd
    sure[1] = 0.5  # nothing is known of it
    weights = np.where(np.arange(100)[:, None] % 2 == [0, 1], sure[:, None], 1 - sure[:, None])
    order = random_order(prompt_ids, seed=3)
    ten = next_to_label(weights, prompt_ids, asked, seed=3)
    assert ten.tolist() == sorted(order[:10].tolist())
    assert np.bincount(prompt_ids[ten]).tolist() == [5, 5]
    asked[0] = True
    least_certain = [2, 3, 50, 51, 4]
    drawn = [at for at in order if at not in (0, *least_certain)][:5]
    assert next_to_label(weights, prompt_ids, asked, seed=3).tolist() == sorted([*least_certain, *drawn])
    asked[:97] = True
    assert next_to_label(weights, prompt_ids, asked).tolist() == [97, 98, 99]


def test_any_beginning_of_the_random_order_is_a_random_sample():
    prompt_ids, asked = np.repeat([0, 1], [90, 10]), np.zeros(100, dtype=bool)
    first = [random_order(prompt_ids, seed)[:20] for seed in range(400)]
    assert {int((prompt_ids[own] == 1).sum()) for own in first} <= {1, 2, 3}
    counts = np.bincount(np.concatenate(first), minlength=100) / 400
    assert abs(counts - 0.2).max() < 0.09  # four standard errors
    order = random_order(prompt_ids)
    asked[order[[0, 1, 2, 4]]] = True
    assert random_sample(prompt_ids, asked).tolist() == order[:3].tolist()
    assert len(random_sample(prompt_ids, ~np.zeros(100, dtype=bool))) == 100


class Page:
    """The panel outside a browser; values by the component that they go to."""

    def __init__(self, run, pipe, cache):
        self.books = {"run": AuditBook(open_workspace([run], model="x").runs["run"])}
        with gr.Blocks():
            self.tab = AuditTab(self.books, None, 6)
            self.panel = ClicksPanel(self.tab, Studio(pipe), cache)
        self.show(self.panel.begin(self.tab.at.value, "place: land, water"))

    def show(self, values):
        self.shown = {part.elem_id: value for part, value in values.items() if part.elem_id}
        self.ask = values.get(self.panel._ask)

    def click(self, slots):
        for slot in slots:
            value = VALUES[self.ask.positions[slot]] or "cannot tell"
            said = self.panel.answer(self.ask, slot, value)
        return said

    def infer(self):
        for values in self.panel.infer(self.ask):
            self.show(values)


@pytest.fixture
def data(tiny_pipe, tmp_path, monkeypatch):
    """Images with labels, in a run that holds their audit."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shown"))
    data = load_captioned_images(write_labelled_folder(tmp_path / "run" / "data"))
    found = audit(tiny_pipe, data, config=SMALL, cache_dir=tmp_path / "cache", progress=False)
    found.save(tmp_path / "run" / "audit")
    return data


def test_clicks_are_kept_and_spread_to_an_audit_that_the_page_goes_on_with(data, tiny_pipe, tmp_path):
    run = tmp_path / "run"
    page = Page(run, tiny_pipe, tmp_path / "cache")
    assert "7 of these 10 left" in page.click(range(3))
    page = Page(run, tiny_pipe, tmp_path / "cache")  # the first was killed: none is asked about again
    page.infer()
    assert "more of" in page.shown["ask-status"]
    assert not (run / "audit-place").exists()
    page.click(range(len(page.ask.positions)))
    kept = read_clicks(run / "labels-place.csv", "place")
    assert kept == {name: VALUES[data.names.index(name)] for name in kept}
    page.infer()
    assert "Of images drawn at random" in page.shown["ask-figures"]
    assert len(list((tmp_path / "cache" / "evidence").iterdir())) == 1  # measured once
    found = Audit.load(run / "audit-place")
    looks = -(-len(kept) // 10)
    assert found.settings["level"] == pytest.approx(0.05 / looks / (looks + 1))  # of all looks together, .05
    given = labels_asked(run / "labels-place.csv", data.names)
    assert found.settings["asked"]["labels"]["place"]["images"]["land"] == given["place"].count("land")
    # Images that were left out of either audit stay out, and an audit made otherwise stays.
    for folder, position in (("audit", 3), ("audit-place", 5)):
        made = Audit.load(run / folder)
        apply(made, made.edits.without_images([position])).save_edits(run / folder)
    page = Page(run, tiny_pipe, tmp_path / "cache")
    page.infer()
    assert Audit.load(run / "audit-place").edits.left_out == (3, 5)
    shutil.copytree(run / "audit", run / "audit-kind")
    page.show(page.panel.begin(page.tab.at.value, "kind: a, b"))
    assert "found another audit there" in page.shown["ask-status"]
    shutil.rmtree(run / "audit-kind")
    reopened = {name: parts.audit for name, parts in open_workspace([run], model="x").audits.items()}
    assert reopened == {"run": run / "audit", "run, audit-place": run / "audit-place"}
    assert list(page.books) == list(reopened)


def test_a_report_shows_the_audit_that_its_module_was_trained_with(run):
    first = Audit.load(run / "audit")
    made = replace(first, group_weights=[weights[:, ::-1] for weights in first.group_weights])
    made.save(run / "audit-place")
    (run / "labels-place.csv").write_text("file_name,place\n")
    for of, folder in ((first, "audit"), (made, "audit-place")):
        (run / "module" / "config.json").write_text(json.dumps({"record": {"audit": of.fingerprint}}))
        parts = find_parts(run)
        assert parts.audit == run / folder
        assert another(read_run(parts)) == ""
    assert "trained with another audit" in another(read_run(replace(parts, audit=run / "audit")))
    made = Audit.load(run / "audit-place")
    apply(made, made.edits.without_images([0])).save_edits(run / "audit-place")
    assert "trained with this audit before people changed it" in another(read_run(parts))
    (run / "audit-old").mkdir()
    (run / "audit-old" / "audit.json").write_text("{}")
    assert find_parts(run).audit == run / "audit-place"  # whatever lies beside them
    (run / "module" / "config.json").unlink()
    assert find_parts(run).audit == run / "audit-place"


def test_labels_with_further_columns_are_not_written_anew(run):
    (run / "labels-place.csv").write_text("file_name,place,note\na.png,sea,dull\n")
    with pytest.raises(DataError, match="found also note"):
        read_clicks(run / "labels-place.csv", "place")


def test_clicks_go_on_with_the_model_of_the_audit_alone(data, tmp_path):
    labels = {name: value for name, value in zip(data.names, VALUES, strict=True) if value}
    write_clicks(tmp_path / "run" / "labels-place.csv", "place", labels)
    page = Page(tmp_path / "run", make_tiny_pipeline(seed=1), tmp_path / "cache")
    page.infer()
    assert "Expected the model of the audit of run, got other weights" in page.shown["ask-status"]
