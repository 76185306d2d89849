"""The commands of a report are the real ones: what differs from the defaults, quoted for a shell."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import typer

from invdiff import cli
from invdiff.config import AuditConfig, DemoConfig, GenerateConfig, TrainConfig
from invdiff.evaluation.results import AnnotatorRecord, AttributeMeasures, Estimate, Measures, Quantity, Results
from invdiff.options import Config
from invdiff.report.audit_reading import Page
from invdiff.report.commands import MOST_PROMPTS, OPTIONS, commands, say_more
from invdiff.report.part_names import Names
from invdiff.report.results_reading import Measured
from invdiff.report.sources import AuditSource, Generated, Sources

COMMANDS: dict[type[Config], str] = {
    DemoConfig: "demo",
    AuditConfig: "audit",
    TrainConfig: "train",
    GenerateConfig: "generate",
}
BIRD = "a photo of a bird"


def audited(**settings: Any) -> Sources:
    """What a report of an audit with these settings is made from."""
    pages: list[Page] = []
    facts = AuditConfig().to_dict() | settings
    return Sources(audit=AuditSource({}, pages, facts, None, [], None))  # type: ignore[arg-type]  # no tensor is read


def drawn(folder: str = "guided", **settings: Any) -> Sources:
    known = {"prompts": [BIRD], **GenerateConfig().to_dict(), "module": "digest", "environments": [[0.5, 0.5]]}
    return Sources(images={"guided": Generated([], [folder], [known | settings])})


def evaluated(quality: tuple[str, ...] = (), **stated: Any) -> Sources:
    bias = Estimate(value=0.5, low=0.4, high=0.6, floor=0.1)
    spread = AttributeMeasures({BIRD: {"land": 10, "water": 0}}, {"bias": bias})
    measures = Measures(10, {"background": spread}, quality=dict.fromkeys(quality, Quantity(1.0)))
    results = Results({"base": {"3.0": measures}}, attribute="background", **stated)
    return Sources(measured=Measured(results, "results.json", "", {}, ()))


def only(sources: Sources) -> str:
    ((_, command),) = commands(sources)
    return command


@pytest.mark.parametrize("config", list(COMMANDS))
def test_settings_with_an_option_are_those_of_the_command_line(config: type[Config]) -> None:
    group: Any = typer.main.get_command(cli.app)
    taken = {parameter.name for parameter in group.commands[COMMANDS[config]].params}
    taken = {"num_inference_steps" if config is GenerateConfig and name == "steps" else name for name in taken}
    single = {item.name for item in fields(config) if not isinstance(getattr(config, item.name), tuple)}
    assert set(OPTIONS[config].split()) <= taken & single


def test_what_is_as_by_default_is_not_written() -> None:
    assert only(audited()) == "invdiff audit MODEL DATA --output audit"


def test_what_differs_is_written_as_options() -> None:
    command = only(audited(seed=3, solver="exact", min_images=20))
    assert command == "invdiff audit MODEL DATA --output audit --solver exact --min-images 20 --seed 3"


def test_a_setting_without_an_option_goes_through_a_file(tmp_path: Path) -> None:
    # Runs the part that writes the file, as a reader would.
    captions = ("it's a \\n bird", "`x` $HOME", "鳥")
    command = only(audited(max_groups=4, other_captions=list(captions), seed=1))
    write, _, run = command.partition(" && ")
    subprocess.run(["sh", "-c", write], cwd=tmp_path, check=True)
    words = shlex.split(run)
    assert words[-4:] == ["--seed", "1", "--config", "audit-settings.json"]
    written = AuditConfig.from_file(tmp_path / "audit-settings.json")
    assert asdict(written) == asdict(AuditConfig(max_groups=4, other_captions=captions))


def test_no_path_of_the_machine_is_in_an_option() -> None:
    command = only(audited(vision_encoder="/home/alice/dino", words_model="~/clip"))
    assert command.endswith("--vision-encoder dino --words-model clip")


def test_parts_have_their_own_names() -> None:
    names = Names(audit="out/a b", module="out/module", data=["photos", "--split", "test"])
    training = {"training": TrainConfig(steps=7).to_dict()}
    source = audited().audit
    made = commands(Sources(audit=source, module={"base_model": "/x/birds", "record": training}, names=names))
    assert [command for _, command in made] == [
        "invdiff audit birds photos --split test --output 'out/a b'",
        "invdiff train birds photos 'out/a b' --output out/module --split test --steps 7",
    ]


def test_images_are_drawn_with_what_they_were_drawn_with() -> None:
    command = only(drawn("out/guided", guidance_scale=7.5, seed=2, environments=[[0.7, 0.3]], scale=0.5))
    words = "--module module --environments 0.7,0.3 --output out/guided --guidance-scale 7.5 --scale 0.5 --seed 2"
    assert sorted(shlex.split(command)) == sorted(["invdiff", "generate", "MODEL", BIRD, *words.split()])


def test_a_plain_model_has_no_module_and_no_scale() -> None:
    command = only(drawn("base", module=None, environments=None, scale=0.5))
    assert command == f"invdiff generate MODEL '{BIRD}' --output base"


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": [f"bird {number}" for number in range(MOST_PROMPTS + 1)]},
        {"prompts": ["--output", "x"]},
        {"environments": [[0], [1]]},
        {"environments": [[0.5, 0.5], [0.2, 0.8]]},
        {"environments": "hostile"},
    ],
)
def test_what_a_command_cannot_say_is_said_beside_it(settings: dict[str, Any]) -> None:
    sources = drawn(**settings)
    ((title, command),) = commands(sources)
    assert "settings below" in title
    assert say_more(sources.images["guided"].settings[0])
    assert "--environments" not in command
    assert command.count("--output") == 1


def test_a_folder_without_settings_has_no_command() -> None:
    assert commands(Sources(images={"theirs": Generated([], ["theirs"], [{}])})) == []


def test_evaluation_names_the_models_that_figures_name() -> None:
    quality = ("Frechet distance (net)", "FID (inception)", "KID (inception)", "CLIP-T (clip)", "CMMD (clip)")
    annotator = AnnotatorRecord("net", min_confidence=0.6)
    sources = evaluated(
        (*quality, "LPIPS diversity (alexnet)", "Vendi score (odd (name))"),
        annotator=annotator,
        baseline="theirs",
        target={"land": 0.3, "water": 0.7},
        reference_images=9,
        confidence=0.9,
    )
    assert only(sources) == (
        "invdiff evaluate base=base --annotator net --attribute background --target land=0.3,water=0.7 "
        "--min-confidence 0.6 --baseline theirs --lpips --clip clip --features inception --features 'odd (name)' "
        "--reference REFERENCE --confidence 0.9"
    )


def test_the_demo_is_one_command() -> None:
    sources = evaluated()
    assert sources.measured is not None
    settings = DemoConfig(seed=3, num_inference_steps=5).to_dict()
    measured = Measured(sources.measured.results, "results.json", "", settings, ())
    assert only(Sources(measured=measured)) == (
        """printf %s '{"num_inference_steps": 5}' > demo-settings.json && """
        "invdiff demo --seed 3 --config demo-settings.json"
    )


@pytest.mark.parametrize("value", ["$(touch x)", "'; touch x; '", "`touch x`", "a\nb"])
def test_hostile_settings_are_one_word(value: str) -> None:
    command = only(drawn(prompts=[value], seed=value))
    words = shlex.split(command)
    assert words[3] == value
    assert words[-1] == value
