import contextlib

import pytest
import torch
from safetensors import torch as safetensors_torch
from torch import nn

from invdiff.config import TrainConfig
from invdiff.errors import ConfigError, DataError, TrainingError
from invdiff.training.checkpoint import TrainingRun, accelerator_for, learning_rate


def make_run(folder):
    config = TrainConfig(steps=8, checkpoint_every=2, ema_decay=0.9, mixed_precision="no")
    return TrainingRun(nn.Linear(3, 2), config, folder, {"steps": 8, "seed": 0})


def go_on(run, until, last=KeyboardInterrupt):
    """Train, and in step `until`, counted from 0, be killed or descend `last`."""

    def loss_at(step):
        if step == until and last is KeyboardInterrupt:
            raise KeyboardInterrupt
        run.log.append({"step": step + 1})
        loss = run.model(torch.ones(1, 3)).square().sum()
        return last(run.model, loss) if step == until else loss

    with contextlib.suppress(KeyboardInterrupt):
        run.minimise(loss_at, "a test", progress=False)


def spoil(model, loss):
    model.bias.data[0] = torch.nan
    return loss


@pytest.mark.parametrize(
    ("last", "what"), [(lambda model, loss: loss * torch.nan, "a finite loss"), (spoil, "finite weights")]
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, last, what):
    with pytest.raises(TrainingError, match=rf"Expected {what} at step 4, got NaN or infinity\. Lower learning_rate"):
        go_on(make_run(tmp_path), 3, last)
    assert make_run(tmp_path).start == 2


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(2.0, step, 100) for step in range(100)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_precisions_follow_one_another_in_one_process_and_fp16_is_refused_on_a_cpu():
    for mixed_precision, expected in (("bf16", torch.bfloat16), ("no", torch.float32), ("auto", torch.float32)):
        with accelerator_for(mixed_precision, torch.device("cpu")).autocast():
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected
    with pytest.raises(ConfigError, match="on a CPU, got 'fp16'"):
        accelerator_for("fp16", torch.device("cpu"))


@pytest.mark.parametrize("content", [b"", b"{}", lambda whole: whole[:-9], lambda whole: safetensors_torch.save({})])
def test_a_damaged_one_is_named_with_the_remedy(tmp_path, content):
    go_on(make_run(tmp_path), 3)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    with pytest.raises(DataError, match=r"checkpoint\.safetensors is damaged .* Delete it and run again"):
        make_run(tmp_path)
