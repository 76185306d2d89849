import pytest
import torch
from torch import nn

from invdiff.errors import ConfigError, DataError, TrainingError
from invdiff.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from invdiff.training.optimization import Precision, moving_average

SETTINGS = {"steps": 4, "seed": 0}


def make_state(seed=0, *, trained=True) -> TrainingState:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    average = moving_average(model, 0.9)
    state = TrainingState(model, optimizer, average, Precision("no", torch.device("cpu")), {"figure": seed})
    if trained:
        take_step(state)
    return state


def take_step(state):
    state.precision.step(state.model(torch.ones(1, 3)).sum(), state.model, state.optimizer, 1.0)
    state.average.update_parameters(state.model)


def checkpointed(folder, step=2):
    state = make_state()
    save_checkpoint(folder, step, state, SETTINGS)
    return state


def test_a_state_comes_back_whole_and_goes_on_alike(tmp_path):
    state, restored = checkpointed(tmp_path), make_state(seed=1, trained=False)
    assert load_checkpoint(tmp_path, restored, SETTINGS) == 2
    assert restored.running == {"figure": 0}
    take_step(state)
    take_step(restored)
    expected = state.tensors()
    assert restored.tensors().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in restored.tensors().items())


def test_weights_that_are_not_finite_are_refused_and_the_checkpoint_before_is_kept(tmp_path):
    state = checkpointed(tmp_path)
    with torch.no_grad():
        state.model.bias[0] = float("nan")
    with pytest.raises(TrainingError, match="Expected finite weights, got others after step 3"):
        save_checkpoint(tmp_path, 3, state, SETTINGS)
    assert load_checkpoint(tmp_path, make_state(seed=1), SETTINGS) == 2


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="on a CPU, got 'fp16'"):
        Precision("fp16", torch.device("cpu"))


def test_two_precisions_follow_one_another_in_one_process():
    for mixed_precision, expected in (("bf16", torch.bfloat16), ("no", torch.float32), ("bf16", torch.bfloat16)):
        with Precision(mixed_precision, torch.device("cpu")).autocast():
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_an_empty_folder_starts_at_step_0(tmp_path):
    assert load_checkpoint(tmp_path / "absent", make_state(), SETTINGS) == 0


def test_only_the_newest_is_kept(tmp_path):
    checkpointed(tmp_path, 2)
    checkpointed(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]


def test_one_that_was_cut_short_is_passed_over(tmp_path):
    checkpointed(tmp_path, 2)
    (tmp_path / "step-10").mkdir()
    (tmp_path / "step-10" / "state.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path, make_state(), SETTINGS) == 2


def test_other_settings_are_named(tmp_path):
    checkpointed(tmp_path)
    with pytest.raises(ConfigError, match=r"seed was 0, now 1; steps was 4, now None"):
        load_checkpoint(tmp_path, make_state(), {"seed": 1})


@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_damaged_one_is_named_with_the_remedy(tmp_path, file, content):
    checkpointed(tmp_path)
    path = tmp_path / "step-2" / file
    if content is None:
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"step-2 is damaged .* Delete that folder and run again"):
        load_checkpoint(tmp_path, make_state(), SETTINGS)


def test_one_of_a_model_of_another_shape_is_refused(tmp_path):
    checkpointed(tmp_path)
    model = nn.Linear(4, 2)
    other = TrainingState(
        model, torch.optim.AdamW(model.parameters()), moving_average(model, 0.9), Precision("no", torch.device("cpu"))
    )
    with pytest.raises(DataError, match="size mismatch"):
        load_checkpoint(tmp_path, other, SETTINGS)
