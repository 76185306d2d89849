import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from PIL import Image

from invdiff.config import ArchitectureConfig, FinetuneConfig
from invdiff.data.birds import BirdsWorld
from invdiff.data.captioned import load_captioned_images
from invdiff.errors import ConfigError, ModelError
from invdiff.models.load import load_pipeline
from invdiff.training import finetune as finetune_module
from invdiff.training import scratch
from invdiff.training.checkpoint import TrainingRun
from invdiff.training.finetune import finetune
from invdiff.training.scratch import learn_vocabulary

SHAPE = ArchitectureConfig(
    resolution=16,
    autoencoder_width=8,
    autoencoder_blocks=(1, 1),
    denoiser_channels=(8, 16),
    text_width=16,
    text_layers=1,
    vocabulary_size=514,
)
CONFIG = FinetuneConfig(
    steps=4,
    batch_size=4,
    autoencoder_steps=4,
    autoencoder_batch_size=4,
    checkpoint_every=2,
    ema_decay=0.5,
    mixed_precision="no",
)


@pytest.fixture(scope="module")
def data(tiny_folder):
    return load_captioned_images(tiny_folder)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A model trained from nothing without interruption; read only."""
    folder = tmp_path_factory.mktemp("whole")
    scratch_run(data, folder)
    return folder


def scratch_run(data, folder, *, shape=SHAPE, **changes):
    return finetune(data, folder, architecture=shape, config=replace(CONFIG, **changes), progress=False)


def base_run(data, folder, base, **changes):
    return finetune(data, folder, base=base, config=replace(CONFIG, **changes), progress=False)


def weights(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def kill(monkeypatch, module, name, call, run, *arguments, **changes):
    """Run, and let the `call`-th call of a function that a loop uses be a kill."""
    original, calls = getattr(module, name), []

    def killed(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments, **changes)


def never_step(monkeypatch):
    monkeypatch.setattr(TrainingRun, "descend", lambda *arguments: pytest.fail("trained again"))


def test_a_model_trained_from_nothing_is_whole_and_draws(data, tmp_path):
    pipe = scratch_run(data, tmp_path / "m")
    saved = load_pipeline(tmp_path / "m", device="cpu")
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(saved, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(pipe, name).state_dict().items())
    assert saved("a photo of a landbird", num_inference_steps=2).images[0].size == (16, 16)
    assert saved.vae.config.scaling_factor != 1.0
    assert not (tmp_path / "m" / ".work").exists()


@pytest.mark.parametrize(
    ("module", "function", "call"),
    [(scratch, "from_bytes", 4), (finetune_module, "per_sample_loss", 2), (finetune_module, "per_sample_loss", 4)],
)
def test_a_killed_run_goes_on_to_the_same_bytes(data, whole, tmp_path, monkeypatch, module, function, call):
    kill(monkeypatch, module, function, call, scratch_run, data, tmp_path)
    if module is finetune_module:  # the autoencoder is finished
        monkeypatch.setattr(scratch.F, "l1_loss", lambda *arguments: pytest.fail("trained again"))
    scratch_run(data, tmp_path)
    assert weights(tmp_path) == weights(whole)


def test_a_run_killed_before_its_last_file_is_finished(data, whole, tmp_path, monkeypatch):
    kill(monkeypatch, finetune_module, "write_json", 1, scratch_run, data, tmp_path)
    never_step(monkeypatch)
    scratch_run(data, tmp_path)
    assert weights(tmp_path) == weights(whole)


def test_a_finished_run_is_read_back(data, whole, monkeypatch):
    before = weights(whole)
    never_step(monkeypatch)
    pipe = scratch_run(data, whole)
    assert weights(whole) == before
    assert torch.equal(pipe.unet.conv_in.weight, load_pipeline(whole, device="cpu").unet.conv_in.weight)


def test_other_settings_in_a_finished_folder_are_refused_by_name(data, whole):
    with pytest.raises(ConfigError, match="got others: steps was 4, now 5"):
        scratch_run(data, whole, steps=5)
    with pytest.raises(ConfigError, match=r"got others: architecture\.text_layers was 1, now 2"):
        scratch_run(data, whole, shape=replace(SHAPE, text_layers=2))


def test_another_seed_gives_another_model(data, whole, tmp_path):
    scratch_run(data, tmp_path, seed=1)
    assert all(one != other for one, other in zip(weights(tmp_path).values(), weights(whole).values(), strict=True))


def test_half_precision_weights_load_in_float32(data, tmp_path):
    scratch_run(data, tmp_path, half_precision_weights=True, steps=1, autoencoder_steps=1)
    pipe = load_pipeline(tmp_path, device="cpu")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    unet = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    assert unet.stat().st_size < 3 * pipe.unet.num_parameters()


def test_a_vocabulary_is_the_same_each_time():
    # tokenizers' own order of tokens changes from one training to the next.
    captions = [f"a photo of {word} on {place}" for word in ("birds", "boats", "houses") for place in ("land", "sea")]
    first, *others = (learn_vocabulary(captions, 600, max_tokens=16) for _ in range(6))
    assert all(other.get_vocab() == first.get_vocab() for other in others)
    assert all(other("a photo of hoses").input_ids == first("a photo of hoses").input_ids for other in others)


def test_a_vocabulary_has_the_words_of_the_captions_and_the_size_asked_for():
    tokenizer = learn_vocabulary(["birds and boats"], 524, max_tokens=16)
    assert len(tokenizer) == 524
    tokenizer = learn_vocabulary(["birds and boats"], 1024, max_tokens=16)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Boats and birds").input_ids)[1:-1] == [
        "boats</w>", "and</w>", "birds</w>",
    ]  # fmt: skip


def test_hostile_captions_make_a_vocabulary(tmp_path):
    captions = [
        "🐦‍⬛ naïve 鸟",
        ".",
        "_ _",
        "word " * 500,
        "x" * 5000,
        "\u200b\t\n\x00",
        'quote " \\ </w> <|endoftext|>',
    ]
    rows = {"image": [Image.new("RGB", (16, 16), (30 * i, 0, 0)) for i in range(len(captions))], "text": captions}
    data = load_captioned_images(Dataset.from_dict(rows))
    pipe = scratch_run(data, tmp_path, steps=1, autoencoder_steps=1)
    assert pipe.tokenizer.model_max_length == SHAPE.max_tokens
    unseen = "Zebra 🦓 ß 9"
    reloaded = load_pipeline(tmp_path, device="cpu").tokenizer
    assert reloaded(unseen).input_ids == pipe.tokenizer(unseen).input_ids
    assert reloaded.unk_token_id not in reloaded("zebra ß 9").input_ids[1:-1]
    assert len(pipe(unseen, num_inference_steps=1).images) == 1


@pytest.mark.parametrize("fresh", [False, True])
def test_a_base_keeps_all_but_its_denoiser_and_is_resumed_to_the_same_bytes(
    data, tiny_pipe_dir, tmp_path, monkeypatch, fresh
):
    state = torch.random.get_rng_state()
    base_run(data, tmp_path / "whole", tiny_pipe_dir, fresh_denoiser=fresh)
    assert torch.equal(torch.random.get_rng_state(), state)
    before, after = weights(tiny_pipe_dir), weights(tmp_path / "whole")
    assert {name for name in before if before[name] != after[name]} == {"unet/diffusion_pytorch_model.safetensors"}
    interrupted = (finetune_module, "per_sample_loss", 4, base_run, data, tmp_path / "cut", tiny_pipe_dir)
    kill(monkeypatch, *interrupted, fresh_denoiser=fresh)
    base_run(data, tmp_path / "cut", tiny_pipe_dir, fresh_denoiser=fresh)
    assert weights(tmp_path / "cut") == after


def test_a_run_records_its_base_and_refuses_another_in_the_same_folder(data, tiny_pipe_dir, whole, tmp_path):
    base_run(data, tmp_path, tiny_pipe_dir, steps=1)
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert (record["base"], record["images"]) == (str(tiny_pipe_dir), 12)
    assert record["settings"]["data"] == data.fingerprint
    with pytest.raises(ConfigError, match="got others: base was"):
        base_run(data, tmp_path, whole, steps=1)


def unet_after(data, base, folder, **changes):
    """Weights after one step that is too small to move them."""
    pipe = base_run(data, folder, base, steps=1, learning_rate=1e-30, weight_decay=0.0, **changes)
    return pipe.unet.state_dict()["down_blocks.0.resnets.0.conv1.weight"]


def test_a_fresh_denoiser_starts_from_new_weights_of_its_seed(data, tiny_pipe_dir, tmp_path):
    base = load_pipeline(tiny_pipe_dir, device="cpu").unet.state_dict()["down_blocks.0.resnets.0.conv1.weight"]
    kept = unet_after(data, tiny_pipe_dir, tmp_path / "kept")
    one, same, other = (
        unet_after(data, tiny_pipe_dir, tmp_path / name, fresh_denoiser=True, seed=seed)
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert torch.equal(kept, base)
    assert one.shape == base.shape
    assert not torch.equal(one, base)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_settings_that_contradict_are_refused(data, tiny_pipe_dir, tmp_path):
    with pytest.raises(ConfigError, match="Expected a base for fresh_denoiser"):
        scratch_run(data, tmp_path, fresh_denoiser=True)
    with pytest.raises(ConfigError, match="either a base or an architecture"):
        finetune(data, tmp_path, base=tiny_pipe_dir, architecture=SHAPE, progress=False)


def test_a_base_without_a_unet_is_refused(data, tiny_pipe, tmp_path, monkeypatch):
    tiny_pipe.unet = torch.nn.Identity()
    monkeypatch.setattr(finetune_module, "load_pipeline", lambda *arguments, **keywords: tiny_pipe)
    with pytest.raises(ModelError, match="got a Identity"):
        finetune(data, tmp_path, base="some/base", progress=False)


def test_a_lower_caption_power_draws_rare_captions_more(tmp_path, monkeypatch):
    drawn = []
    multinomial = torch.multinomial

    def watched(chances, count, **keywords):
        drawn.append(chances / chances.sum())
        return multinomial(chances, count, **keywords)

    world = BirdsWorld(60, seed=3)
    data = world.captioned()
    monkeypatch.setattr(torch, "multinomial", watched)
    shares = []
    for power in (1.0, 0.0):
        drawn.clear()
        scratch_run(data, tmp_path / str(power), caption_power=power, steps=1, autoencoder_steps=1)
        captions = sorted(set(data.captions))
        shares.append([sum(drawn[-1][i].item() for i, c in enumerate(data.captions) if c == d) for d in captions])
    assert shares[0] == pytest.approx([data.captions.count(c) / 60 for c in captions])
    assert shares[1] == pytest.approx([1 / len(captions)] * len(captions))
