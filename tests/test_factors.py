"""An audit of two hidden factors, from its folder to guided images and to what people see."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import make_tiny_pipeline
from invdiff import attach, generate
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit, PromptAudit
from invdiff.auditing.scores import Margins
from invdiff.cli.print import print_audit
from invdiff.config import GenerateConfig, TrainConfig
from invdiff.data.captioned import load_captioned_images
from invdiff.data.encode import as_encoded
from invdiff.errors import ConfigError
from invdiff.guidance.module import load_module
from invdiff.models.frozen import denoiser_fingerprint
from invdiff.training.train import train
from runs import built_audit, report, undrawn

OWN = "Groups of factor 2 are each prompt's own"


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """The folder of an audit, and its images: factor 1 splits both prompts, factor 2 the second one, softly."""
    folder, pipe, images = tmp_path_factory.mktemp("made"), make_tiny_pipeline(), load_captioned_images(tiny_folder)
    data = as_encoded(pipe, images, folder / "cache", progress=False)
    ids, last, odd = data.caption_ids.numpy(), np.arange(12) >= 9, np.arange(12) % 4 == 3
    soft = np.where(ids[:, None] == 1, np.where(odd[:, None], [0.1, 0.1, 0.8], [0.7, 0.2, 0.1]), 1 / 3)
    prompts = [PromptAudit(text, [text], 6, True, "made up", power="a third") for text in data.captions]
    plain = built_audit((np.eye(2)[last.astype(int)], soft), ids, prompts, data.names, [last, soft[:, 2]])
    factors = [plain.factors[0], replace(plain.factors[1], matched=False)]
    settings = {"data_fingerprint": data.data_fingerprint, "denoiser_fingerprint": denoiser_fingerprint(pipe)}
    replace(plain, factors=factors, settings=settings).save(folder / "audit")
    return folder, images


def test_each_factor_has_its_own_splits_scores_and_cuts(made, tmp_path):
    audit = Audit.load(made[0] / "audit")
    assert [[split.prompt for split in factor.splits] for factor in audit.factors] == [[0, 1], [1]]
    assert (audit.num_groups, audit.scores.shape, audit.split(1, 0)) == ((2, 3), (2, 12), None)
    assert [np.flatnonzero(audit.rare(m)).tolist() for m in (0, 1)] == [[9, 10, 11], []]  # none is surest of group 1
    edited = apply(audit, Edits().with_cuts(1, 1, [0.75]))
    edited.save(tmp_path)
    again = Audit.load(tmp_path)
    assert again.edits.cuts == {(1, 1): (0.75,)}
    assert again.split(1, 1).shares == [0.5, 0.0, 0.5]
    assert again.factors[0] == audit.factors[0]
    assert np.array_equal(again.group_weights[0], audit.group_weights[0])


def test_a_module_learns_every_factor_and_each_is_asked_for_by_name(made, tmp_path, capsys):
    pipe, audit = make_tiny_pipeline(), Audit.load(made[0] / "audit")
    config = TrainConfig(steps=3, batch_size=4, mixed_precision="no")
    train(pipe, made[1], audit, tmp_path / "m", config=config, cache_dir=made[0] / "cache", progress=False)
    module = load_module(tmp_path / "m")
    assert (module.num_groups, module.factor_names) == ((2, 3), ("factor 1", "factor 2"))
    assert OWN in capsys.readouterr().err
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.count("| factor 1 | 6 |") == 2 * card.count("| factor 2 | 6 |") == 2
    mixes = ({"factor 2": [0, 0, 1]}, {1: [0.0, 0.0, 1.0], "factor 1": [1, 0]})
    drawn = []
    for number, mix in enumerate(mixes):
        draw = GenerateConfig(images_per_prompt=8, num_inference_steps=1)
        folder = generate(
            pipe, ["a"], tmp_path / f"{number}", module=module, config=draw, environments=mix, progress=False
        )
        drawn.append((folder / "manifest.jsonl").read_text())
    assert [[text.count(f'"environment": [{e}, 2]') for e in (0, 1)] for text in drawn][1] == [8, 0]
    assert drawn[0].count('"environment": [0, 2]') in range(1, 8)  # factor 1 is even
    for wrong in ({"factor 3": [1, 0]}, {2: [1, 0]}, {"factor 1": [1, 0], 0: [1, 0]}):
        with pytest.raises(ConfigError, match=r"names of the module's factors, each once, of 'factor 1', 'factor 2'"):
            attach(pipe, module, environments=wrong)


def test_people_see_every_factor(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_audit(Audit.load(made[0] / "audit"))
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line[:1] in "┏┃┡│└"]
    assert {len(line) for line in table} == {80}
    assert [sum(f"│ factor {m} │" in line for line in table) for m in (1, 2)] == [2, 1]
    assert any("a third" in line for line in lines)
    assert any(line.startswith(OWN) for line in lines)
    with undrawn():
        page, twin = report(tmp_path, audit=made[0] / "audit", data=made[1])
    for words in ("factor 2 · “a photo of a waterbird”", "by 2 hidden factors", OWN, "wrong captions"):
        assert words in page.words
    assert "| factor 2 · a photo of a waterbird |" in twin


def test_images_of_prompts_that_are_not_judged_are_no_confusers():
    margins = Margins([np.random.default_rng(0).normal(size=(90, 4))], np.repeat([0, 1, -1], 30))
    assert [score.evidence for score in margins.scores(0, {0: "a", 1: "b"})] == ["which-prompt margin"]
