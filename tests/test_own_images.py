"""No data at all: the model's own images are drawn, audited and trained on."""

import shutil
from dataclasses import replace

import pytest

from conftest import make_tiny_pipeline
from invdiff import Audit, AuditConfig, TrainConfig, audit, load_captioned_images, train
from invdiff.errors import ConfigError
from test_cli import fail, next_command, succeed
from tiny import CAPTIONS

pytestmark = pytest.mark.usefixtures("plain")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """An audit of the tiny pipeline's own images, and the cache they are in; read only."""
    cache = tmp_path_factory.mktemp("own") / "cache"
    config = AuditConfig(solver="exact", min_images=4, caption_threshold=0.0, images_per_prompt=6)
    return audit(make_tiny_pipeline(), prompts=CAPTIONS, config=config, cache_dir=cache, progress=False), cache


def test_training_without_data_is_training_on_them_wherever_they_are(tiny_pipe, found, tmp_path):
    result, cache = found
    (folder,), weights = (cache / "own").iterdir(), []
    config = TrainConfig(steps=2, batch_size=4, preserve=0, mixed_precision="no")
    assert [(prompt.prompt, prompt.num_images) for prompt in result.prompts] == [(caption, 6) for caption in CAPTIONS]
    for name, data, used in (
        ("read back", None, shutil.copytree(cache, tmp_path / "copy")),
        ("drawn again", None, tmp_path / "empty"),
        ("given", load_captioned_images(folder), tmp_path / "empty"),
    ):
        train(tiny_pipe, data, result, tmp_path / name, config=config, cache_dir=used, progress=False)
        weights.append((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
    assert ", drawn by the model itself" in (tmp_path / "given" / "README.md").read_text()


def test_what_cannot_be_drawn_is_refused(tiny_pipe, data, found, tmp_path, capsys):
    for images, prompts, message in (
        (data, CAPTIONS, "either data or prompts"),
        (None, (), "at least one prompt"),
        (None, ["a dog", " "], "got an empty one"),
    ):
        with pytest.raises(ConfigError, match=message):
            audit(tiny_pipe, images, prompts=prompts, cache_dir=tmp_path)
    settings = {name: value for name, value in found[0].settings.items() if name != "own_images_of"}
    with pytest.raises(ConfigError, match="that were audited, which the model did not draw itself"):
        train(tiny_pipe, None, replace(found[0], settings=settings), tmp_path / "module", cache_dir=tmp_path)
    assert "backend" not in capsys.readouterr().err  # what is wrong is told first


def test_commands_go_all_the_way_without_data(tiny_pipe_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("INVDIFF_CACHE", str(tmp_path / "cache"))
    config, prompts = tmp_path / "c.json", tmp_path / "prompts.txt"
    config.write_text('{"solver": "exact", "min_images": 4, "caption_threshold": 0.0, "images_per_prompt": 6}')
    prompts.write_text(f"{CAPTIONS[1]}\n")
    given = ["--prompt", CAPTIONS[0], "--prompts", str(prompts), "--config", str(config), "--quiet"]
    words = ["audit", str(tiny_pipe_dir), "--output", str(tmp_path / "audit"), *given]
    shown = succeed(*words)
    assert "the model's own" in " ".join(shown.split())
    assert list((tmp_path / "audit").glob("*.png"))
    assert Audit.load(tmp_path / "audit").settings["own_images_of"] == list(CAPTIONS)
    words = next_command(shown)[1:]
    assert words[:4] == ["train", str(tiny_pipe_dir), str(tmp_path / "audit"), "--output"]
    succeed(*words, "--steps", 2, "--batch-size", 4, "--preserve", 0, "-q")
    succeed("report", tmp_path / "audit", "--output", tmp_path / "r")
    report = (tmp_path / "r" / "report.md").read_text()
    assert "The images are the model’s own" in report or "The images are the model's own" in report
    assert f"--prompt '{CAPTIONS[0]}'" in report
    none = ("--output", tmp_path / "none")
    assert "Expected DATA, or --prompt" in fail("audit", tiny_pipe_dir, *none)
    words = ("audit", tiny_pipe_dir, "DATA", "--images-per-prompt", 5, *none)
    assert "Expected --images-per-prompt for images of the model's own" in fail(*words)


def test_the_bundled_prompts_are_forty_professions(tiny_pipe_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("invdiff.auditing.run.audit", lambda *_, prompts, **__: asked.extend(prompts) or exit(0))
    succeed("audit", tiny_pipe_dir, "--prompts", "professions", "--output", tmp_path)
    assert len(set(asked)) == 40
    assert all(prompt.startswith(("a photo of a ", "a photo of an ")) for prompt in asked)
