"""A sweep on tiny models: every combination once, shared work shared, one table, resumable; and its plots."""

import csv
import json
from unittest.mock import Mock

import experiment
import pytest
import sweep_plots
import sweeps
import yaml
from experiment import NOT_FOUND, Experiment, cells
from sklearn.metrics import homogeneity_score

from conftest import write_tiny_folder
from invdiff.errors import ConfigError, EvaluationError
from invdiff.evaluation.annotators.conv import ConvAnnotator
from tiny import CAPTIONS


@pytest.fixture
def fixed(tiny_pipe_dir, tmp_path):
    data, judge = write_tiny_folder(tmp_path / "photos"), tmp_path / "judge"
    ConvAnnotator(attributes={"background": ("land", "water")}, resolution=16).save_pretrained(judge)
    settings = {"model": str(tiny_pipe_dir), "data": str(data), "annotator": str(judge), "prompts": list(CAPTIONS)}
    return settings | {
        "hidden_attribute": "background",
        "audit": {"solver": "exact", "min_images": 2, "caption_threshold": 0.0},
        "train": {"steps": 2, "batch_size": 4, "preserve": 0},
        "generate": {"images_per_prompt": 2, "num_inference_steps": 1},
    }


@pytest.fixture
def counted(monkeypatch):
    steps = {name: Mock(wraps=getattr(experiment, name)) for name in ("audit", "train", "generate", "evaluate")}
    for name, step in steps.items():
        monkeypatch.setattr(experiment, name, step)
    return lambda *names: tuple(steps[name].call_count for name in names)


def run(fixed, vary, folder):
    config = Experiment.from_dict(fixed | {"vary": vary})
    return sweeps.run_sweep(config, folder, work_dir=folder / "work", progress=False)


def test_every_combination_is_a_row_and_work_is_shared_and_read_back(fixed, tmp_path, counted):
    table = run(fixed, {"seed": [0, 1], "guidance_scale": [1, 3]}, tmp_path / "out")
    places = [(row["model"], row["seed"], row["guidance_scale"]) for row in table["rows"]]
    guided = {("guided", seed, scale) for seed in (0, 1) for scale in (1, 3)}
    assert {*places} == guided | {("base", None, 1), ("base", None, 3)}
    assert len(places) == 6
    assert all(row["bias_low"] <= row["bias_high"] and row["note"] == "" for row in table["rows"])
    assert counted("audit", "train", "evaluate") == (1, 2, 6)
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == table
    with (tmp_path / "out" / "table.csv").open() as file:
        assert [row["bias"] for row in csv.DictReader(file)] == [str(row["bias"]) for row in table["rows"]]
    guided = table["rows"][1]
    assert 0 <= guided["group_auroc"] <= 1
    assert min(guided["audit_seconds"], guided["train_seconds"], guided["forwards_per_image"]) > 0
    assert run(fixed, {"seed": [0, 1], "guidance_scale": [1, 3]}, tmp_path / "out") == table
    assert counted("audit", "evaluate") == (1, 6)


def test_a_cell_whose_audit_finds_nothing_says_so_and_the_sweep_goes_on(fixed, tmp_path):
    rows = run(fixed | {"audit": {"min_images": 100}, "hidden_attribute": ""}, {"seed": [0, 1]}, tmp_path)["rows"]
    assert [row["note"] for row in rows] == ["", NOT_FOUND, NOT_FOUND]
    assert not {"bias", "group_auroc"} & set(rows[1])


def test_a_file_with_the_papers_letters_and_values_that_set_others_along(fixed, tmp_path):
    vary = {"mode": ["balanced", {"mode": "invariant", "steps": 7, "lambda": 3.0}], "Delta": [1], "E": [4]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(fixed | {"vary": vary}))
    first, second = cells(Experiment.from_file(tmp_path / "sweep.yaml"))
    assert (first.config.train.steps, second.config.train.steps, second.config.train.penalty) == (2, 7, 3.0)
    assert second.axes == {"mode": "invariant", "scale": 1, "num_groups": 4}
    (bundled,) = cells(Experiment.from_dict({"vary": {"seed": [0]}}))
    assert (bundled.config.num_images, bundled.config.severity) == (3000, 0.95)
    assert bundled.config.prompts == ("a photo of a landbird", "a photo of a waterbird")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vary": {}}, "at least one setting to vary"),
        ({"vary": {"steam": [1]}}, "unknown setting 'steam'; known are num_images"),
        ({"vary": {"lambda": [1], "penalty": [2]}}, "expected each setting once"),
        ({"vary": {"scale": [1]}, "audit": {"solvr": "exact"}}, "AuditConfig: unknown setting solvr"),
        ({"vary": {"severity": [2.0]}}, "a share above 0, up to 1"),
    ],
)
def test_settings_that_make_no_sweep_are_refused_before_any_work(fixed, settings, message):
    with pytest.raises(ConfigError, match=message):
        cells(Experiment.from_dict(fixed | settings))


@pytest.mark.parametrize("name", sorted(path.stem for path in sweeps.SWEEPS.glob("*.yaml")))
def test_every_kept_table_is_drawn_to_the_pictures_of_the_docs(name, tmp_path):
    table = json.loads((sweeps.RESULTS / f"sweep-{name}.json").read_text())["figures"]
    kept = {path.name for path in sweeps.DOCS.glob(f"{name}-*.png")}
    kept -= {other for other in kept if name == "num-groups" and other.startswith("num-groups-gradient-")}
    assert {path.name for path in sweep_plots.save_sweep_plots(tmp_path, name, table)} == kept


CLASSES = ["land"] * 8 + ["water"] * 2


def test_prompts_weigh_by_images_and_those_in_which_nothing_is_hidden_are_left_out():
    prompts = [0] * 10 + [1] * 5 + [2] * 10
    classes = [*CLASSES, "water", "water", "water", "water", "land", *["water"] * 10]
    groups = [*[0] * 8, 1, 1, 0, 0, 1, 1, 1, *[0] * 10]
    found = sweeps.group_quality(prompts, [*[0] * 8, 1, 1, *[0, 1, 0, 1], 0.5, *range(10)], groups, classes)
    assert found["auroc"] == pytest.approx((10 * 1.0 + 5 * 0.5) / 15)
    second = homogeneity_score(classes[10:15], groups[10:15])
    assert found["homogeneity"] == pytest.approx((10 * 1.0 + 5 * second) / 15)
    with pytest.raises(EvaluationError, match="varies within a prompt"):
        sweeps.group_quality([2] * 10, range(10), [0] * 10, ["water"] * 10)
