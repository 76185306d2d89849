from dataclasses import replace

import pytest
import torch
from torch import nn

from invdiff.config import TrainConfig
from invdiff.errors import ConfigError, DataError, TrainingError
from invdiff.training.checkpoint import TrainingRun, accelerator_for, learning_rate

SETTINGS = {"steps": 8, "seed": 0}
CONFIG = TrainConfig(steps=8, checkpoint_every=2, ema_decay=0.9, mixed_precision="no")


def make_run(folder, *, seed=0, inputs=3, settings=SETTINGS, config=CONFIG, running=None) -> TrainingRun:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(inputs, 2)
    return TrainingRun(model, config, folder, settings, device=torch.device("cpu"), running=running)


def go_on(run, until):
    for step in range(run.start, until):
        run.descend(run.model(torch.ones(1, 3)).square().sum(), step)
        run.log.append({"step": step + 1})
        run.save_if_due(step)
    return run


def state(run):
    return {**run.model.state_dict(), **{f"average.{k}": v for k, v in run.average.state_dict().items()}}


def test_a_resumed_run_goes_on_to_the_same_weights(tmp_path):
    whole = go_on(make_run(tmp_path / "whole"), 8)
    go_on(make_run(tmp_path / "cut"), 5)
    resumed = make_run(tmp_path / "cut", seed=1)
    assert (resumed.start, resumed.log) == (4, [{"step": step} for step in (1, 2, 3, 4)])
    go_on(resumed, 8)
    expected = state(whole)
    assert all(torch.equal(value, expected[name]) for name, value in state(resumed).items())
    assert make_run(tmp_path / "cut").start == 8


def test_buffers_that_are_no_part_of_the_model_come_back(tmp_path):
    kept, restored = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    run = make_run(tmp_path, running=kept)
    kept.running_mean.fill_(3.0)
    go_on(run, 2)
    make_run(tmp_path, running=restored)
    assert restored.running_mean.item() == 3.0


def test_the_model_ends_with_its_averaged_weights(tmp_path):
    run = go_on(make_run(tmp_path), 8)
    average = run.average.module.weight.clone()
    assert not torch.equal(run.model.weight, average)
    run.finish()
    assert torch.equal(run.model.weight, average)


def test_what_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    run = go_on(make_run(tmp_path), 3)
    with pytest.raises(TrainingError, match=r"Expected a finite loss, got nan at step 4\. Lower learning_rate"):
        run.descend(torch.tensor(torch.nan, requires_grad=True), 3)
    with torch.no_grad():
        run.model.bias[0] = float("nan")
    with pytest.raises(TrainingError, match="Expected finite weights, got others after step 4"):
        run.save_if_due(3)
    assert make_run(tmp_path).start == 2


def test_the_learning_rate_warms_up_and_falls_to_zero(tmp_path):
    rates = [learning_rate(2.0, step, 100) for step in range(100)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="on a CPU, got 'fp16'"):
        accelerator_for("fp16", torch.device("cpu"))


def test_two_precisions_follow_one_another_in_one_process():
    for mixed_precision, expected in (("bf16", torch.bfloat16), ("no", torch.float32), ("bf16", torch.bfloat16)):
        with accelerator_for(mixed_precision, torch.device("cpu")).autocast():
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_only_the_newest_complete_checkpoint_is_kept_and_read(tmp_path):
    go_on(make_run(tmp_path, config=replace(CONFIG, steps=12)), 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-12" / "state.safetensors").write_bytes(b"half")
    assert make_run(tmp_path).start == 10


def test_other_settings_are_named(tmp_path):
    go_on(make_run(tmp_path), 2)
    with pytest.raises(ConfigError, match=r"got others: steps was 8, now None; seed was 0, now 1\. Use the same"):
        make_run(tmp_path, settings={"seed": 1})


@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_damaged_one_is_named_with_the_remedy(tmp_path, file, content):
    go_on(make_run(tmp_path), 2)
    path = tmp_path / "step-2" / file
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(DataError, match=r"step-2 is damaged .* Delete that folder and run again"):
        make_run(tmp_path)


def test_one_of_a_model_of_another_shape_is_refused(tmp_path):
    go_on(make_run(tmp_path), 2)
    with pytest.raises(DataError, match="size mismatch"):
        make_run(tmp_path, inputs=4)
