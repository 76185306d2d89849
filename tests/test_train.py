import json
import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from conftest import DIAGNOSTIC_BATCHES, make_tiny_pipeline
from invdiff import AuditConfig, TrainConfig, load_guidance
from invdiff.auditing.edits import Edits, apply
from invdiff.data.encode import encode_captions
from invdiff.errors import AuditError, ConfigError
from invdiff.files import weights_digest
from invdiff.guidance.base import Rows
from invdiff.models.families import DenoiserCall
from invdiff.models.frozen import FrozenDenoiser, denoiser_fingerprint
from invdiff.training import preservation
from invdiff.training import train as train_module
from invdiff.training.train import train, with_new_factors
from runs import hard_audit

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = TrainConfig(backend="module", steps=4, batch_size=4, preserve=0, checkpoint_every=2, mixed_precision="no")


def audit_of(encoded, pipe, **changes):
    """Two prompts, the last image of each in the rare group."""
    made_of = {"data_fingerprint": encoded.data_fingerprint, "denoiser_fingerprint": denoiser_fingerprint(pipe)}
    return hard_audit(encoded.names, [0] * 10 + [1, 1], encoded.caption_ids, **made_of | changes)


@pytest.fixture(scope="module")
def found(encoded):
    return audit_of(encoded, make_tiny_pipeline())


@pytest.fixture(scope="module")
def whole(encoded, found, tmp_path_factory):
    """The folder of a run without interruption; read only."""
    folder = tmp_path_factory.mktemp("whole") / "m"
    run(make_tiny_pipeline(), encoded, found, folder)
    return folder


def run(pipe, encoded, audit, folder, config=CONFIG, **changes):
    options = {"config": replace(config, **changes), "cache_dir": folder.parent / "cache", "progress": False}
    return train(pipe, encoded, audit, folder, **options)


def result(folder):
    return (folder / WEIGHTS).read_bytes(), (folder / "log.jsonl").read_bytes()


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["balanced", "invariant"])
def test_the_loss_falls_and_is_logged_for_each_group_of_each_prompt(tiny_pipe, encoded, found, tmp_path, mode):
    module = run(tiny_pipe, encoded, found, tmp_path / "m", mode=mode, steps=25, batch_size=8, learning_rate=6e-3)
    rows = log(tmp_path / "m")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert [row["step"] for row in rows] == [10, 20, 25]
    assert torch.tensor(rows[-1]["group_losses"]).shape == (1, 2, 2)
    excess = json.loads((tmp_path / "m" / "train.json").read_text())["excess_losses"]
    assert torch.tensor(excess).shape == (1, 2, 2)
    assert rows[-1]["excess_losses"] == excess
    assert module.sees_environment == (mode == "balanced")
    assert not module.training
    files = ["README.md", "config.json", WEIGHTS, "log.jsonl", "train.json"]
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == files


def test_the_pipeline_is_untouched_and_no_gradient_flows_through_it(tiny_pipe, encoded, found, tmp_path):
    before, graphs = weights_digest(tiny_pipe.unet), []
    hook = tiny_pipe.unet.register_forward_hook(lambda module, args, output: graphs.append(output[0].requires_grad))
    run(tiny_pipe, encoded, found, tmp_path / "m")
    hook.remove()
    assert len(graphs) >= CONFIG.steps
    assert not any(graphs)
    assert weights_digest(tiny_pipe.unet) == before
    assert all(p.requires_grad and p.grad is None for p in tiny_pipe.unet.parameters())
    assert not any(block._forward_hooks for block in tiny_pipe.unet.modules())


def test_other_settings_give_other_weights(tiny_pipe, encoded, found, whole, tmp_path):
    for number, change in enumerate([{"seed": 1}, {"caption_dropout": 0.9}, {"penalty": 50.0}]):
        run(tiny_pipe, encoded, found, tmp_path / str(number), **change)
    assert len({result(folder)[0] for folder in (whole, *tmp_path.glob("[0-9]"))}) == 4


@pytest.mark.parametrize(
    ("name", "call", "changes", "left"),
    [
        ("step_loss", 1, {}, 4),
        ("step_loss", 4, {}, 2),
        ("write_json", 1, {}, 0),  # the last file of all
        ("step_loss", 8 + DIAGNOSTIC_BATCHES, {"rounds": 2}, 2),
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(
    tiny_pipe, encoded, found, whole, tmp_path, monkeypatch, kill, name, call, changes, left
):
    another = hard_audit(encoded.names, [0, 1] * 6, encoded.caption_ids)
    monkeypatch.setattr(train_module, "infer_groups", Mock(return_value=another))
    if changes:
        module = run(tiny_pipe, encoded, found, whole := tmp_path / "whole", **changes)
        assert (module.num_groups, module.factor_names) == ((2, 2), ("factor 1", "factor 2"))
    kill(train_module, name, call, run, tiny_pipe, encoded, found, tmp_path / "cut", **changes)
    assert not (tmp_path / "cut" / "train.json").exists()
    if name == "step_loss" and left < 4:
        with pytest.raises(ConfigError, match=r"got others: penalty was 0\.0, now 2\.0\. Use the same"):
            run(tiny_pipe, encoded, found, tmp_path / "cut", **changes, penalty=2.0)
    forwards = []
    tiny_pipe.unet.register_forward_hook(lambda module, args, output: forwards.append(len(args[0])))
    run(tiny_pipe, encoded, found, tmp_path / "cut", **changes)
    assert forwards.count(CONFIG.batch_size) == left + 2 * DIAGNOSTIC_BATCHES * changes.get("rounds", 1)
    assert result(tmp_path / "cut") == result(whole)


def test_a_finished_run_is_read_back_and_other_settings_are_refused(tiny_pipe, encoded, found, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "m")
    (folder / ".work").mkdir()  # as after a kill at the very end
    tiny_pipe.unet.register_forward_pre_hook(lambda module, args: pytest.fail("trained again"))
    named = apply(found, Edits(names=(("", ""),)).with_name(0, 0, "land"))  # names change nothing that is trained
    again = run(tiny_pipe, encoded, named, folder).state_dict()
    assert all(torch.equal(again[name], value) for name, value in load_guidance(whole).state_dict().items())
    assert not (folder / ".work").exists()
    with pytest.raises(ConfigError, match=r"got others: penalty was 0\.0, now 2\.0\. Use the same"):
        run(tiny_pipe, encoded, found, folder, penalty=2.0)
    other = make_tiny_pipeline(seed=1)
    with pytest.raises(ConfigError, match="got others: model was"):
        run(other, encoded, audit_of(encoded, other), folder)
    with pytest.raises(ConfigError, match="got others: audit was"):
        run(tiny_pipe, encoded, apply(found, Edits().without_images([0])), folder)


def test_auto_trains_adapters_and_says_so(tiny_pipe, encoded, found, tmp_path, capsys):
    guidance = run(tiny_pipe, encoded, found, tmp_path / "m", backend="auto", steps=1, rank=2)
    assert (guidance.backend, guidance.config["rank"]) == ("lora", 2)
    assert "backend lora: 1 steps of 4 images" in capsys.readouterr().err


def test_an_audit_of_something_else_is_refused(tiny_pipe, encoded, found, tmp_path):
    with pytest.raises(AuditError, match="Expected the images that were audited"):
        run(tiny_pipe, encoded, audit_of(encoded, tiny_pipe, data_fingerprint="other"), tmp_path / "m")
    tiny_pipe.scheduler = type(tiny_pipe.scheduler).from_config(tiny_pipe.scheduler.config, beta_end=0.02)
    with pytest.raises(AuditError, match="Expected the model that was audited"):
        run(tiny_pipe, encoded, found, tmp_path / "m")


@pytest.mark.parametrize(("dtype", "mixed_precision"), [(torch.bfloat16, "auto"), (torch.float32, "bf16")])
def test_16_bits_train(tiny_pipe, encoded, tmp_path, dtype, mixed_precision):
    tiny_pipe.to(dtype)
    encoded = replace(encoded, conditions={name: values.to(dtype) for name, values in encoded.conditions.items()})
    module = run(tiny_pipe, encoded, audit_of(encoded, tiny_pipe), tmp_path / "m", mixed_precision=mixed_precision)
    assert module.dtype == torch.float32
    assert module.conv_out.weight.abs().sum() > 0
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_a_second_round_audits_the_guided_model_with_settings_of_the_first(tiny_pipe, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "infer_groups", infer_groups := Mock(wraps=train_module.infer_groups))
    loose = {"solver": "exact", "min_images": 4, "min_share": 0.1, "caption_threshold": 0.0}
    seen = {"vision_encoder": "clip", "words_model": "clip", "words": ["sea"]}
    run(tiny_pipe, encoded, audit_of(encoded, tiny_pipe, **loose, **seen), tmp_path / "m", rounds=2)
    asked = infer_groups.call_args.kwargs
    blank = {"vision_encoder": "", "words_model": "", "words": ()}
    assert asked["config"] == AuditConfig.from_dict(loose | blank | {"num_groups": 2})
    assert type(asked["denoiser"]).__name__ == "GuidedDenoiser"
    assert [(row["round"], row["step"]) for row in log(tmp_path / "m")] == [(0, 4), (1, 4)]
    assert json.loads((tmp_path / "m" / "train.json").read_text())["rounds"] == 2


def test_rounds_stop_when_nothing_is_left(tiny_pipe, encoded, found, whole, tmp_path, monkeypatch):
    nothing = audit_of(encoded, tiny_pipe, found=(False, False))
    monkeypatch.setattr(train_module, "infer_groups", Mock(return_value=nothing))
    run(tiny_pipe, encoded, found, tmp_path / "three", rounds=3)
    assert json.loads((tmp_path / "three" / "train.json").read_text())["rounds"] == 1
    assert (tmp_path / "three" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_round_adds_the_factors_that_are_new_and_leaves_the_others():
    prompts, one, other = [0] * 4 + [1] * 4, [0, 0, 1, 1] * 2, [0, 1, 0, 1] * 2
    before = apply(hard_audit("abcdefgh", one, prompts), Edits().without_images([1]))
    before = replace(before, edits=replace(before.edits, names=(("land", "water"),)))
    assert with_new_factors(before, hard_audit("abcdefgh", [1 - group for group in one], prompts)) is before
    added = with_new_factors(before, hard_audit("abcdefgh", other, prompts, found=(False, True)))
    assert [factor.name for factor in added.factors] == ["factor 1", "factor 2"]
    assert np.array_equal(added.group_weights[0], before.group_weights[0])
    assert np.array_equal(added.group_weights[1][4:], np.eye(2)[other[4:]])
    assert added.kept.tolist() == [True, False] + [True] * 6
    assert added.group_names[0] == ("land", "water")


def test_an_image_left_out_is_never_read(tiny_pipe, encoded, found, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "infer_groups", Mock(return_value=found))
    asked, kind = [], type(encoded.latents)
    read = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, rows: asked.append(rows) or read(self, rows))
    less = apply(found, Edits().without_images([0, 11]))
    run(tiny_pipe, encoded, less, tmp_path / "m", rounds=2, steps=10, batch_size=16)
    assert set(torch.cat(asked).tolist()) == set(range(12)) - {0, 11}


def test_preservation_keeps_unrelated_captions_as_they_were(tiny_pipe, encoded, found, tmp_path, monkeypatch):
    monkeypatch.setattr(AuditConfig, "caption_threshold", 0.0)  # random weights hardly read captions
    everyday = preservation.unrelated_captions([])[::16]
    monkeypatch.setattr(preservation, "unrelated_captions", lambda captions: everyday)
    numbers, moved = torch.Generator().manual_seed(0), []
    latents, timesteps = torch.randn(16, 4, 8, 8, generator=numbers), torch.linspace(100, 950, 16).long()
    condition = encode_captions(tiny_pipe, ["a photo of a spoon", "a photo of a hill"] * 8)
    rows = Rows(torch.arange(16)[:, None] // 2 % 2)
    for share in (0.0, 0.5):
        changes = {"preserve": share, "steps": 12, "batch_size": 12, "learning_rate": 1e-2}
        module = run(tiny_pipe, encoded, found, tmp_path / str(share), **changes)
        with FrozenDenoiser(tiny_pipe) as frozen, torch.no_grad():
            guided, _ = module.guided(frozen, DenoiserCall(latents, timesteps, condition), rows)
            moved.append((guided - frozen(latents, timesteps, condition)[0]).square().mean().item())
    assert moved[1] < 0.6 * moved[0]
