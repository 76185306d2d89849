import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import make_tiny_pipeline
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit, PromptAudit
from invdiff.config import TrainConfig
from invdiff.data.captioned import load_captioned_images
from invdiff.data.encode import as_encoded
from invdiff.errors import AuditError, ConfigError
from invdiff.models.frozen import denoiser_fingerprint
from invdiff.training import objective
from invdiff.training import train as train_module
from invdiff.training.train import carry_over, train

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = TrainConfig(steps=4, batch_size=4, checkpoint_every=2, mixed_precision="no")


def hard(labels, num_groups=2):
    return np.eye(num_groups, dtype=np.float32)[np.asarray(labels)]


def make_audit(names, labels, *, found=True, prompt_ids=None, **settings) -> Audit:
    """An audit that found these groups under every prompt, or none."""
    prompt_ids = np.zeros(len(names), np.int64) if prompt_ids is None else np.asarray(prompt_ids)
    found = [found] * (int(prompt_ids.max()) + 1) if isinstance(found, bool) else found
    prompts = [
        PromptAudit(prompt=f"prompt {i}", captions=[], num_images=0, found=each, reason="made up", shares=[0.5, 0.5])
        for i, each in enumerate(found)
    ]
    weights = np.where(np.array(found)[prompt_ids][:, None], hard(labels), np.float32(0.5))
    return Audit((weights,), np.zeros(len(names), np.float32), prompt_ids, prompts, list(names), 0.0, settings)


@pytest.fixture(autouse=True)
def few_typical_losses(monkeypatch):
    monkeypatch.setattr(objective, "IMAGES_PER_LEVEL", 3)  # unlike any batch here


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    """The tiny folder, encoded by the tiny pipeline."""
    pipe, cache = make_tiny_pipeline(), tmp_path_factory.mktemp("cache")
    return as_encoded(pipe, load_captioned_images(tiny_folder), cache, progress=False)


@pytest.fixture
def found(data):
    """Two prompts, the last image of each in the rare group."""
    labels = [0] * 10 + [1, 1]
    return make_audit(data.names, labels, prompt_ids=data.caption_ids, **made_of(data, make_tiny_pipeline()))


def made_of(data, pipe):
    """What an audit records of its images and its model."""
    return {"data_fingerprint": data.data_fingerprint, "denoiser_fingerprint": denoiser_fingerprint(pipe)}


def run(pipe, data, audit, folder, config=CONFIG, **changes):
    options = {"config": replace(config, **changes), "cache_dir": folder.parent / "cache", "progress": False}
    return train(pipe, data, audit, folder, **options)


def result(folder):
    return (folder / WEIGHTS).read_bytes(), (folder / "log.jsonl").read_bytes()


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def kill(monkeypatch, name, call, *arguments, **changes):
    """Run, and be interrupted at the `call`-th call of a function that training uses."""
    original, calls = getattr(train_module, name), []

    def killed(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments, **changes)


@pytest.mark.parametrize("mode", ["balanced", "invariant"])
def test_the_loss_falls_and_is_logged_for_each_group_of_each_prompt(tiny_pipe, data, found, tmp_path, mode):
    module = run(tiny_pipe, data, found, tmp_path / "m", mode=mode, steps=55, batch_size=8, learning_rate=3e-3)
    rows = log(tmp_path / "m")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 55]
    assert torch.tensor(rows[-1]["group_losses"]).shape == (2, 2)
    assert module.sees_environment == (mode == "balanced")
    assert not module.training
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "README.md", "config.json", WEIGHTS, "log.jsonl", "train.json",
    ]  # fmt: skip


def test_the_pipeline_is_untouched_and_no_gradient_flows_through_it(tiny_pipe, data, found, tmp_path):
    before = {name: value.clone() for name, value in tiny_pipe.unet.state_dict().items()}
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 16, 16)
    with torch.no_grad():
        output = tiny_pipe.unet(*inputs).sample
    graphs = []
    hook = tiny_pipe.unet.register_forward_hook(lambda module, args, output: graphs.append(output[0].requires_grad))
    run(tiny_pipe, data, found, tmp_path / "m")
    hook.remove()
    assert len(graphs) >= CONFIG.steps
    assert not any(graphs)
    assert all(torch.equal(tiny_pipe.unet.state_dict()[name], value) for name, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in tiny_pipe.unet.parameters())
    with torch.no_grad():
        assert torch.equal(tiny_pipe.unet(*inputs).sample, output)


def test_the_same_seed_gives_the_same_bytes_and_another_others(tiny_pipe, data, found, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tiny_pipe, data, found, tmp_path / name, seed=seed)
    assert result(tmp_path / "a") == result(tmp_path / "b")
    assert result(tmp_path / "a")[0] != result(tmp_path / "c")[0]


@pytest.mark.parametrize(("step", "left"), [(1, 4), (4, 2)])
def test_a_killed_run_goes_on_to_the_same_result(tiny_pipe, data, found, tmp_path, monkeypatch, step, left):
    run(tiny_pipe, data, found, tmp_path / "whole")
    kill(monkeypatch, "step_loss", step, tiny_pipe, data, found, tmp_path / "cut")
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    forwards = []
    tiny_pipe.unet.register_forward_hook(lambda module, args, output: forwards.append(len(args[0])))
    run(tiny_pipe, data, found, tmp_path / "cut")
    assert forwards.count(CONFIG.batch_size) == left
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_a_run_killed_between_its_last_files_is_finished(tiny_pipe, data, found, tmp_path, monkeypatch):
    run(tiny_pipe, data, found, tmp_path / "whole")
    kill(monkeypatch, "write_json", 1, tiny_pipe, data, found, tmp_path / "cut")
    assert (tmp_path / "cut" / WEIGHTS).exists()
    run(tiny_pipe, data, found, tmp_path / "cut")
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    assert (tmp_path / "cut" / "train.json").exists()


def test_a_finished_run_is_read_back(tiny_pipe, data, found, tmp_path):
    first = run(tiny_pipe, data, found, tmp_path / "m")
    (tmp_path / "m" / ".work").mkdir()  # as after a kill at the very end
    tiny_pipe.unet.register_forward_pre_hook(lambda module, args: pytest.fail("trained again"))
    again = run(tiny_pipe, data, found, tmp_path / "m")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in first.state_dict().items())
    assert not (tmp_path / "m" / ".work").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_in_the_same_folder_are_refused_by_name(
    tiny_pipe, data, found, tmp_path, monkeypatch, finished
):
    if finished:
        run(tiny_pipe, data, found, tmp_path / "m")
    else:
        kill(monkeypatch, "step_loss", 4, tiny_pipe, data, found, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"got others: penalty was 1\.0, now 2\.0\. Use the same"):
        run(tiny_pipe, data, found, tmp_path / "m", penalty=2.0)


def test_another_model_in_the_same_folder_is_refused(tiny_pipe, data, found, tmp_path):
    run(tiny_pipe, data, found, tmp_path / "m")
    other = make_tiny_pipeline(seed=1)
    with pytest.raises(ConfigError, match="got others: model was"):
        run(other, data, replace(found, settings=made_of(data, other)), tmp_path / "m")


def test_an_audit_of_something_else_is_refused(tiny_pipe, data, found, tmp_path):
    with pytest.raises(AuditError, match="Expected the denoiser that was audited"):
        run(make_tiny_pipeline(seed=1), data, found, tmp_path / "m")
    other = replace(found, settings={**found.settings, "data_fingerprint": "other"})
    with pytest.raises(AuditError, match="Expected the images that were audited"):
        run(tiny_pipe, data, other, tmp_path / "m")
    nothing = make_audit(data.names, [0] * 12, found=False, **found.settings)
    with pytest.raises(AuditError, match="nothing to balance"):
        run(tiny_pipe, data, nothing, tmp_path / "m")
    tiny_pipe.scheduler = type(tiny_pipe.scheduler).from_config(tiny_pipe.scheduler.config, beta_end=0.02)
    with pytest.raises(AuditError, match="Expected the denoiser that was audited"):
        run(tiny_pipe, data, found, tmp_path / "m")


def test_settings_have_an_effect(tiny_pipe, data, found, tmp_path):
    changes = {"plain": {}, "caption_dropout": {"caption_dropout": 0.9}, "penalty": {"penalty": 50.0}}
    for name, change in changes.items():
        run(tiny_pipe, data, found, tmp_path / name, **change)
    assert len({result(tmp_path / name)[0] for name in changes}) == 3


def test_a_16_bit_pipeline_can_be_trained_beside(tiny_pipe, data, found, tmp_path):
    tiny_pipe.to(torch.bfloat16)
    data = replace(data, conditions={name: values.bfloat16() for name, values in data.conditions.items()})
    found = replace(found, settings=made_of(data, tiny_pipe))
    assert run(tiny_pipe, data, found, tmp_path / "m", steps=1).dtype == torch.float32


@pytest.mark.parametrize("mixed_precision", ["bf16", "no", "auto"])
def test_each_precision_trains(tiny_pipe, data, found, tmp_path, mixed_precision):
    module = run(tiny_pipe, data, found, tmp_path / "m", mixed_precision=mixed_precision)
    assert module.conv_out.weight.abs().sum() > 0
    assert all(value.isfinite().all() for value in module.state_dict().values())


# Rounds


def audits_in_turn(monkeypatch, *found):
    """Let the next audits find this; return the calls."""
    results, calls = iter(found), []

    def infer_groups(pipe, data, **keywords):
        calls.append(keywords)
        return next(results)

    monkeypatch.setattr(train_module, "infer_groups", infer_groups)
    return calls


def test_a_second_round_audits_the_guided_model_with_the_settings_of_the_first(
    tiny_pipe, data, found, tmp_path, monkeypatch
):
    asked = {"solver": "exact", "min_images": 4, "vision_encoder": "clip", "words_model": "clip", "words": ["sea"]}
    found = replace(found, settings={**found.settings, **asked})
    calls = audits_in_turn(monkeypatch, found)
    run(tiny_pipe, data, found, tmp_path / "m", rounds=2)
    (call,) = calls
    config = call["config"]
    assert (config.solver, config.min_images, config.num_groups, config.vision_encoder) == ("exact", 4, 2, "")
    assert (config.words_model, config.words) == ("", ())
    assert type(call["denoiser"]).__name__ == "GuidedDenoiser"
    assert [(row["round"], row["step"]) for row in log(tmp_path / "m")] == [(0, 4), (1, 4)]
    assert json.loads((tmp_path / "m" / "train.json").read_text())["rounds"] == 2


def test_a_real_second_audit_can_be_run(tiny_pipe, data, found, tmp_path):
    loose = {"solver": "exact", "min_images": 4, "min_share": 0.1, "contrast_log_snr": [-4.2]}
    found = replace(found, settings={**found.settings, **loose, "caption_threshold": 0.0})
    run(tiny_pipe, data, found, tmp_path / "m", rounds=2, steps=2)
    assert [row["round"] for row in log(tmp_path / "m")] == [0, 1]


def test_rounds_stop_when_nothing_is_left(tiny_pipe, data, found, tmp_path, monkeypatch):
    audits_in_turn(monkeypatch, make_audit(data.names, [0] * 12, found=False, prompt_ids=data.caption_ids))
    run(tiny_pipe, data, found, tmp_path / "three", rounds=3)
    assert json.loads((tmp_path / "three" / "train.json").read_text())["rounds"] == 1
    run(tiny_pipe, data, found, tmp_path / "one")
    assert result(tmp_path / "three") == result(tmp_path / "one")


def test_a_run_killed_in_its_second_round_goes_on_to_the_same_result(tiny_pipe, data, found, tmp_path, monkeypatch):
    audits_in_turn(monkeypatch, found, found, found)
    run(tiny_pipe, data, found, tmp_path / "whole", rounds=2)
    kill(monkeypatch, "step_loss", 8, tiny_pipe, data, found, tmp_path / "cut", rounds=2)
    run(tiny_pipe, data, found, tmp_path / "cut", rounds=2)
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


@pytest.mark.parametrize(
    ("prompt_ids", "before", "now", "found", "expected"),
    [
        ([0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 1], True, [0, 0, 1, 0]),  # environments keep their meaning
        ([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0], [False, True], [0, 1, 0, 0]),  # a balanced prompt its groups
    ],
)
def test_the_next_round_takes_over_what_still_holds(prompt_ids, before, now, found, expected):
    second = np.full((4, 3), 1 / 3, np.float32)
    before = make_audit("abcd", before, prompt_ids=prompt_ids)
    before = replace(before, group_weights=(*before.group_weights, second))
    merged = carry_over(before, make_audit("abcd", now, prompt_ids=prompt_ids, found=found))
    assert merged.num_groups == (2, 3)
    assert np.array_equal(merged.group_weights[0], hard(expected))
    assert np.array_equal(merged.group_weights[1], second)


# What people changed in an audit


def test_images_left_out_and_names_last_through_the_rounds():
    before = make_audit("abcd", [0, 0, 1, 1], prompt_ids=[0, 0, 1, 1])
    before = apply(before, Edits().without_images([1, 2]))
    before = replace(before, edits=replace(before.edits, names=(("land", "water"),)))
    merged = carry_over(before, make_audit("abcd", [1, 1, 0, 0], prompt_ids=[0, 0, 1, 1], found=[True, False]))
    assert merged.kept.tolist() == [True, False, False, True]
    assert np.array_equal(merged.group_weights[0][[0, 3]], hard([0, 1]))
    assert merged.group_names == (("land", "water"),)


def test_an_image_left_out_is_never_read(tiny_pipe, data, found, tmp_path, monkeypatch):
    audits_in_turn(monkeypatch, found)
    asked = []
    read = type(data.latents).__getitem__
    monkeypatch.setattr(type(data.latents), "__getitem__", lambda self, rows: asked.append(rows) or read(self, rows))
    less = apply(found, Edits().without_images([0, 11]))
    run(tiny_pipe, data, less, tmp_path / "m", rounds=2, steps=40)
    assert set(torch.cat(asked).tolist()) == set(range(12)) - {0, 11}


def test_an_audit_that_people_changed_is_another_audit(tiny_pipe, data, found, tmp_path):
    run(tiny_pipe, data, found, tmp_path / "m")
    with pytest.raises(ConfigError, match="got others: audit was"):
        run(tiny_pipe, data, apply(found, Edits().without_images([0])), tmp_path / "m")
    names = Edits(names=(("", ""),)).with_name(0, 0, "land")
    run(tiny_pipe, data, apply(found, names), tmp_path / "m")  # names change nothing that is trained
