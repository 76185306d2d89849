"""Every family audits, trains, draws, saves and loads; a module without effect leaves it bit-identical."""

import json
from dataclasses import replace
from functools import cache, partial
from unittest.mock import Mock

import diffusers
import pytest
import torch
from torch import nn

from conftest import make_guidance_module
from invdiff import GuidanceModule, attach, audit, generate, load_captioned_images, load_pipeline, train
from invdiff.config import AuditConfig, GenerateConfig, TrainConfig
from invdiff.data.encode import as_encoded, model_fingerprint
from invdiff.errors import AuditError, ConfigError, DataError, ModelError
from invdiff.files import weights_digest
from invdiff.guidance.backends import BACKENDS, load_guidance
from invdiff.models.families import family_of
from invdiff.models.frozen import FrozenDenoiser
from invdiff.sampling import drawing_flags
from tiny import CAPTIONS, FAMILIES, RESOLUTION, draw, make_tiny, make_unet


@cache
def tiny(family):
    """One pipeline of each family for all tests; none may change it."""
    return make_tiny(family)


def of_family(data, family):
    if family == "dit":
        return replace(data, captions=[caption.split()[-1] for caption in data.captions])
    return data


@cache
def start(family, folder):
    """What all backends of a family begin with: an audit, its cache, images, and the pipeline saved and loaded."""
    pipe, place = tiny(family), folder.with_name(f"start-{family}")
    found = run_audit(pipe, family, load_captioned_images(folder), place)
    pipe.save_pretrained(place / "pipe")
    return found, place / "cache", draw(pipe, 0, 1), load_pipeline(place / "pipe", device="cpu")


def run_audit(pipe, family, data, tmp_path):
    settings = {"solver": "gradient" if family == "ddpm" else "exact", "min_images": 4, "min_share": 0.1}
    config = AuditConfig(**settings, resolution=RESOLUTION.get(family, 0))
    return audit(pipe, of_family(data, family), config=config, cache_dir=tmp_path / "cache", progress=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_audits_trains_draws_and_is_read_back(family, backend, data, tiny_folder, tmp_path):
    pipe = tiny(family)
    if backend == "tokens" and family in ("dit", "ddpm"):
        with pytest.raises(ModelError, match=r"reads prompt embeddings, got .* reads none"):
            BACKENDS[backend].for_pipeline(pipe)
        return
    found, cache_dir, before, saved = start(family, tiny_folder)
    assert len(found.prompts) == (1 if family == "ddpm" else len(set(found.prompt_ids.tolist())))
    rest = {"batch_size": 8, "learning_rate": 3e-3, "preserve": 0, "mixed_precision": "no"}
    config = TrainConfig(backend=backend, steps=24 if backend == "module" else 2, **rest)
    with attach(pipe, BACKENDS[backend].for_pipeline(pipe)):
        assert torch.equal(draw(pipe, 0, 1), before)
    options = {"config": config, "cache_dir": cache_dir, "progress": False}
    module = train(pipe, of_family(data, family), found, tmp_path / "module", **options)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "module" / "log.jsonl").read_text().splitlines()]
    if backend == "module":  # others can hardly make a model of random weights draw anything
        assert losses[-1] < 0.8 * losses[0]

    loaded = load_guidance(tmp_path / "module")
    assert loaded.config["record"]["audit"] == found.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
    sizes = {"images_per_prompt": 2, "num_inference_steps": 1, "resolution": RESOLUTION.get(family, 0)}
    images = GenerateConfig(**sizes, guidance_scale=1.0 if family == "ddpm" else 3.0)
    prompts = {"ddpm": [], "dit": ["landbird", "waterbird"]}.get(family, list(CAPTIONS))
    drawn = generate(pipe, prompts, tmp_path / "out", module=loaded, config=images, progress=False)
    rows = [json.loads(line) for line in (drawn / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [p for p in prompts or [""] for _ in range(2)]
    assert all(len(row["environment"]) == len(found.factors) and {*row["environment"]} <= {0, 1} for row in rows)

    with attach(pipe, loaded) as attachment:
        expected = draw(pipe, 0, 1)
        assert not torch.allclose(expected, before, atol=1e-3)
        attachment.scale = 0
        assert torch.equal(draw(pipe, 0, 1), before)
    with attach(saved, loaded):
        assert torch.allclose(draw(saved, 0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_what_sampling_sees_and_features_lie_where_the_image_is(family, data, tmp_path, monkeypatch):
    """The denoiser as audit and training call it, and as the pipeline does, give guidance the same inputs."""
    pipe = tiny(family)
    options = {"resolution": RESOLUTION.get(family, 0), "progress": False}
    encoded = as_encoded(pipe, of_family(data, family), tmp_path, **options)
    monkeypatch.setattr(GuidanceModule, "forward", forward := Mock(side_effect=lambda *read, **_: read[3]))
    with attach(pipe, GuidanceModule.for_pipeline(pipe)):
        draw(pipe, 0, 1, guidance_scale=1.0)
    latents, timesteps, condition, model_pred, sampled, _ = forward.call_args_list[0].args
    assert 500 <= timesteps[0] <= 1000  # the scale of the training schedule, whatever the denoiser is passed
    changed = latents.clone()
    changed[..., :2, -2:] += 3.0
    with FrozenDenoiser(pipe) as frozen, torch.no_grad():
        caption_ids = torch.arange(len(latents)) if encoded.conditions else torch.zeros(0, dtype=torch.long)
        told = encoded.condition(caption_ids)
        same_pred, features = frozen(latents, timesteps, told)
        assert torch.allclose(features, sampled, atol=1e-4)
        moved = (frozen(changed, timesteps, told)[1] - features).abs().mean(dim=(0, 1))
    assert set(condition) == set(told) - {"pooled_prompt_embeds"}
    assert all(torch.allclose(condition[name].float(), told[name].float(), atol=1e-5) for name in condition)
    assert torch.allclose(same_pred, model_pred, atol=1e-4)
    height, width = moved.shape
    row, column = divmod(int(moved.argmax()), width)  # features of the changed corner change most
    assert row < height / 2
    assert column >= width / 2


def trained(pipe, data, found, folder, **settings):
    config = TrainConfig(**{"steps": 2, "batch_size": 8, "preserve": 0, "mixed_precision": "no"} | settings)
    return train(pipe, data, found, folder / "module", config=config, cache_dir=folder / "cache", progress=False)


def test_a_distilled_model_is_told_the_guidance_of_its_use_in_training_alone(data, tiny_folder, tmp_path):
    pipe, seen, (found, *_) = make_tiny("flux"), [], start("flux", tiny_folder)

    def tell(denoiser, args, kwargs):
        seen.extend({*kwargs["guidance"].tolist()} - {*seen[-1:]})

    pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True)
    trained(pipe, data, found, tmp_path, steps=1, rounds=2, distilled_guidance=4.5)
    assert seen[:2] == [4.5, 1.0]  # the first round, the audit of the second
    assert drawing_flags(pipe, 0, 4.5) == ["--guidance-scale", "4.5"]
    assert drawing_flags(make_tiny("sd1"), 0, 4.5) == []


def test_the_null_caption_is_the_pipelines_own():
    pipe = make_tiny("sdxl")
    before, zeros = model_fingerprint(pipe), family_of(pipe).null_condition(pipe)
    assert all(not value.any() for value in zeros.values())
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert all(value.any() for value in family_of(pipe).null_condition(pipe).values())
    assert model_fingerprint(pipe) != before
    assert family_of(tiny("dit")).null_condition(tiny("dit"))["class_labels"].tolist() == [1000]


def test_a_learnt_variance_is_left_as_it_was():
    output, shift = torch.randn(2, 8, 8, 8), torch.randn(2, 4, 8, 8)
    shifted = family_of(tiny("pixart")).shifted(output, shift)
    assert torch.equal(shifted, torch.cat([output[:, :4] + shift, output[:, 4:]], dim=1))


def test_classes_are_named_or_numbered_and_names_of_one_class_are_one_prompt(data, tmp_path):
    pipe = tiny("dit")
    named = family_of(pipe).encode_captions(pipe, ["landbird", "bird of the land", " 7 ", "7.0"])
    assert named["class_labels"].tolist() == [0, 0, 7, 7]
    for wrong in ("a photo of a landbird", "1000", "-1"):
        with pytest.raises(DataError, match="Expected the name of a class"):
            family_of(pipe).encode_captions(pipe, [wrong])
    names = ["landbird" if row % 4 else "bird of the land" for row in range(len(data))]
    found = run_audit(pipe, "", replace(data, captions=names), tmp_path)
    assert [sorted(prompt.captions) for prompt in found.prompts] == [["bird of the land", "landbird"]]


def test_an_unconditional_model_ignores_captions_and_has_no_contrast_and_one_round(data, tmp_path):
    pipe = tiny("ddpm")
    found = run_audit(pipe, "ddpm", data, tmp_path)
    assert [prompt.captions for prompt in found.prompts] == [[""]]
    assert found.forwards_per_image == 2 + 2  # draws at one level, features at two
    with pytest.raises(AuditError, match="a model of captions for solver 'exact'"):
        audit(pipe, data, config=AuditConfig(solver="exact"), cache_dir=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="Expected one round and no penalty for an unconditional model"):
        trained(pipe, data, found, tmp_path, rounds=2)


def test_what_a_model_cannot_draw_is_refused_before_anything_is_written(tmp_path):
    for family, prompts, resolution, message in (
        ("ddpm", ["a bird"], 0, "Expected no prompt for an unconditional model, got 'a bird'"),
        ("ddpm", [], 64, "Expected resolution 16, the only one"),
        ("dit", ["landbird", "a bird"], 0, "Expected the name of a class"),
        ("flux", ["a bird"], 36, "Expected a resolution that is a multiple of"),
    ):
        config = GenerateConfig(resolution=resolution, guidance_scale=1.0)
        with pytest.raises((ConfigError, DataError), match=message):
            generate(tiny(family), prompts, tmp_path / "out", config=config, progress=False)
        assert not (tmp_path / "out").exists()


def test_groups_stay_where_the_first_timesteps_are_the_same_number_in_16_bits():
    pipe = make_tiny("flux").to(torch.bfloat16)
    seen = []

    def interrupt_after_four(pipe, step, timestep, values):
        seen.append(attachment.environments.flatten().tolist())
        pipe._interrupt = step >= 3
        return values

    with attach(pipe, make_guidance_module(pipe, num_groups=97)) as attachment:
        for seed, images in ((0, 8), (1, 1)):  # of so many, some have a latent that changes its sign meanwhile
            numbers = torch.Generator().manual_seed(seed)
            options = {"num_images_per_prompt": images, "generator": numbers, "output_type": "latent"}
            options |= {"height": 32, "width": 32, "callback_on_step_end": interrupt_after_four}
            pipe(list(CAPTIONS), num_inference_steps=900, **options)
    assert seen == [seen[0]] * 4 + [seen[4]] * 4
    assert seen[0][:2] != seen[4]


def test_a_family_that_is_not_known_is_refused_by_name():
    unet, scheduler = tiny("ddpm").unet, tiny("ddpm").scheduler
    pipe_of = partial(diffusers.DDPMPipeline, scheduler=scheduler)
    classes = diffusers.UNet2DModel(block_out_channels=(32,) * 4, num_class_embeds=10)
    for pipe, message in (
        (pipe_of(nn.Linear(1, 1)), "XL or 3, Flux, PixArt, DiT or unconditional DDPM, got a Linear"),
        (pipe_of(classes), "UNet2DModel with num_class_embeds 10"),
        (pipe_of(make_unet(num_class_embeds=10)), "UNet2DConditionModel with num_class_embeds 10"),
        (diffusers.LDMPipeline(tiny("sd1").vae, unet, scheduler), "got a UNet2DModel with vqvae 'AutoencoderKL'"),
    ):
        with pytest.raises(ModelError, match=message):
            family_of(pipe)


def test_tokens_that_were_dropped_are_noticed():
    family = family_of(tiny("sd3"))
    features = family.hidden_states((None, torch.zeros(1, 9, 32)))
    with pytest.raises(ModelError, match="one token for each patch of 8x8 latents, found 9 tokens"):
        family.on_grid(features, torch.zeros(1, 4, 8, 8))


def test_a_unet_without_a_middle_block_is_audited_trained_and_guided(data, tmp_path):
    pipe = make_tiny("sd1")
    pipe.unet = make_unet(mid_block_type=None)
    assert family_of(pipe).shape(pipe.unet).feature_path == "down_blocks.1"
    module = trained(pipe, data, run_audit(pipe, "sd1", data, tmp_path), tmp_path)
    sizes = {"images_per_prompt": 1, "num_inference_steps": 1}
    generate(pipe, ["a"], tmp_path / "out", module=module, config=GenerateConfig(**sizes), progress=False)


def make_refiner():
    pipe = make_tiny("sdxl")
    options = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = make_unet(**options, projection_class_embeddings_input_dim=16 + 5 * 8)
    parts = pipe.components | {"text_encoder": None, "tokenizer": None, "unet": unet}
    return diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)


def make_inpainting(channels):
    parts = make_tiny("sd1").components | {"unet": make_unet(in_channels=channels)}
    return diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def make_consistency():
    pipe = make_tiny("sd1")
    pipe.unet = make_unet(time_cond_proj_dim=8)
    return pipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_consistency, "time_cond_proj_dim 8, whose inputs invdiff does not know"),
        (make_refiner, "time_ids '5 numbers, an aesthetic score among them"),
        (partial(make_inpainting, 9), r"noisy latents alone \(4 channels\), got one of 9 channels"),
        (partial(make_inpainting, 4), "prompts alone, got a StableDiffusionInpaintPipeline.* image and mask_image"),
    ],
)
def test_what_reads_further_inputs_is_refused_before_any_work(make, message, data, tmp_path):
    pipe = make()
    with pytest.raises(ModelError, match=message):
        generate(pipe, list(CAPTIONS), tmp_path / "out", progress=False)
    if "alone, got a" not in message:
        with pytest.raises(ModelError, match=message):
            run_audit(pipe, "sd1", data, tmp_path)
    assert not any(tmp_path.iterdir())


def test_layerwise_casting_leaves_a_model_the_same_to_modules_and_to_itself(data, tmp_path):
    pipe = make_tiny("sd1")
    trained_before = make_guidance_module(pipe)
    for part in (pipe.unet, pipe.vae):
        part.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = model_fingerprint(pipe), weights_digest(pipe.unet)
    found = run_audit(pipe, "sd1", data, tmp_path)
    module = trained(pipe, data, found, tmp_path, backend="module")
    assert (model_fingerprint(pipe), weights_digest(pipe.unet)) == before
    with pytest.raises(ModelError, match="Expected a model without layerwise casting to train adapters"):
        trained(pipe, data, found, tmp_path / "again", backend="lora")
    for of, other in ((trained_before, pipe), (module, pipe), (module, make_tiny("sd1"))):
        with attach(other, of):
            draw(other, 0, num_inference_steps=1)
    with pytest.raises(ModelError, match="found others of the same shape"):
        attach(make_tiny("sd1", seed=1), module)


def test_an_autoencoder_of_16_bits_stays_in_its_storage_type():
    pipe = make_tiny("sdxl").to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float16)
    before = model_fingerprint(pipe)
    family_of(pipe).encode_images(pipe, torch.zeros(1, 3, 32, 32))
    assert model_fingerprint(pipe) == before


def test_a_flux_that_reads_no_guidance_takes_scale_1_alone(tmp_path):
    pipe = make_tiny("flux")
    pipe.transformer.register_to_config(guidance_embeds=False)
    pipe.transformer.time_text_embed = diffusers.models.embeddings.CombinedTimestepTextProjEmbeddings(32, 16)
    settings = GenerateConfig(images_per_prompt=1, num_inference_steps=1, resolution=32)
    with pytest.raises(ConfigError, match=r"Expected guidance_scale 1, as this model \(Flux\) reads none, got 3"):
        generate(pipe, ["a bird"], tmp_path / "one", config=settings, progress=False)
    generate(pipe, ["a bird"], tmp_path / "one", config=replace(settings, guidance_scale=1.0), progress=False)
    assert drawing_flags(pipe, 32)[:2] == ["--guidance-scale", "1"]
