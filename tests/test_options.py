"""Options and their help, and what terminals and launchers leave in the environment."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from conftest import PROCESSES
from invdiff.cli.arguments import command, field_docs
from invdiff.cli.print import finish, say
from invdiff.config import AuditConfig, DemoConfig, EvaluateConfig, FinetuneConfig, GenerateConfig, TrainConfig
from invdiff.options import command_options, settings_of
from test_cli import fail, run, succeed, yaml_file

COMMANDS = (
    *("demo", "birds", "finetune", "audit", "train", "generate", "evaluate", "report", "ui"),
    *("annotator", "annotator train", "annotator measure"),
)


def test_of_several_processes_only_the_first_prints(monkeypatch, capsys):
    for name, value in PROCESSES.items():
        monkeypatch.setenv(name, value)
    say("loading", quiet=False)
    finish("The module is in out.", "generate")
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""
    assert "Expected one process" in fail("demo")


def test_variables_left_over_by_a_cluster_are_named(tmp_path):
    for left, message in (
        ({"WORLD_SIZE": "auto"}, "WORLD_SIZE='auto'"),
        ({"RANK": ""}, "RANK='', LOCAL_RANK"),
        ({"RANK": "2"}, "WORLD_SIZE='2', RANK='2'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR=''"),
    ):
        said = fail("birds", "--output", tmp_path, env=PROCESSES | left)
        assert message in said
        assert "To run alone: unset WORLD_SIZE RANK" in said


@pytest.mark.parametrize("alone", ["", "1", " "])
def test_variables_of_one_process_do_not_matter(tmp_path, alone):
    left = {"WORLD_SIZE": alone, "RANK": "3", "LOCAL_RANK": "", "MASTER_ADDR": ""}
    arguments = ("birds", "--output", tmp_path, "--num-images", 1, "--resolution", 16)
    assert "1 captioned images" in run(*arguments, env=left).stdout


def test_what_an_encoding_lacks_is_replaced(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "latin-1:strict", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "invdiff", "birds", "--num-images", "1", "--resolution", "16", "--output"]
    done = subprocess.run([*command, str(tmp_path / "鳥")], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"/?. Next: invdiff finetune" in done.stdout


def test_help_has_an_example_that_can_be_parsed(monkeypatch):
    assert "audit" in run().output
    # An example that names an option the command does not have would stop with exit code 2.
    called = []
    monkeypatch.setattr("typer.core.TyperCommand.invoke", lambda self, ctx: called.append(self.name))
    for name in ("", *COMMANDS):
        shown = " ".join(succeed(*name.split(), "--help").split())
        example = shlex.split(shown.rpartition("Example: invdiff ")[2])
        assert example[: len(name.split())] == name.split()
        assert run(*example).exit_code == 0, name
    assert called == ["demo", *(name.split()[-1] if name != "annotator" else "train" for name in COMMANDS)]


SETTINGS = {
    "audit": AuditConfig(
        num_groups=2, min_share=0.1, contrast_log_snr=(-5.0, 2.5), words_model="clip", words=("a sea, wet", "--cat"),
    ),
    "demo": DemoConfig(severity=1, guidance_scales=(0.0, 1.5), seed=-3),
    "evaluate": EvaluateConfig(
        subject_attribute="pet", target={"a=b": 0.25, "c": 0.75},
        min_confidence=0.7, baseline="base", features=("inception", "x"), lpips=True, num_resamples=20,
    ),
    "finetune": FinetuneConfig(learning_rate=1e-5, fresh_denoiser=True, mixed_precision="no"),
    "generate": GenerateConfig(num_inference_steps=3, scale=0.1 + 0.2),
    "train": TrainConfig(backend="module", mode="invariant", penalty=0, width=16),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_an_option_with_its_docstring_and_default_whole_at_80_columns(name, monkeypatch):
    kind = type(SETTINGS[name])
    assert list(field_docs(kind)) == list(settings_of(kind))
    monkeypatch.setenv("COLUMNS", "80")
    shown = succeed(name, "--help")
    text = " ".join(shown.replace("│", " ").split())
    for setting in settings_of(kind).values():
        assert re.search(rf"│ +{setting.flag} ", shown), setting.flag
        assert field_docs(kind)[setting.name] in text
    assert f"[default: {kind.seed}]" in text


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_settings_written_as_options_are_read_as_they_were(config, tmp_path):
    read, app = [], typer.Typer()

    @command(app, "probe")
    def probe(*, settings: type(config)):
        read.append(settings)

    CliRunner().invoke(app, command_options(type(config), vars(config)), catch_exceptions=False)
    file = yaml_file(tmp_path / "c.yaml", config.to_dict())
    CliRunner().invoke(app, ["--config", str(file), "--seed", "9"], catch_exceptions=False)
    assert read == [config, dataclasses.replace(config, seed=9)]
