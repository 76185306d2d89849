import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image

from invdiff import ArchitectureConfig, FinetuneConfig, finetune, load_captioned_images, load_pipeline
from invdiff.errors import AuditError, ConfigError, ModelError
from invdiff.training import finetune as finetune_module
from invdiff.training.finetune import fitting_rate, learn_vocabulary
from runs import hard_audit
from tiny import make_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
WIDTHS = {"autoencoder_width": 8, "autoencoder_blocks": (1, 1), "denoiser_channels": (8, 16), "text_width": 16}
SHAPE = ArchitectureConfig(**WIDTHS, resolution=16, text_layers=1, vocabulary_size=514)
STEPS = {"steps": 4, "batch_size": 4, "autoencoder_steps": 4, "autoencoder_batch_size": 4, "checkpoint_every": 2}
CONFIG = FinetuneConfig(**STEPS, ema_decay=0.5, mixed_precision="no")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a model trained from nothing without interruption, read only, and its pipeline."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(data, folder)


def run(data, folder, base=None, shape=SHAPE, audit=None, **changes):
    shapes = {"base": base, "architecture": shape if base is None else None}
    return finetune(data, folder, **shapes, audit=audit, config=replace(CONFIG, **changes), progress=False)


def weights(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_a_model_trained_from_nothing_is_whole_and_draws(whole):
    folder, pipe = whole
    saved = load_pipeline(folder, device="cpu")
    for name in ("unet", "vae", "text_encoder"):
        torch.testing.assert_close(*(getattr(each, name).state_dict() for each in (saved, pipe)), rtol=0, atol=0)
    assert saved("a photo of a landbird", num_inference_steps=2).images[0].size == (16, 16)
    assert saved.vae.config.scaling_factor != 1.0
    assert not (folder / ".work").exists()


@pytest.mark.parametrize(
    ("module", "name", "call", "left"),
    [
        (F, "l1_loss", 10, (2, 4)),  # three in each step of the autoencoder
        (finetune_module, "per_sample_loss", 4, (0, 2)),
        (finetune_module, "write_json", 1, (0, 0)),  # the last file of all
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(data, whole, tmp_path, monkeypatch, kill, module, name, call, left):
    kill(module, name, call, run, data, tmp_path)
    pixels = Mock(wraps=F.l1_loss)
    latents = Mock(wraps=finetune_module.per_sample_loss)
    monkeypatch.setattr(F, "l1_loss", pixels)
    monkeypatch.setattr(finetune_module, "per_sample_loss", latents)
    run(data, tmp_path)
    assert (pixels.call_count / 3, latents.call_count) == left
    assert weights(tmp_path) == weights(whole[0])


def test_a_finished_run_is_read_back_and_other_settings_are_refused_by_name(data, whole, monkeypatch):
    folder, pipe = whole
    before = weights(folder)
    monkeypatch.setattr(finetune_module, "TrainingRun", lambda *arguments: pytest.fail("trained again"))
    assert torch.equal(run(data, folder).unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert weights(folder) == before
    with pytest.raises(ConfigError, match="got others: steps was 4, now 5"):
        run(data, folder, steps=5)
    with pytest.raises(ConfigError, match=r"got others: architecture\.text_layers was 1, now 2"):
        run(data, folder, shape=replace(SHAPE, text_layers=2))


def test_another_seed_gives_another_model_and_half_precision_weights_load_in_float32(data, whole, tmp_path):
    run(data, tmp_path, seed=1, half_precision_weights=True)
    loaded = load_pipeline(tmp_path, device="cpu")
    for name in ("unet", "vae", "text_encoder"):
        mine, theirs = (next(getattr(pipe, name).parameters()) for pipe in (loaded, whole[1]))
        assert mine.dtype == torch.float32
        assert not torch.allclose(mine, theirs, rtol=1e-2)
    assert (tmp_path / "unet" / WEIGHTS).stat().st_size < 3 * loaded.unet.num_parameters()


def test_a_vocabulary_has_the_words_of_the_captions_and_the_size_asked_for_each_time():
    # tokenizers' own order of tokens changes from one training to the next.
    captions = [f"a photo of {word} on {place}" for word in ("birds", "boats", "houses") for place in ("land", "sea")]
    first, *others = (learn_vocabulary(captions, 600, max_tokens=16) for _ in range(6))
    assert len(learn_vocabulary(captions, 524, max_tokens=16)) == 524
    assert all(other.get_vocab() == first.get_vocab() for other in others)
    assert all(other("a photo of hoses").input_ids == first("a photo of hoses").input_ids for other in others)
    read = first.convert_ids_to_tokens(first("Boats on land").input_ids)
    assert read[1:-1] == ["boats</w>", "on</w>", "land</w>"]


def test_hostile_captions_make_a_vocabulary(tmp_path):
    captions = ["🐦‍⬛ naïve 鸟", ".", "_ _", "word " * 500, "x" * 5000, "\u200b\t\n\x00", '" \\ </w> <|endoftext|>']
    rows = {"image": [Image.new("RGB", (16, 16), (30 * i, 0, 0)) for i in range(len(captions))], "text": captions}
    pipe = run(load_captioned_images(Dataset.from_dict(rows)), tmp_path, steps=1, autoencoder_steps=1)
    tokenizer, unseen = load_pipeline(tmp_path, device="cpu").tokenizer, "Zebra 🦓 ß 9"
    assert tokenizer.model_max_length == SHAPE.max_tokens
    assert tokenizer(unseen).input_ids == pipe.tokenizer(unseen).input_ids
    assert tokenizer.unk_token_id not in tokenizer("zebra ß 9").input_ids[1:-1]
    assert len(pipe(unseen, num_inference_steps=1).images) == 1


def test_a_base_keeps_all_but_its_denoiser(data, tiny_pipe_dir, whole, tmp_path):
    run(data, tmp_path / "whole", tiny_pipe_dir)
    before, after = weights(tiny_pipe_dir), weights(tmp_path / "whole")
    assert {name for name in before if before[name] != after[name]} == {f"unet/{WEIGHTS}"}
    record = json.loads((tmp_path / "whole" / "finetune.json").read_text())
    assert (record["base"], record["images"]) == (str(tiny_pipe_dir), 12)
    assert record["settings"]["data"] == data.fingerprint
    with pytest.raises(ConfigError, match="got others: base was"):
        run(data, tmp_path / "whole", whole[0])


def test_a_fresh_denoiser_starts_from_new_weights_of_its_seed(data, tiny_pipe_dir, tmp_path):
    """After one step, which moves no weight far."""
    state = torch.random.get_rng_state()
    options = {"kept": {}, "one": {"fresh_denoiser": True}, "other": {"fresh_denoiser": True, "seed": 1}}
    pipes = [run(data, tmp_path / key, tiny_pipe_dir, steps=1, **changes) for key, changes in options.items()]
    pipes.append(load_pipeline(tiny_pipe_dir, device="cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    kept, one, other, base = (pipe.unet.down_blocks[0].resnets[0].conv1.weight for pipe in pipes)
    torch.testing.assert_close(kept, base, rtol=0, atol=1e-3)
    assert one.shape == base.shape
    assert min((one - weight).abs().mean().item() for weight in (base, other)) > 0.01
    records = [json.loads((tmp_path / key / "finetune.json").read_text()) for key in options]
    assert [record["settings"]["learning_rate"] for record in records] == [3e-4, 1.5e-3, 1.5e-3]


def test_the_learning_rate_of_a_base_falls_with_its_size():
    assert fitting_rate(16_000_000) == pytest.approx(2e-4, rel=0.02)
    assert (fitting_rate(10**6), fitting_rate(2 * 10**9)) == (3e-4, 1e-5)


def test_a_base_of_another_family_is_refused_and_none_is_written_over(data, tiny_pipe_dir, tmp_path):
    make_tiny("sdxl").save_pretrained(tmp_path / "sdxl")
    with pytest.raises(ModelError, match=r"Expected a base of Stable Diffusion 1\.x/2\.x, got Stable Diffusion XL"):
        run(data, tmp_path / "out", tmp_path / "sdxl")
    with pytest.raises(ConfigError, match="found a pipeline in"):
        run(data, tiny_pipe_dir, tiny_pipe_dir)


@pytest.fixture
def chances(monkeypatch):
    """A function that gives the chance of each image in the last draw."""
    monkeypatch.setattr(torch, "multinomial", multinomial := Mock(wraps=torch.multinomial))
    return lambda: multinomial.call_args.args[0] / multinomial.call_args.args[0].sum()


@pytest.mark.parametrize(("power", "rare"), [(1.0, 0.25), (0.0, 0.5)])
def test_a_lower_caption_power_draws_rare_captions_more(data, tiny_pipe_dir, tmp_path, chances, power, rare):
    data = replace(data, captions=[data.captions[0]] * 9 + [data.captions[1]] * 3)
    run(data, tmp_path, tiny_pipe_dir, caption_power=power, steps=1)
    assert chances()[9:].sum().item() == pytest.approx(rare)


def audited(data, rare, fingerprint=None):
    """An audit of the images that calls these rows of the first caption's rare group, which the second lacks."""
    prompts = [int(caption != min(data.captions)) for caption in data.captions]
    labels, found = [row in rare for row in range(len(data))], (bool(rare), False)
    return hard_audit(data.names, labels, prompts, found=found, data_fingerprint=fingerprint or data.fingerprint)


def test_the_groups_of_an_audit_are_drawn_equally_often(data, tiny_pipe_dir, tmp_path, chances):
    first = [row for row, caption in enumerate(data.captions) if caption == min(data.captions)]
    run(data, tmp_path, tiny_pipe_dir, audit=audited(data, first[:1]))
    assert chances()[first[0]].item() == pytest.approx(chances()[first[1:]].sum().item())
    with pytest.raises(ConfigError, match="got others: audit was"):
        run(data, tmp_path, tiny_pipe_dir)


def test_an_audit_that_cannot_be_drawn_by_is_refused_before_any_work(data, tmp_path):
    with pytest.raises(AuditError, match="got others"):
        run(data, tmp_path, audit=audited(data, [0], fingerprint="other"))
    with pytest.raises(AuditError, match="found none"):
        run(data, tmp_path, audit=audited(data, []))
    with pytest.raises(ConfigError, match="no caption_power with an audit"):
        run(data, tmp_path, audit=audited(data, [0]), caption_power=0.5)
    assert not any(tmp_path.iterdir())
