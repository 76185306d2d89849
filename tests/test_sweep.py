"""A sweep on tiny models: every combination once, shared work shared, one tidy table, resumable."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from conftest import write_tiny_folder
from invdiff.auditing.edits import Edits
from invdiff.auditing.result import Audit, apply
from invdiff.config import AuditConfig
from invdiff.errors import AuditError, ConfigError, DataError, EvaluationError, ModelError
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.sweep import stages
from invdiff.sweep.config import AXES, SweepConfig
from invdiff.sweep.plan import cells, describe_plan
from invdiff.sweep.run import NOT_FOUND, run_sweep
from tiny import CAPTIONS

FIXED = {
    "hidden_attribute": "background",
    "prompts": list(CAPTIONS),
    "audit": {"solver": "exact", "min_images": 2, "caption_threshold": 0.0},
    "train": {"steps": 2, "batch_size": 4},
    "generate": {"images_per_prompt": 2, "num_inference_steps": 1},
}


@pytest.fixture
def fixed(tiny_pipe_dir, tmp_path):
    data = write_tiny_folder(tmp_path / "photos")
    ConvAnnotator(attributes={"background": ("land", "water")}, resolution=16).save_pretrained(tmp_path / "judge")
    return FIXED | {"model": str(tiny_pipe_dir), "data": str(data), "annotator": str(tmp_path / "judge")}


@pytest.fixture
def counted(monkeypatch):
    """Count how often each step is really done."""
    calls = dict.fromkeys(("audit", "train", "generate", "evaluate"), 0)
    for name in calls:
        original = getattr(stages, name)

        def count(*arguments, _name=name, _original=original, **keywords):
            calls[_name] += 1
            return _original(*arguments, **keywords)

        monkeypatch.setattr(stages, name, count)
    return calls


def sweep(fixed, vary, folder, **settings):
    config = SweepConfig.from_dict(fixed | {"vary": vary} | settings)
    return run_sweep(config, folder, progress=False)


def test_every_combination_is_a_row_and_the_plain_model_one_per_guidance_scale(fixed, tmp_path):
    table = sweep(fixed, {"seed": [0, 1], "guidance_scale": [1, 3]}, tmp_path / "out")
    guided = [(row["seed"], row["guidance_scale"]) for row in table.rows if row["model"] == "guided"]
    base = [(row["seed"], row["guidance_scale"]) for row in table.rows if row["model"] == "base"]
    assert guided == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert base == [(None, 1), (None, 3)]
    for row in table.rows:
        assert row["bias_low"] <= row["bias_high"]
        assert row["note"] == ""


def test_steps_with_the_same_settings_are_done_once(fixed, tmp_path, counted):
    sweep(fixed, {"seed": [0, 1], "scale": [0.5, 1.0]}, tmp_path / "out")
    assert counted["audit"] == 1
    assert counted["train"] == 2
    assert counted["evaluate"] == 5  # the plain model's images once, and beside each guided set
    assert len(list((tmp_path / "out" / "work" / "images").iterdir())) == 5


def test_a_finished_sweep_is_read_back(fixed, tmp_path, counted):
    first = sweep(fixed, {"scale": [0.5, 1.0]}, tmp_path / "out")
    before = dict(counted)
    second = sweep(fixed, {"scale": [0.5, 1.0]}, tmp_path / "out")
    assert second == first
    assert (counted["audit"], counted["evaluate"]) == (before["audit"], before["evaluate"])


def test_a_sweep_compares_settings_not_what_people_changed(fixed, tmp_path):
    first = sweep(fixed, {"scale": [1]}, tmp_path / "out")
    (folder,) = (tmp_path / "out" / "work" / "audits").iterdir()
    apply(Audit.load(folder), Edits().without_images([0])).save(folder)
    assert sweep(fixed, {"scale": [1]}, tmp_path / "out") == first


def test_what_judges_is_looked_at_before_any_work(fixed, tmp_path, counted):
    with pytest.raises(EvaluationError, match="got 'age'; it knows background"):
        sweep(fixed | {"attribute": "age"}, {"scale": [1]}, tmp_path / "out")
    with pytest.raises(ModelError, match="annotator"):
        sweep(fixed | {"annotator": str(tmp_path / "nowhere")}, {"scale": [1]}, tmp_path / "out")
    with pytest.raises(DataError):
        sweep(fixed | {"reference": str(tmp_path / "nowhere")}, {"scale": [1]}, tmp_path / "out")
    assert counted["audit"] == 0


def test_images_are_judged_again_by_another_annotator_of_the_same_name(fixed, tmp_path, counted):
    sweep(fixed, {"scale": [1]}, tmp_path / "out")
    before = counted["evaluate"]
    with torch.random.fork_rng():
        torch.manual_seed(99)
        other = ConvAnnotator(attributes={"background": ("land", "water")}, resolution=16)
    other.save_pretrained(fixed["annotator"])
    sweep(fixed, {"scale": [1]}, tmp_path / "out")
    assert counted["evaluate"] == 2 * before
    assert counted["audit"] == 1


def test_an_audit_of_images_that_have_changed_is_not_taken_for_theirs(fixed, tmp_path):
    sweep(fixed, {"scale": [1]}, tmp_path / "out")
    photo = next(Path(fixed["data"]).glob("*.png"))
    Image.new("RGB", (40, 36), (1, 2, 3)).save(photo)
    with pytest.raises(AuditError, match="they have changed"):
        sweep(fixed, {"scale": [1]}, tmp_path / "out")


def test_an_audit_that_was_interrupted_has_no_time(fixed, tmp_path, monkeypatch):
    original = stages.audit
    monkeypatch.setattr(stages, "audit", lambda *arguments, cache_dir, **_: cache_dir.mkdir(parents=True) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweep(fixed, {"num_groups": [2]}, tmp_path / "out")
    monkeypatch.setattr(stages, "audit", original)
    assert sweep(fixed, {"num_groups": [2]}, tmp_path / "out").rows[-1]["audit_seconds"] is None


def test_the_reference_is_described_at_the_confidence_of_the_images(fixed, tmp_path):
    settings = {"reference": fixed["data"], "min_confidence": 0.5, "attribute": "background"}
    config = SweepConfig.from_dict(fixed | settings | {"vary": {"scale": [1]}})
    assert stages.Workshop(tmp_path, config, progress=False).reference.min_confidence == 0.5


def test_whole_numbers_and_decimals_are_the_same_work(fixed):
    names = [
        cells(
            SweepConfig.from_dict(fixed | {"vary": {"severity": [severity], "scale": [scale], "penalty": [penalty]}})
        )
        for severity, scale, penalty in ((1, 2, 3), (1.0, 2.0, 3.0))
    ]
    assert names[0][0].images_name(guided=True) == names[1][0].images_name(guided=True)


def test_a_stopped_sweep_keeps_its_rows_and_goes_on(fixed, tmp_path, monkeypatch):
    original = stages.evaluate

    def fails_at_scale_one(folders, *arguments, **keywords):
        if "scale-1-" in str(folders.get("guided")):
            raise KeyboardInterrupt
        return original(folders, *arguments, **keywords)

    monkeypatch.setattr(stages, "evaluate", fails_at_scale_one)
    with pytest.raises(KeyboardInterrupt):
        sweep(fixed, {"scale": [0.5, 1.0]}, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [row["scale"] for row in kept if row["model"] == "guided"] == [0.5]
    monkeypatch.setattr(stages, "evaluate", original)
    table = sweep(fixed, {"scale": [0.5, 1.0]}, tmp_path / "out")
    assert [row["scale"] for row in table.rows if row["model"] == "guided"] == [0.5, 1.0]
    assert table.rows[:2] == kept


def test_the_table_is_the_same_as_csv_and_json(fixed, tmp_path):
    table = sweep(fixed, {"num_groups": [2, 3]}, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "table.json").read_text())
    assert document == {"axes": ["num_groups"], "rows": table.rows}
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["num_groups"] for row in rows] == ["", "2", "3"]
    assert [row["bias"] for row in rows] == [str(row["bias"]) for row in table.rows]


def test_groups_are_judged_by_the_hidden_attribute_and_timed(fixed, tmp_path):
    guided = sweep(fixed, {"num_groups": [2]}, tmp_path / "out").rows[-1]
    assert 0 <= guided["group_auroc"] <= 1
    assert -1 <= guided["group_adjusted_rand"] <= 1
    assert 0 <= guided["group_homogeneity"] <= 1
    assert guided["audit_seconds"] > 0
    assert guided["train_seconds"] > 0
    assert guided["forwards_per_image"] > 0


def test_without_a_hidden_attribute_groups_are_not_judged(fixed, tmp_path):
    rows = sweep(fixed | {"hidden_attribute": ""}, {"num_groups": [2]}, tmp_path / "out").rows
    assert not any("group_auroc" in row for row in rows)


def test_a_cell_whose_audit_finds_nothing_says_so_and_the_sweep_goes_on(fixed, tmp_path):
    audit = {"solver": "auto", "min_images": 100}
    table = sweep(fixed | {"audit": audit}, {"seed": [0, 1]}, tmp_path / "out")
    assert [row["note"] for row in table.rows] == ["", NOT_FOUND, NOT_FOUND]
    assert "bias" not in table.rows[1]


def test_dataset_size_and_severity_make_data_sets_of_their_own(fixed, tmp_path):
    config = SweepConfig.from_dict(fixed | {"vary": {"num_images": [0, 8], "severity": [None, 1.0]}})
    plan = cells(config)
    workshop = stages.Workshop(tmp_path / "work", config, progress=False)
    assert len({cell.data_name for cell in plan}) == 4
    # Of the twelve images one is not of its caption's usual class.
    assert [len(workshop.data(cell)) for cell in plan] == [12, 11, 8, 8]


def test_a_finetuned_model_depends_on_the_data(fixed):
    config = SweepConfig.from_dict(fixed | {"vary": {"num_images": [6, 8]}, "finetune": {"steps": 1}})
    first, second = cells(config)
    assert first.model_name != second.model_name
    assert first.base_axes == {"num_images": 6}
    plain = cells(SweepConfig.from_dict(fixed | {"vary": {"num_images": [6, 8]}}))
    assert plain[0].base_axes == {"num_images": None}


def test_finetuning_is_part_of_the_sweep(fixed, tmp_path):
    tuning = {"steps": 1, "batch_size": 4, "ema_decay": 0.5}
    table = sweep(fixed, {"num_images": [10]}, tmp_path / "out", finetune=tuning)
    assert [(row["model"], row["num_images"]) for row in table.rows] == [("base", 10), ("guided", 10)]


def test_a_value_may_set_others_along(fixed):
    vary = {"mode": ["balanced", {"mode": "invariant", "steps": 7, "lambda": 3.0}]}
    first, second = cells(SweepConfig.from_dict(fixed | {"vary": vary}))
    assert (first.config.train.steps, second.config.train.steps) == (2, 7)
    assert second.config.train.penalty == 3.0
    assert second.axes == {"mode": "invariant"}


def test_the_papers_letters_are_known(fixed):
    config = SweepConfig.from_dict(fixed | {"vary": {"Delta": [1], "lambda": [2.0], "E": [4], "omega": [0.3]}})
    (cell,) = cells(config)
    assert (cell.config.generate.scale, cell.config.train.penalty) == (1, 2.0)
    assert (cell.config.audit.num_groups, cell.config.audit.omega) == (4, 0.3)


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_changes_the_settings_of_its_step(fixed, axis):
    other = {"solver": "gradient", "mode": "invariant", "severity": 0.8, "width": 16}.get(axis, 4)
    (before,) = cells(SweepConfig.from_dict(fixed | {"vary": {"seed": [0]}}))
    (after,) = cells(SweepConfig.from_dict(fixed | {"vary": {axis: [other]}}))
    step = getattr(after.config, AXES[axis]) if AXES[axis] else after.config
    assert getattr(step, axis) == other
    assert after.images_name(guided=True) != before.images_name(guided=True)


def test_words_for_groups_make_no_other_audit(fixed):
    told = {"audit": fixed["audit"] | {"words_model": "clip", "words": ["sea"]}}
    plain, words = (cells(SweepConfig.from_dict(fixed | more | {"vary": {"seed": [0]}}))[0] for more in ({}, told))
    assert words.audit_name == plain.audit_name


def test_the_bundled_world_fills_in_what_it_stands_for():
    (cell,) = cells(SweepConfig.from_dict({"vary": {"seed": [0]}}))
    assert (cell.config.num_images, cell.config.severity) == (3000, 0.95)
    assert cell.config.prompts == ("a photo of a landbird", "a photo of a waterbird")


def test_the_amount_of_work_is_told(fixed):
    plan = cells(SweepConfig.from_dict(fixed | {"vary": {"seed": [0, 1], "guidance_scale": [1, 3]}}))
    assert describe_plan(plan) == "4 cells: 1 data sets, 1 audits, 2 modules, 6 sets of images"


def test_a_file_may_hold_all_of_it(fixed, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(fixed | {"vary": {"scale": [0.5]}}))
    config = SweepConfig.from_file(path)
    assert config.audit == AuditConfig(solver="exact", min_images=2, caption_threshold=0.0)
    assert SweepConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "vary: expected a mapping"),
        ({"vary": {}}, "at least one setting to vary"),
        ({"vary": {"steam": [1]}}, "unknown setting 'steam'; known are num_images"),
        ({"vary": {"scale": 1}}, "expected a list of values of scale, got 1"),
        ({"vary": {"scale": []}}, "expected a list of values of scale"),
        ({"vary": {"mode": [{"steps": 3}]}}, "expected mode among the settings"),
        ({"vary": {"lambda": [1], "penalty": [2]}}, "expected each setting once"),
        ({"vary": {"scale": [1]}, "audit": {"solvr": "exact"}}, "AuditConfig: unknown setting solvr"),
        ({"vary": {"scale": [1]}, "train": 3}, "expected the settings of TrainConfig"),
        ({"vary": {"severity": [0.9]}, "hidden_attribute": ""}, "the column that severity is a share of"),
        ({"vary": {"scale": [1]}, "prompts": []}, "at least one prompt"),
        ({"vary": {"scale": [1]}, "severity": 1.5}, "a share above 0, up to 1"),
    ],
)
def test_settings_that_make_no_sweep_are_refused(fixed, settings, message):
    with pytest.raises(ConfigError, match=message):
        SweepConfig.from_dict(fixed | settings)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"scale": ["strong"]}, "GenerateConfig.scale: expected a finite number"),
        ({"mode": ["fair"]}, "TrainConfig.mode: expected one of"),
        ({"mode": [{"mode": "balanced", "steam": 1}]}, "unknown setting 'steam'"),
        ({"severity": [2.0]}, "a share above 0, up to 1"),
        ({"mode": [{"mode": "invariant", "steps": 3}, {"mode": "invariant", "steps": 4}]}, "'invariant' twice"),
        ({"mode": [{"mode": "invariant", "Delta": 3}], "scale": [1]}, "expected scale to vary on its own"),
        ({"mode": [{"mode": "invariant", "guidance_scale": 3}]}, "expected guidance_scale to vary on its own"),
    ],
)
def test_values_out_of_range_are_refused_before_any_work(fixed, vary, message):
    with pytest.raises(ConfigError, match=message):
        cells(SweepConfig.from_dict(fixed | {"vary": vary}))
