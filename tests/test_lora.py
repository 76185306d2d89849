"""Adapters act on rows of their groups, add over factors, stay out of the null row and notice what skips them."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from safetensors import safe_open

from conftest import CAPTIONS, make_guidance_lora, make_guidance_module, make_tiny_pipeline
from invdiff import GuidanceModule, TrainConfig, attach
from invdiff.errors import ModelError
from invdiff.guidance.backends import settled
from invdiff.guidance.base import Rows
from invdiff.models.families import DenoiserCall
from invdiff.models.frozen import FrozenDenoiser
from invdiff.models.load import denoiser_of
from test_cli import fail, run
from tiny import denoise, draw, make_tiny


def guided(pipe, guidance, *arguments, embeds=None, **options):
    with attach(pipe, guidance, *arguments, **options):
        return denoise(pipe, embeds=embeds)


def same_rows(first, second):
    return [torch.allclose(a, b, atol=1e-5) for a, b in zip(first, second, strict=True)]


def test_an_adapter_is_low_rank_weights_added_to_the_layer_in_the_rows_of_its_groups(tiny_pipe):
    """Group 1 of factor 2, at half strength, beside what merging B A of its ranks into the weights gives."""
    guidance = make_guidance_lora(tiny_pipe, num_groups=(2, 3))
    expected = make_tiny_pipeline()
    with torch.no_grad():
        for path, adapter in zip(guidance.config["layers"], guidance.adapters.values(), strict=True):
            layer, delta = expected.unet.get_submodule(path), 0.0
            for ranks in (slice(0, 2), slice(6, 8)):  # of group 0 of factor 1 and group 1 of factor 2
                delta = delta + torch.einsum("or,r...->o...", adapter.up[:, ranks], adapter.down[ranks])
            layer.weight.add_(0.5 * delta)
    output = guided(tiny_pipe, guidance, 0.5, [[0, 1], [1, 2], [0, 1]])
    assert same_rows(output, denoise(expected)) == [True, False, True]


def test_what_is_left_open_is_settled_by_the_backend():
    assert settled(TrainConfig(steps=5)) == TrainConfig(backend="lora", steps=5, batch_size=32)
    assert settled(TrainConfig(backend="tokens")).steps == 600


def test_the_null_row_runs_without_the_adapter_unless_it_is_on(tiny_pipe):
    embeds, negative = tiny_pipe.encode_prompt(CAPTIONS[0], "cpu", 1, True)
    rows = torch.cat([negative, embeds, embeds])
    plain = denoise(tiny_pipe, embeds=rows)
    for null_adapter, untouched in (("off", [True, False, False]), ("on", [False] * 3)):
        output = guided(tiny_pipe, make_guidance_lora(tiny_pipe, null_adapter=null_adapter), embeds=rows)
        assert same_rows(output, plain) == untouched
    noise = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    with attach(tiny_pipe, make_guidance_lora(tiny_pipe, null_adapter="off")):
        output = tiny_pipe.unet(noise, 500, rows[[1, 0]]).sample  # in a loop of one's own they may come last
    assert same_rows(output, tiny_pipe.unet(noise, 500, rows[[1, 0]]).sample) == [False, True]


def record_rows(attachment):
    """Let every later call of the denoiser append what guides its rows to the list that is returned."""
    original, seen = attachment.begin, []
    attachment.begin = lambda call: seen.append(original(call)) or seen[-1]
    return seen


@pytest.mark.parametrize("family", ["sd1", "pixart"])
def test_a_negative_prompt_takes_the_place_of_the_null_caption(family):
    pipe, noise = make_tiny(family), torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    options = {"num_inference_steps": 1, "latents": noise}
    with attach(pipe, make_guidance_lora(pipe, null_adapter="off")) as attachment:
        seen = record_rows(attachment)
        for negative, scale in (("", 3.0), ("a bird", 3.0), ("a bird", 1.0)):
            draw(pipe, 0, 1, negative_prompt=["", negative], guidance_scale=scale, **options)
    assert [rows.null.tolist() for rows in seen] == [[True, True, False, False]] * 2 + [[False, False]]


def test_another_pipeline_of_the_denoiser_without_guidance_has_no_null_row(tiny_pipe):
    with attach(tiny_pipe, make_guidance_lora(tiny_pipe, null_adapter="off"), environments=torch.tensor([0, 1])):
        draw(tiny_pipe, 0, 1, num_inference_steps=1)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        seen = tiny_pipe.unet(latents, 500, torch.ones(2, 16, 16)).sample
    assert same_rows(seen, tiny_pipe.unet(latents, 500, torch.ones(2, 16, 16)).sample) == [False, False]


def test_classes_with_a_number_near_that_of_the_null_class_are_guided():
    pipe = make_tiny("dit")
    options = {"class_labels": [999], "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
    plain = pipe(**options, generator=torch.manual_seed(0)).images
    with attach(pipe, make_guidance_lora(pipe, null_adapter="off")):
        assert not np.array_equal(pipe(**options, generator=torch.manual_seed(0)).images, plain)


@pytest.mark.parametrize(
    ("family", "kind", "expected"),
    [
        ("sd1", None, [[True, False]]),
        ("sd1", diffusers.StableDiffusionPAGImg2ImgPipeline, [[True, False, False]]),
        ("flux", None, [[False], [True]]),
    ],
)
def test_the_pipeline_that_runs_tells_which_rows_are_of_the_negative_prompt(family, kind, expected):
    pipe, scale = make_tiny(family), {"sd1": "guidance_scale", "flux": "true_cfg_scale"}[family]
    other = (kind or AutoPipelineForImage2Image).from_pipe(pipe)
    make = make_guidance_module if kind else make_guidance_lora  # whose layers would see fewer rows
    with attach(pipe, make(pipe, null_adapter="off")) as attachment:
        seen = record_rows(attachment)
        draw(pipe, 0, num_inference_steps=1, **{scale: 1.0})
        asked = {"image": torch.rand(1, 3, 32, 32), "negative_prompt": ["a bird"], "strength": 1.0, scale: 3.0}
        draw(other, 0, num_inference_steps=1, **asked)
    assert [rows.null.tolist() for rows in seen] == [[False], *expected]


def test_layers_that_do_not_run_are_noticed_in_sampling_and_in_training(tiny_pipe):
    guidance, rows = make_guidance_lora(tiny_pipe), Rows(torch.zeros(1, 1, dtype=torch.long))
    with attach(tiny_pipe, guidance) as attachment:
        tiny_pipe.unet.fuse_qkv_projections()
        with pytest.raises(ModelError, match="adapted layers to run"):
            denoise(tiny_pipe)
        tiny_pipe.unet.unfuse_qkv_projections()
        denoise(tiny_pipe)
        assert attachment.calls == 2
    call = DenoiserCall(torch.zeros(1, 4, 8, 8), torch.tensor([500]), {"prompt_embeds": torch.zeros(1, 16, 16)})
    with FrozenDenoiser(tiny_pipe) as frozen:
        guidance.guided(frozen, call, rows)
        tiny_pipe.unet.fuse_qkv_projections()
        with pytest.raises(ModelError, match="adapted layers to run"):
            guidance.guided(frozen, call, rows)


def test_guidance_of_another_backend_or_model_is_refused(tiny_pipe, tmp_path):
    with attach(tiny_pipe, make_guidance_module(tiny_pipe)):
        with pytest.raises(ModelError, match="one backend on a model, found 'module'"):
            attach(tiny_pipe, make_guidance_lora(tiny_pipe))
        denoise(tiny_pipe)
    make_guidance_lora(tiny_pipe).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"a GuidanceModule at .*, found a GuidanceLoRA\. Load .* by `load_guidance`"):
        GuidanceModule.from_pretrained(tmp_path)
    for seed in range(5):  # however the same weights were rounded to 16 bits
        pipe = make_tiny_pipeline(seed)
        guidance = make_guidance_lora(pipe.to(dtype=torch.bfloat16))
        pipe = make_tiny_pipeline(seed)
        pipe.unet.half().bfloat16()
        attach(pipe, guidance).detach()
    guidance, numbers = make_guidance_lora(tiny_pipe), torch.Generator().manual_seed(0)
    with torch.no_grad():  # as by a short fine-tuning
        for weight in tiny_pipe.unet.parameters():
            weight += 3e-4 * torch.randn(weight.shape, generator=numbers)
    for other in (make_tiny_pipeline(seed=1), tiny_pipe):
        with pytest.raises(ModelError, match="weights: expected those it was trained beside"):
            attach(other, guidance)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_an_exported_file_alone_draws_its_group(family, tmp_path):
    """As `attach` does with every image in it; a UNet's file for ComfyUI too; fused weights leave nothing to run."""
    pipe = make_tiny(family)
    guidance = make_guidance_lora(pipe)
    files = [path for path in guidance.export(tmp_path) if "group-1" in path.name]
    assert len(files) == (1 if family == "sd3" else 2)
    with attach(pipe, guidance, environments=[1, 1]):
        expected = draw(pipe, 0, 1)
    assert not torch.allclose(draw(pipe, 0, 1), expected, atol=1e-2)
    for file in files:
        alone = make_tiny(family)
        alone.load_lora_weights(file)
        assert torch.allclose(draw(alone, 0, 1), expected, atol=1e-4)
        alone.fuse_lora()
        alone.unload_lora_weights()
        assert not [layer for layer in denoiser_of(alone).modules() if hasattr(layer, "base_layer")]
        assert torch.allclose(draw(alone, 0, 1), expected, atol=1e-4)


def test_exported_files_are_named_by_people_s_names(tiny_pipe, tmp_path):
    guidance = make_guidance_lora(tiny_pipe, num_groups=(2, 2))
    names = [["land/../", ""], ["Wasser: tief", "wasser? tief"]]
    guidance.register_to_config(factor_names=["place", "depth"], record={"group_names": names})
    stems = ["0-place-land", "1-place-group-1", "2-depth-Wasser-tief", "3-depth-wasser-tief"]
    files = guidance.export(tmp_path)
    assert [path.name for path in files[::2]] == [f"{stem}.safetensors" for stem in stems]
    assert [path.name for path in files[1::2]] == [f"{stem}-kohya.safetensors" for stem in stems]
    with safe_open(files[5], "pt") as file:
        about = {"factor": "depth", "group": "Wasser: tief", "null_adapter": "on"}
        assert about.items() <= file.metadata().items()
        assert all(name.startswith("lora_unet_") for name in file.keys())  # noqa: SIM118


def test_what_no_lora_file_can_hold_is_not_exported(tiny_pipe, tmp_path):
    make_guidance_module(tiny_pipe).save_pretrained(tmp_path / "module")
    message = fail("export", tmp_path / "module", "--output", tmp_path / "lora")
    assert "backend 'lora' to export, got 'module', which no LoRA file can hold" in message
    with pytest.raises(ModelError, match="diffusers loads LoRAs into, got PixArtTransformer2DModel"):
        make_guidance_lora(make_tiny("pixart")).export(tmp_path)


def test_the_command_writes_files_and_says_how_to_load_one(tiny_pipe, tmp_path):
    make_guidance_lora(tiny_pipe, mode="invariant", null_adapter="off").save_pretrained(tmp_path / "guidance")
    shown = run("export", tmp_path / "guidance", "--output", tmp_path / "lora")
    assert "a LoRA acts on the null row too" in shown.stderr
    file = tmp_path / "lora" / "invariant.safetensors"
    assert shown.stdout.split("\n")[-2].endswith(f"pipe.load_lora_weights({str(file)!r}).")
    tiny_pipe.load_lora_weights(file)
