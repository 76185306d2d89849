"""Benchmarks of methods: every suite names methods with settings that they take, and tables follow from kept cells."""

import json
from functools import partial
from types import SimpleNamespace

import judges
import pytest
import runner
import tables
from PIL import Image
from runner import Runner, Suite, worst_cell

from invdiff import GenerateConfig
from invdiff.errors import ConfigError
from invdiff.evaluation.annotators.labels import GivenLabels

DOCUMENT = {"base": "absent", "supervision": "none", "parameters": 8, "forwards": 9, "device": ""}
DOCUMENT |= {"seconds of fitting": 1}
FIGURES = {"bias": 0.5, "low": 0.0, "high": 1.0, "floor": 0.05, "worst cell": 0.5, "subject right": 1.0}


def keep(results, benchmark, cell, seed, figures, **others):
    """Write figures of a cell as they are kept; the file."""
    suite, path = Suite.named(benchmark), results / benchmark / f"{cell}-seed-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = suite.settings(suite.each()[cell])
    path.write_text(json.dumps(DOCUMENT | {"settings": settings, "figures": figures} | others))
    return path


def test_every_cell_can_be_fitted_and_an_unknown_benchmark_names_those_that_there_are():
    for name in Suite.names():
        assert all(cells.fitted_by().supervision for cells in Suite.named(name).each().values()), name
    with pytest.raises(ConfigError, match="waterbirds"):
        Suite.named("landbirds")


def test_a_kept_cell_is_not_run_again_and_tables_give_mean_and_range_over_seeds(tmp_path):
    results = tmp_path / "results"
    for seed, bias in ((100, 0.1), (101, 0.3)):
        of = FIGURES | {"bias": bias}
        path = keep(results, "tuning", "steps-400", seed, {"CFG 3": of, "stratified CFG 3": of})
    runner = Runner("tuning", tmp_path / "absent", tmp_path / "absent", tmp_path / "work", results)
    runner.run("steps-400", 100)
    assert not (tmp_path / "work").exists()
    text = tables.markdown("tuning", results)
    assert text.count("0.20 (0.10 to 0.30)") == 2
    assert "drawn stratified" in text
    tables.write_csv("tuning", results)
    assert len((results / "tuning.csv").read_text().splitlines()) == 3
    path.write_text(path.read_text().replace('"steps": 400', '"steps": 500'))
    for again in (lambda: runner.run("steps-400", 101), lambda: tables.markdown("tuning", results)):
        with pytest.raises(ConfigError, match=r"steps-400-seed-101.json .* settings.config.steps was 500, now 400\."):
            again()


def test_the_headline_compares_equally_many_images_drawn_and_measured_alike(tmp_path):
    kept = (("biased", 0), ("biased", 1), ("ceiling", 1), ("fair-diffusion-4", 0), ("ours-calibrated", 0))
    for cell, seed in kept:
        of = FIGURES | {"Frechet distance": 100.0 + 50 * seed}
        features = "lite-tuned-1" if seed else ""  # by an encoder that was tuned elsewhere
        keep(tmp_path, "waterbirds", cell, seed, {"CFG 3": of}, features=features)
    rows = tables.headline("waterbirds", tmp_path, [cell for cell, _ in kept]).splitlines()[2:]
    # The others have 256 images, or groups that are spread over the images.
    assert [row.split(" | ")[0] for row in rows] == ["| biased", "| ceiling"]
    assert rows[0].endswith(" 100 |")  # distances by other features are no part of a mean, nor a row's own
    assert rows[1].endswith(" - |")


def test_a_picture_of_studies_has_each_figure_over_its_own_setting(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "matplotlib.axes.Axes.errorbar", lambda _, at, bias, *__, label, **___: drawn.update({label: at})
    )
    for cell in ("severity-biased-0.6", "severity-biased-0.8", "severity-biased-0.9", "severity-0.9"):
        keep(tmp_path, "studies", cell, 0, {"CFG 3": FIGURES})
    tables.studies_picture("studies", tmp_path, tmp_path / "studies.png")
    assert drawn == {"Bias, biased": [0, 1, 2], "Bias, ours": [2]}


def test_figures_kept_under_another_default_are_refused(tmp_path):
    suite, path = Suite.named("birds"), tmp_path / "ours-seed-0.json"
    cells = suite.each()["ours"]

    def check(settings):
        path.write_text(json.dumps({"settings": settings}))
        suite.check_kept(cells, path)

    check(settings := suite.settings(cells))
    with pytest.raises(ConfigError, match=r"training.backend was 'module', now 'lora'"):
        check(settings | {"training": settings["training"] | {"backend": "module"}})
    del settings["training"]["backend"]  # as options were not, that were new since
    check(settings)
    del settings["training"]  # as it was not recorded once
    check(settings)


def test_the_worst_cell_is_the_least_share_of_bird_and_place_times_the_places(tmp_path):
    rows = [("landbird", place) for place in ("forest", "forest", "forest", "sea")]
    rows += [("waterbird", "sea"), ("waterbird", "sea"), ("waterbird", "forest"), ("landbird", "forest")]
    lines = []
    for index, (subject, place) in enumerate(rows):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{index}.png")
        prompt = f"a {('landbird', 'waterbird')[index >= 4]}"
        lines.append({"file_name": f"{index}.png", "prompt": prompt, "subject": subject, "place": place})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = GivenLabels(["subject", "place"]).discover(lines)
    labelled = SimpleNamespace(attributes={"place": ["forest", "sea"]})
    prompts = {"a landbird": "landbird", "a waterbird": "waterbird"}
    world = SimpleNamespace(labelled=labelled, subject="subject", attribute="place")
    # Waterbirds in the forest, and landbirds at sea, are 1 of 4.
    assert worst_cell(tmp_path, judge, world, prompts) == 0.5


SUITE = """
world: {kind: bundled, num_images: 40}
attribute: background
subject: subject
words: {land: on land, water: on water}
cells:
  biased: {method: biased, images: 4, scales: [1], world: {severity: 0.9}}
  given: &given
    method: guided
    settings: {config: {steps: 2, batch_size: 8, preserve: 0.0}, groups: "true"}
    images: 4
    scales: [1]
    further_scales: [2]
  stronger: {<<: *given, fitted: given, delta: 2.0, prompts: {a nice landbird: landbird}, seeds: [1, 0]}
"""


def test_wrong_names_in_a_suite_are_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "HERE", tmp_path)
    (tmp_path / "suites").mkdir()
    for written, wrong, message in (
        ("attribute: background", "", "small.yaml: Suite: expected a setting attribute"),
        ("attribute: background", "attribute: place?", r"an attribute of place, .*got 'place\?'"),
        ("kind: bundled", "kind: birds", "a world's kind of waterbirds, .*got 'birds'"),
        ("{severity: 0.9}", "{severe: 0.9}", "settings of bundled of num_images, .*got 'severe'"),
        ("method: biased", "method: base", "a method of biased, .*got 'base'"),
        ("method: biased", "method: biased, settings: {steps: 2}", "settings of biased of none, got 'steps'"),
        ("steps: 2", "step: 2", "TrainConfig: unknown setting step; known are backend, .*"),
        ("fitted: given", "fitted: biased", "fitted as stronger is as its `fitted`, got 'biased'"),
        ("cells:", "finetune: {step: 3}\ncells:", "FinetuneConfig: unknown setting step"),
    ):
        (tmp_path / "suites" / "small.yaml").write_text(SUITE.replace(written, wrong))
        with pytest.raises(ConfigError, match=message):
            Suite.named("small")


def test_cells_share_a_fit_and_change_worlds_prompts_and_strength(tiny_pipe_dir, clip_dir, tmp_path, monkeypatch):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "small.yaml").write_text(SUITE)
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(runner, "GenerateConfig", partial(GenerateConfig, num_inference_steps=2))
    monkeypatch.setitem(judges.NUM_IMAGES, "background", (0, 40))
    small = Runner("small", None, tiny_pipe_dir, tmp_path / "work", tmp_path / "results", clip=str(clip_dir))
    for cell in ("biased", "given", "stronger"):
        small.run(cell, 0)
    kept = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results" / "small").iterdir()}
    given, stronger = kept["given-seed-0"], kept["stronger-seed-0"]
    assert given["seconds of fitting"] == stronger["seconds of fitting"] > 0
    assert not (tmp_path / "work" / "small" / "seed-0" / "stronger" / "fitted").exists()
    assert kept["biased-seed-0"]["settings"]["world"] == {"kind": "bundled", "num_images": 40, "severity": 0.9}
    assert [*given["figures"]] == ["CFG 1", "CFG 2"]
    assert given["clip"] == "tiny-clip"
    small.clip = "another"
    with pytest.raises(ConfigError, match=r"by the CLIP another, found .*given-seed-0.json by tiny-clip"):
        small.run("given", 0)
    with pytest.raises(ConfigError, match=f"Expected the base of the figures in .*small, {tiny_pipe_dir.name}. Give"):
        Runner("small", None, tmp_path / "another", tmp_path / "work", tmp_path / "results")
    assert -1 <= given["figures"]["CFG 1"]["CLIP-T"] <= 1
    assert "| CLIP-T |" in tables.markdown("small", tmp_path / "results")
    assert [*stronger["figures"]] == ["CFG 1"]  # seed 0 is not its first
    assert [*stronger["figures"]["CFG 1"]["shares"]] == ["a nice landbird"]
    (tmp_path / "results" / "small" / "biased-seed-0.json").unlink()
    prompted = SUITE.replace("biased: {method: biased", "biased: {method: prompted")
    (tmp_path / "suites" / "small.yaml").write_text(prompted)
    with pytest.raises(ConfigError, match=r"biased/settings.json .* method was 'biased', now 'prompted'"):
        Runner("small", None, tiny_pipe_dir, tmp_path / "work", tmp_path / "results").run("biased", 0)
