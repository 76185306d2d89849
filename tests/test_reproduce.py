"""The commands of a report are the real ones, quoted for a shell, and name no path of the machine."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from invdiff import Audit, AuditConfig, DemoConfig, GenerateConfig, TrainConfig
from invdiff.evaluation.results import AnnotatorRecord, AttributeMeasures, Estimate, Measures, Quantity, Results
from invdiff.report.read import Generated, Run, shown_path, without_paths
from invdiff.report.reproduce import MOST_WORDS, commands, reproduce

BIRD = "a photo of a bird"


def audited(**settings):
    settings = AuditConfig().to_dict() | {"denoiser_fingerprint": "0123"} | settings
    return Audit((np.eye(2, dtype=np.float32),), np.zeros((1, 2)), np.zeros(2, int), [], [], ["a", "b"], 6.0, settings)


def drawn(folder="guided", **settings):
    known = {"prompts": [BIRD], **GenerateConfig().to_dict(), "module": "digest", "environments": [[0.5, 0.5]]}
    return Run(images={"guided": Generated([], [folder], [known | settings])})


def evaluated(quality=(), **stated):
    bias = Estimate(value=0.5, low=0.4, high=0.6, floor=0.1)
    spread = AttributeMeasures({BIRD: {"land": 10, "water": 0}}, {"bias": bias})
    measures = Measures(10, {"background": spread}, quality=dict.fromkeys(quality, Quantity(1.0)))
    return Run(results=Results({"base": {"3.0": measures}}, attribute="background", **stated))


def only(run):
    ((_, command),) = commands(run)
    return command


def test_only_settings_that_differ_from_the_defaults_are_written_and_parts_have_their_own_names():
    assert only(Run(audit=audited())) == "invdiff audit MODEL DATA --output audit"
    names = {"audit": ["out/a b"], "module": ["out/module"], "data": ["photos", "--split", "test"]}
    module = {"base_model": "/x/birds", "record": {"training": TrainConfig(steps=7).to_dict()}}
    run = Run(audit=audited(seed=3, solver="exact"), module=module, names=names)
    assert [command for _, command in commands(run)] == [
        "invdiff audit birds photos --split test --output 'out/a b' --solver exact --seed 3",
        "invdiff train birds photos 'out/a b' --output out/module --split test --steps 7",
    ]


def test_images_are_drawn_with_what_they_were_drawn_with():
    command = only(drawn("out/guided", guidance_scale=7.5, seed=2, environments=[[0.7, 0.3]], scale=0.5))
    words = "--module module --environments 0.7,0.3 --output out/guided --guidance-scale 7.5 --scale 0.5 --seed 2"
    assert sorted(shlex.split(command)) == sorted(["invdiff", "generate", "MODEL", BIRD, *words.split()])
    several = drawn("out/guided", environments=[[0.5, 0.5], [0.2, 0.8]])
    assert "--environments 'factor 2=0.2,0.8' --output" in only(several)
    named = Run(images=several.images, module={"factor_names": ["age", "place"]})
    assert "--environments place=0.2,0.8 --output" in only(named)
    assert "--environments iid --output" in only(drawn("out/guided", draws="iid"))
    mixes = {"3": {BIRD: [[0.7, 0.3]]}}
    assert "--environments calibrated --output" in only(drawn("out/guided", environments=[*mixes["3"].values()]))
    trained = Run(module={"mixes": mixes, "record": {"training": {"rank": 4}}})
    assert only(trained).endswith("--rank 4 --calibrate 3")
    plain = only(drawn("base", module=None, environments=None, scale=0.5))
    assert plain == f"invdiff generate MODEL '{BIRD}' --output base"
    assert commands(Run(images={"theirs": Generated([], ["theirs"], [{}])})) == []


def test_what_a_command_cannot_say_is_said_beside_it():
    many = [f"bird {number}" for number in range(MOST_WORDS + 1)]
    for settings in ({"prompts": many}, {"environments": [[0], [1]]}, {"environments": "hostile"}):
        found = reproduce(drawn(**settings), "1.0")
        ((title, command),) = found["commands"]
        assert "settings below" in title
        assert "--environments" not in command
        assert command.count("--output") == 1
        assert [step for step, _ in found["settings"]] == ["Generate: guided, guided"]


def test_a_prompt_that_looks_like_an_option_or_a_command_is_none_and_weights_of_16_bits_are_said():
    audit, prompts = audited(dtype="bf16"), ["--output", "'; $(touch x)\n"]
    command = commands(Run(audit=audit, images=drawn(prompts=prompts).images))[-1][1]
    assert shlex.split(command)[-3:] == ["--", *prompts]
    assert command.startswith("invdiff generate MODEL --dtype bf16 --module")
    assert only(Run(audit=audit)) == "invdiff audit MODEL --dtype bf16 DATA --output audit"


def test_evaluation_names_the_models_that_figures_name():
    quality = ("Frechet distance (net)", "FID (inception)", "KID (inception)", "CLIP-T (clip)", "CMMD (clip)")
    quality = (*quality, "LPIPS diversity (alexnet)", "Vendi score (odd (name))")
    stated = {"baseline": "theirs", "target": {"land": 0.3, "water": 0.7}, "reference_images": 9}
    run = evaluated(quality, annotator=AnnotatorRecord("net", min_confidence=0.6), **stated)
    assert only(run) == (
        "invdiff evaluate base=base --annotator net --attribute background --target land=0.3,water=0.7 "
        "--baseline theirs --min-confidence 0.6 --features inception --features 'odd (name)' "
        "--clip clip --lpips --reference REFERENCE"
    )


def test_evaluation_by_an_audit_names_its_folder_and_the_model():
    run = replace(evaluated(annotator=AnnotatorRecord("the audit")), names={"audit": ["runs/audit"]})
    command = "invdiff evaluate base=base --annotator runs/audit --annotator-model MODEL --attribute background"
    assert only(run) == command
    _, command = commands(replace(run, audit=audited(loras={"style:0.8": "0123"})))[-1]
    assert "--annotator-model MODEL --annotator-lora style:0.8 --attribute" in command


@pytest.mark.parametrize("names", [["size x colour"], ["a x b", "c"]])
def test_evaluation_names_each_attribute_and_not_how_they_intersect(names):
    run = evaluated()
    (spread,) = run.results.models["base"]["3.0"].attributes.values()
    measured = dict.fromkeys([*names, " x ".join(names)], spread)
    models = {"base": {"3.0": replace(run.results.models["base"]["3.0"], attributes=measured)}}
    words = shlex.split(only(replace(run, results=replace(run.results, models=models))))
    assert [words[place + 1] for place, word in enumerate(words) if word == "--attribute"] == names


def test_the_demo_is_one_command():
    run = evaluated(run={"settings": DemoConfig(seed=3, num_inference_steps=5).to_dict()})
    assert only(run) == "invdiff demo --num-inference-steps 5 --seed 3"
    assert ("demo", "3") in next(table for table in reproduce(run, "1.0")["facts"] if table.caption == "Seeds").rows


def test_no_path_of_the_machine_is_shown():
    for shown, paths in (
        ("photos", ["photos", "/home/alice/photos", Path("/home/alice/photos"), "/home/alice/photos/", "~/photos"]),
        ("photos", ["~alice/photos", r"C:\Users\alice\photos", r"\\server\alice\photos"]),
        *((path, [path]) for path in ("out/demo/audit", "../photos", "org/birds")),
        (".", ["/"]),
    ):
        assert [shown_path(path) for path in paths] == [shown] * len(paths)
        settings = {"vision_encoder": paths[-1], "prompts": ["/imagine a bird"], "seed": 3, "audit": None}
        assert without_paths(settings) == settings | {"vision_encoder": shown}
