"""Places to write to: checked before work, kept from other runs, in the modes that the umask gives."""

import os

import pytest

from conftest import make_guidance_module
from invdiff import finetune, train
from invdiff.errors import ConfigError
from invdiff.files import owned
from invdiff.training.finetune import save as save_pipeline
from test_cli import fail, succeed


def test_places_that_cannot_be_written_are_refused_before_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for command, place, option in (
        ("audit MODEL DATA --output {}", "file/out", "--output"),
        ("audit MODEL DATA --output {0}-out --cache-dir {0}", "file/cache", "--cache-dir or INVDIFF_CACHE"),
        ("train MODEL DATA AUDIT --output {}", "file", "--output"),
        ("generate MODEL PROMPT --output {}", "file", "--output"),
        ("evaluate DRAWN --annotator labels --attribute sex --output {}", "file/results.json", "--output"),
        ("evaluate DRAWN --annotator labels --attribute sex --output {}", "folder", "--output"),
        ("report RUN --output {}", "file", "--output"),
        ("finetune DATA --output {}", "file/out", "--output"),
        ("demo --output {}", "file", "--output"),
        ("annotator train DATA --output {}", "file", "--output"),
        ("annotator measure MODEL DATA --output {}", "file", "--output"),
    ):
        said = fail(*command.replace("{0}-out", f"{tmp_path}/out").format(tmp_path / place).split())
        assert f"Choose another with {option}." in said
        assert str(tmp_path / place.split("/")[0]) in said


def test_what_another_command_wrote_is_never_mixed_with_or_replaced(tmp_path):
    commands = ["audit M", "finetune DATA", "train M DATA", "generate M", "export M", "annotator train DATA"]
    kinds = {"model_index.json": "a pipeline", "audit.json": "an audit", "config.json": "a module or another model"}
    kinds |= {"confusion.json": "an annotator", "manifest.jsonl": "generated images", "metadata.csv": "data"}
    for name, kind in kinds.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}")
        for command in commands[kind == "an audit" :]:  # which is its own
            said = fail(*command.split(), "--output", folder)
            assert f"found {kind} in {folder}. Choose another with --output." in said
        for call, given in ((train, (None, None, None, folder)), (finetune, (None, folder))):
            with pytest.raises(ConfigError, match=f"found {kind} in"):
                call(*given)
        assert [path.name for path in folder.iterdir()] == [name]


def test_a_second_run_in_an_output_folder_is_refused_until_the_first_has_ended(tmp_path):
    arguments = ("birds", "--num-images", 1, "--resolution", 16, "--output", tmp_path / "birds")
    with owned(tmp_path / "birds"):
        assert f"the only run that writes to {tmp_path / 'birds'}, found another" in fail(*arguments)
        succeed(*arguments[:-1], tmp_path / "others")
        with owned(tmp_path / "birds" / "results.json", is_file=True):
            pass  # a file in it is another place
    succeed(*arguments)
    assert {path.name for path in (tmp_path / "birds").iterdir()} == {".birds.json", "images", "metadata.csv"}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_all_files_have_the_mode_of_the_umask(tmp_path, tiny_pipe, mask, mode):
    before = os.umask(mask)
    try:
        make_guidance_module(tiny_pipe).save_pretrained(tmp_path / "new" / "module")
        save_pipeline(tiny_pipe, tmp_path / "new", half_precision=False)
        succeed("birds", "--num-images", 1, "--resolution", 16, "--output", tmp_path / "new" / "birds")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".md", ".png", ".csv"}
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in folders} == {mode | (mode & 0o444) >> 2}
