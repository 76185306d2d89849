"""An audit as the annotator of what its model draws."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_guidance_lora, make_tiny_pipeline
from invdiff import Audit, AuditConfig, GenerateConfig, Results, audit, evaluate, generate, load_guidance
from invdiff.auditing import probe
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.evidence import Evidence
from invdiff.auditing.probe import linear_judges
from invdiff.auditing.result import PromptAudit
from invdiff.data.captioned import load_captioned_images
from invdiff.data.encode import model_fingerprint
from invdiff.errors import ConfigError, EvaluationError, ModelError
from invdiff.evaluation.annotators.load import load_annotator
from invdiff.evaluation.calibrate import calibrate, nearest_mix
from invdiff.models.frozen import denoiser_fingerprint
from invdiff.models.load import load_pipeline
from runs import LAND, WATER, built_audit, inferred, made_up_data, sharded
from test_cli import fail, succeed
from test_factors import PROMPT, attribute, evidence, views
from test_labels import write_labelled_folder


def every(rows):
    return np.ones(len(rows), dtype=bool)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The folder of an audit of noise by a column, and of images that its model drew."""
    folder, pipe = tmp_path_factory.mktemp("audited"), make_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    data = load_captioned_images(write_labelled_folder(folder / "data"))
    options = {"cache_dir": folder / "cache", "progress": False}
    audit(pipe, data, attribute="place", config=AuditConfig(min_images=4), **options).save(folder / "audit")
    settings = GenerateConfig(images_per_prompt=4, num_inference_steps=2)
    generate(pipe, [LAND, WATER], folder / "images", config=settings, progress=False)
    return folder


def test_a_judge_reads_the_groups_off_plain_features():
    measured = evidence(views(), upper=views(attribute([0.1, 0.9])))
    found = inferred(made_up_data(["a landbird", "a waterbird"], PROMPT), measured, [0, 1])
    judges = linear_judges(found, measured.sources(0), every)
    rows = np.arange(len(PROMPT))
    middle, upper = measured.features.numpy(rows), measured.upper.numpy(rows)
    parts = [part for level in (0, 1) for part in (middle[:, level], upper[:, level, 0], upper[:, level, 1])]
    seen = (np.concatenate(parts, axis=1) @ judges["map.0"] + judges["bias.0"]).argmax(axis=1)
    assert (seen == found.group_weights[0].argmax(axis=1)).mean() > 0.95
    left_out = judges["probabilities.0"].argmax(axis=1)
    assert (left_out == judges["truth.0"]).mean() > 0.95
    assert sorted(judges) == ["bias.0", "map.0", "probabilities.0", "truth.0"]


def test_a_judge_of_many_images_is_fitted_on_every_prompt_in_whatever_order_they_come(monkeypatch):
    monkeypatch.setattr(probe, "MOST_JUDGED", 100)
    prompts, groups = np.arange(400) % 2, np.arange(400) // 2 % 2
    features = np.random.default_rng(0).normal(size=(400, 2, 6))
    features[np.arange(400), :, prompts] += 6.0 * groups[:, None]  # on another axis under each prompt
    measured = Evidence(np.zeros((400, 1, 2, 1)), sharded(features))
    entries = [PromptAudit(each, [each], 200, True, "") for each in (LAND, WATER)]
    judges = linear_judges(built_audit(np.eye(2)[groups], prompts, entries), measured.sources(0), every)
    both_levels = np.concatenate([features[:, 0], features[:, 1]], axis=1)
    seen = (both_levels @ judges["map.0"] + judges["bias.0"]).argmax(axis=1)
    assert all((seen == groups)[prompts == prompt].mean() > 0.9 for prompt in (0, 1))


def test_a_copy_of_an_image_does_not_tell_its_group_when_left_out(audited, tmp_path):
    data = load_captioned_images(audited / "data")
    other = [WATER if caption == LAND else LAND for caption in data.captions]
    names = [*data.names, *(f"again-{name}" for name in data.names)]
    twice = replace(data.select([*range(len(data))] * 2), captions=[*data.captions, *other], names=names)
    options = {"cache_dir": tmp_path, "progress": False, "config": AuditConfig(min_images=4)}
    judges = [audit(load_pipeline(audited / "model"), of, attribute="place", **options).judges for of in (data, twice)]
    assert len(judges[1]["truth.0"]) == len(judges[0]["truth.0"])


def test_what_an_image_shows_does_not_hang_on_those_beside_it_and_people_s_changes_are_told(audited, tmp_path):
    found = Audit.load(audited / "audit")
    folder = found.save(tmp_path / "audit")
    judge = load_annotator(str(folder), model=str(audited / "model"))
    images = [Image.open(path) for path in sorted((audited / "images").rglob("0*.png"))]
    together = judge.predict(images).probabilities["place"]
    assert np.allclose(together, np.concatenate([judge.predict([each]).probabilities["place"] for each in images]))
    assert "curation.json" not in judge.note
    apply(found, found.edits.without_images([0])).save_edits(folder)
    assert "without the changes of people in curation.json" in load_annotator(str(folder), model=judge._pipe).note


def test_groups_that_are_each_prompts_own_or_too_small_have_no_judge():
    measured = Evidence(np.zeros((40, 1, 2, 1)), sharded(np.random.default_rng(0).normal(size=(40, 2, 6))))
    found = built_audit(np.eye(2)[np.arange(40) // 36], np.zeros(40, dtype=int), [])
    assert linear_judges(found, measured.sources(0), every) == {}


def test_images_are_judged_by_the_command(audited, tmp_path):
    words = ["--annotator", audited / "audit", "--annotator-model", audited / "model", "--attribute", "place", "-q"]
    printed = succeed("evaluate", audited / "images", *words, "--output", tmp_path / "results.json")
    results = Results.load(tmp_path / "results.json")
    told = f"agree on place in {results.annotator.accuracy['place']:.1%} of the training images left out"
    assert told in printed
    assert "share their eyes" in printed
    assert results.classes["place"] == ("land", "water")
    assert "shares the audit's mistakes" in results.notes[0]
    assert np.sum(results.annotator.confusion["place"]) == 18  # every labelled image was left out once


def test_prompts_that_a_factor_does_not_split_have_no_figures_of_it(audited, tmp_path):
    found = Audit.load(audited / "audit")
    (prompt,) = found.prompts
    prompts = [replace(prompt, captions=[LAND]), replace(prompt, prompt=WATER, captions=[WATER], found=False)]
    folder = replace(found, prompts=prompts).save(tmp_path / "audit")
    judge = load_annotator(str(folder), model=str(audited / "model"))
    results = evaluate(audited / "images", judge, "place", progress=False)
    assert [list(measures.first.counts) for *_, measures in results.each()] == [[LAND]]
    for *_, measures in results.each():
        of_groups = {name: figures["images"].value for name, figures in measures.by_group.items()}
        assert of_groups == measures.first.counts[LAND]


def test_a_factor_without_a_judge_is_called_so(audited, tmp_path):
    found = Audit.load(audited / "audit")
    twice = {"group_weights": found.group_weights * 2, "scores": np.concatenate([found.scores] * 2), "edits": Edits()}
    replace(found, **twice, factors=[*found.factors, replace(found.factors[0], name="rare")]).save(tmp_path)
    judge = load_annotator(str(tmp_path), model=audited / "model")
    with pytest.raises(EvaluationError, match="place, got 'rare', of which the audit has no judge"):
        evaluate(audited / "images", judge, "rare", progress=False)


def test_the_judge_needs_the_model_that_was_audited(audited, tmp_path):
    with pytest.raises(ConfigError, match=r"the audited model \(--annotator-model\) beside"):
        load_annotator(str(audited / "audit"))
    with pytest.raises(ConfigError, match=r"Expected LoRAs of an audited model.*got style"):
        load_annotator("labels", attribute="place", loras=["style"])
    with pytest.raises(ModelError, match="Expected the model that was audited"):
        load_annotator(str(audited / "audit"), model=make_tiny_pipeline(seed=1))
    found = Audit.load(audited / "audit")
    judge = load_annotator(str(found.save(tmp_path / "again")), model=str(audited / "model"))
    assert dict(judge.attributes) == {"place": ("land", "water")}
    half = load_pipeline(audited / "model", device="cpu", dtype=torch.bfloat16)
    prints = {"denoiser_fingerprint": denoiser_fingerprint(half), "model_fingerprint": model_fingerprint(half)}
    replace(found, settings=found.settings | prints | {"dtype": "bf16"}).save(tmp_path / "half")
    judge = load_annotator(str(tmp_path / "half"), model=str(audited / "model"))
    assert judge.network.dtype == torch.bfloat16  # as it was audited
    (tmp_path / "again" / "judges.safetensors").unlink()
    with pytest.raises(ModelError, match="there is no judge"):
        load_annotator(str(tmp_path / "again"), model=make_tiny_pipeline())


def test_the_nearest_mix_makes_images_even_or_says_how_near_they_come():
    mix, reached = nearest_mix(np.array([[0.9, 0.1], [0.3, 0.7]]))
    assert mix == pytest.approx([1 / 3, 2 / 3], abs=1e-3)
    assert reached == pytest.approx([0.5, 0.5], abs=1e-3)
    # No group shows the second half the time.
    mix, reached = nearest_mix(np.array([[0.95, 0.05], [0.6, 0.4]]))
    assert mix == pytest.approx([0, 1], abs=1e-3)
    assert reached == pytest.approx([0.6, 0.4], abs=1e-3)
    assert nearest_mix(np.full((3, 3), 1 / 3))[0] == pytest.approx(np.full(3, 1 / 3), abs=1e-3)


def test_training_calibrates_the_mix_that_images_are_then_drawn_by(audited, tmp_path, monkeypatch):
    monkeypatch.setitem(calibrate.__kwdefaults__, "images", 8)
    words = [audited / "model", audited / "data", audited / "audit", "--output", tmp_path / "m", "--preserve", 0, "-q"]
    words += ["--cache-dir", audited / "cache", "--backend", "lora", "--null-adapter", "off", "--calibrate", 3]
    words += ["--steps", 1, "--batch-size", 4]
    assert f"{tmp_path / 'images' / 'guided'} --environments calibrated" in succeed("train", *words)
    mixes = json.loads((tmp_path / "m" / "config.json").read_text())["mixes"]
    assert set(mixes["3"]) == {LAND}  # the prompt whose shares are uneven
    assert all(sum(mix) == pytest.approx(1) for (mix,) in mixes["3"].values())
    assert not (tmp_path / "m" / ".calibration").exists()
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| lora; in the null row of classifier-free guidance it is off |" in card
    assert "| Mix calibrated at guidance scale | 3 |" in card
    drawing = ["--module", tmp_path / "m", "--environments", "calibrated", "--steps", 1, "--images-per-prompt", 32]
    succeed("generate", audited / "model", LAND, *drawing, "--output", tmp_path / "images", "-q")
    rows = [json.loads(line) for line in (tmp_path / "images" / "manifest.jsonl").read_text().splitlines()]
    assert sum(row["environment"] == [1] for row in rows) / 32 == pytest.approx(mixes["3"][LAND][0][1], abs=1 / 32)
    words[words.index("--output") + 1], words[words.index("--calibrate") + 1] = tmp_path / "n", 1
    assert "--environments calibrated --guidance-scale 1" in succeed("train", *words)
    error = fail("generate", audited / "model", LAND, *drawing, "--guidance-scale", 5, "--output", tmp_path, "-q")
    assert "calibrated for 'a photo of a landbird' at guidance scale 5, found 3:" in error


@pytest.mark.parametrize("better", ["on", "off", [["on", "off"]]])
def test_calibration_keeps_the_better_null_row_and_draws_nothing_twice(better, audited, tmp_path, capsys, monkeypatch):
    drawn, places, manifest = [], (audited / "audit", tmp_path / "m"), []

    def counted(*arguments, module, config, **options):
        drawn.append((module.config["null_adapter"], config.guidance_scale))
        folder = generate(*arguments, module=module, config=replace(config, num_inference_steps=1), **options)
        manifest[:] = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
        return folder

    def judged(*_, **__):  # images show the group that they were drawn for where the null row is the better one
        groups, of = [row["environment"][0] for row in manifest], [[better] * 2] if better in ("on", "off") else better
        right = [drawn[-1][0] in (of[0][group], better) for group in groups]
        return SimpleNamespace(classes={"place": np.where(right, np.subtract(1, groups), groups)})  # and it errs

    monkeypatch.setattr("invdiff.evaluation.calibrate.generate", counted)
    monkeypatch.setattr("invdiff.evaluation.calibrate.describe_images", judged)
    monkeypatch.setattr("invdiff.evaluation.calibrate.correct_for_annotator", lambda counts, _: counts[:, 1::-1])
    pipe = load_pipeline(audited / "model", device="cpu")
    options = {"images": 4, "choose_null": True, "progress": False}
    pipe.set_progress_bar_config(disable=True)
    guidance = make_guidance_lora(pipe, null_adapter="off")
    guidance.register_to_config(factor_names=["place"])
    kept = calibrate(pipe, guidance, *places, guidance_scales=(1.0, 3.0), **options).config["null_adapter"]
    assert kept == better
    assert capsys.readouterr().err.count("is kept") == 2
    assert drawn == [("off", 3.0), ("on", 3.0), (better, 1.0)]
    rows = torch.tensor([[0], [1]])
    assert guidance.guides_null(rows).tolist() == [better in ("on", [["on", "off"]]), better == "on"]
    # Another scale later is drawn with what was kept, and those that are known are not drawn again.
    again = calibrate(pipe, load_guidance(places[1]), *places, guidance_scales=(3.0, 5.0), **options)
    assert drawn[3:] == [(better, 5.0)]
    assert (again.config["null_adapter"], set(again.config["mixes"])) == (better, {"1", "3", "5"})
    guidance.register_to_config(record={"audit": "of other images"})
    with pytest.raises(ModelError, match="the audit that the guidance was trained on"):
        calibrate(pipe, guidance, *places, guidance_scales=(7.5,), **options)
