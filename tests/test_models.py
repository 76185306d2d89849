"""Models as people have them: folders, a single file, LoRAs; what is damaged in them; from loading to attaching."""

import json
import os
import shutil

import accelerate
import pytest
import torch
from diffusers.models import embeddings
from safetensors.torch import load_file, save_file

from conftest import make_guidance_lora, make_guidance_module, make_tiny_pipeline
from invdiff import Audit, AuditConfig, GenerateConfig, GuidanceModule, TrainConfig, attach, audit, generate, train
from invdiff.data.encode import model_fingerprint
from invdiff.errors import AuditError, ModelError
from invdiff.evaluation.annotators.load import load_annotator
from invdiff.files import weights_digest
from invdiff.models.frozen import FrozenDenoiser, denoiser_fingerprint
from invdiff.models.load import default_device, load_pipeline, loading, public_name
from test_cli import next_command, succeed
from tiny import make_tiny, save_lora, save_single_file

AUDIT = AuditConfig(solver="exact", min_images=4, caption_threshold=0.0)
TRAIN = TrainConfig(backend="module", steps=2, batch_size=4, preserve=0, mixed_precision="no")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of random weights for the tiny pipeline's denoiser and text encoder."""
    targets = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj"]}
    return save_lora(make_tiny_pipeline(), tmp_path_factory.mktemp("lora"), **targets)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return save_single_file(make_tiny_pipeline(), tmp_path_factory.mktemp("single") / "my-model.safetensors")


def test_a_single_file_is_the_model_itself(tiny_pipe, tiny_pipe_dir, single):
    loaded = load_pipeline(single, config=tiny_pipe_dir)
    assert denoiser_fingerprint(loaded) == denoiser_fingerprint(tiny_pipe)
    assert model_fingerprint(loaded) == model_fingerprint(tiny_pipe)


def test_what_is_no_whole_model_is_refused(tiny_pipe_dir, single, lora, tmp_path, monkeypatch):
    pickled, empty = tmp_path / "model.ckpt", tmp_path / "model.safetensors"
    for path in (pickled, empty):
        path.write_bytes(b"")
    unet = tiny_pipe_dir / "unet" / "diffusion_pytorch_model.safetensors"
    for source, options, message in (
        (single, {}, "settings and tokenizer for .* at stable-diffusion-v1-5/.*--model-config"),
        (lora, {}, "found a LoRA. Give its model and --lora"),
        (unet, {"config": tiny_pipe_dir}, "Weights for this component appear to be missing"),
        (pickled, {}, "can run code"),
        (empty, {}, "Expected a whole diffusers pipeline"),
        (tiny_pipe_dir / "unet", {}, r"found no model_index\.json there"),
        ("absent.safetensors", {}, "found nothing there"),
        (tiny_pipe_dir, {"config": tiny_pipe_dir}, "leave it out"),
        ("nobody/nothing", {}, "a diffusers pipeline at nobody/nothing.* spelling, and unset HF_HUB_OFFLINE"),
    ):
        with pytest.raises(ModelError, match=message):
            load_pipeline(source, **options)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match="spelling, and the network"), loading("a model", "nobody/nothing"):
        raise OSError("not found")


def test_loras_are_fused_by_their_weights_and_leave_nothing_beside_them(tiny_pipe, tiny_pipe_dir, lora):
    given = load_file(lora)
    pipe = load_pipeline(tiny_pipe_dir, loras=[f"{lora}:0.5", str(lora.parent)])
    for part, layer in (("unet", LAYER), ("text_encoder", "encoder.layers.0.self_attn.q_proj")):
        before, after = (getattr(each, part).get_submodule(layer).weight for each in (tiny_pipe, pipe))
        up, down = (given[f"{part}.{layer}.lora_{side}.weight"] for side in "BA")
        assert torch.allclose(after - before, 1.5 * up @ down, atol=1e-5)
        assert set(getattr(pipe, part).state_dict()) == set(getattr(tiny_pipe, part).state_dict())


def changed(lora, path, change):
    save_file(dict(filter(None, (change(name, value) for name, value in load_file(lora).items()))), path)
    return path


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("sd1", "{lora}:strong", "one with its weight such as .*style.safetensors:0.8"),
        ("sd1", "{lora}:nan", "one with its weight"),
        ("sd1", "absent.safetensors", "found nothing there"),
        ("sd1", "nobody/nothing", "a LoRA for a StableDiffusionPipeline at nobody/nothing"),
        ("sd1", "{folder}/layers.safetensors", "only 32 of its 40 matrices have a place"),
        ("sd1", "{folder}/shapes.safetensors", "Error.* for UNet2DConditionModel: size mismatch for .* of this kind"),
        ("sdxl", "{lora}", "a LoRA for a StableDiffusionXLPipeline .*of this kind"),
        ("flux", "{lora}", "only 8 of its 40 matrices have a place"),
        ("pixart", "{lora}", "a LoRA for a PixArtSigmaPipeline .*no attribute"),
    ],
)
def test_a_lora_that_does_not_fit_is_one_clear_error(family, name, message, lora, tmp_path, capfd):
    changed(lora, tmp_path / "layers.safetensors", lambda key, of: (key.replace("attn2.to_q", "attn2.to_z"), of))
    changed(lora, tmp_path / "shapes.safetensors", lambda key, of: (key, of.repeat(1, 2)))
    make_tiny(family).save_pretrained(tmp_path / "model")
    capfd.readouterr()
    with pytest.raises(ModelError, match=message) as raised:
        load_pipeline(tmp_path / "model", loras=[name.format(lora=lora, folder=tmp_path)])
    assert "\n" not in str(raised.value)
    assert "size mismatch" not in capfd.readouterr().err


def test_from_a_single_file_with_a_lora_to_a_module_that_needs_it(single, lora, tiny_pipe_dir, data, tmp_path):
    pipe = load_pipeline(single, config=tiny_pipe_dir, loras=[f"{lora}:0.8"])
    found = audit(pipe, data, config=AUDIT, cache_dir=tmp_path / "cache", progress=False)
    found.save(tmp_path / "audit")
    found = Audit.load(tmp_path / "audit")
    assert found.settings["loras"].keys() == {"style.safetensors:0.8"}
    load_annotator(str(tmp_path / "audit"), model=str(tiny_pipe_dir), loras=[f"{lora}:0.8"])
    with pytest.raises(ModelError, match="Expected the model that was audited"):
        load_annotator(str(tmp_path / "audit"), model=str(tiny_pipe_dir))
    train(pipe, data, found, tmp_path / "module", config=TRAIN, cache_dir=tmp_path / "cache", progress=False)
    module = GuidanceModule.from_pretrained(tmp_path / "module")
    attach(load_pipeline(tiny_pipe_dir, loras=[f"{lora}:0.8"]), module).detach()
    card = (tmp_path / "module" / "README.md").read_text()
    assert 'load_pipeline("path/to/the/base/model", loras=["style.safetensors:0.8"])' in card
    assert "| LoRAs fused into it | style.safetensors&#58;0.8 |" in card
    for loras, what in (((), "found none"), ([f"{lora}:0.81"], "found style.safetensors:0.81")):
        other = load_pipeline(tiny_pipe_dir, loras=loras)
        with pytest.raises(ModelError, match=rf"LoRAs: expected style.safetensors:0.8, {what}"):
            attach(other, module)
        attach(other, module, strict=False).detach()
        with pytest.raises(AuditError, match=r"with LoRA style.safetensors:0.8"):
            train(other, data, found, tmp_path / "other", config=TRAIN, cache_dir=tmp_path / "cache", progress=False)


def test_a_lora_of_the_text_encoder_alone_counts_too(lora, tiny_pipe_dir, data, tmp_path):
    alone = changed(lora, tmp_path / "words.safetensors", lambda key, of: key.startswith("text") and (key, of))
    with_it, without = load_pipeline(tiny_pipe_dir, loras=[str(alone)]), load_pipeline(tiny_pipe_dir)
    assert denoiser_fingerprint(with_it) == denoiser_fingerprint(without)
    with pytest.raises(ModelError, match=r"LoRAs: expected words.safetensors, found none"):
        attach(without, GuidanceModule.for_pipeline(with_it))
    twice = load_pipeline(tiny_pipe_dir, loras=[str(alone)] * 2)
    with pytest.raises(ModelError, match=r"LoRAs: expected words.safetensors, words.safetensors, found words"):
        attach(with_it, GuidanceModule.for_pipeline(twice))
    found = audit(with_it, data, config=AUDIT, cache_dir=tmp_path / "cache", progress=False)
    with pytest.raises(AuditError, match=r"the LoRAs that were audited, .*words.safetensors.*, got none"):
        train(without, data, found, tmp_path / "module", cache_dir=tmp_path / "cache", progress=False)


def test_audits_want_a_lora_fused_and_drawing_does_not_mind(tiny_pipe, lora, data, tmp_path):
    tiny_pipe.load_lora_weights(lora)
    with pytest.raises(ModelError, match=r"Expected LoRAs to be fused .* pipe.fuse_lora\(\)"):
        audit(tiny_pipe, data, config=AUDIT, cache_dir=tmp_path / "cache", progress=False)
    one = GenerateConfig(images_per_prompt=1, num_inference_steps=1)
    generate(tiny_pipe, ["a photo"], tmp_path / "images", config=one, progress=False)
    tiny_pipe.disable_lora()
    audit(tiny_pipe, data, config=AUDIT, cache_dir=tmp_path / "cache", progress=False)
    tiny_pipe.enable_lora()
    tiny_pipe.fuse_lora()
    tiny_pipe.unload_lora_weights()
    audit(tiny_pipe, data, config=AUDIT, cache_dir=tmp_path / "cache", progress=False)


def test_commands_name_lora_and_type_in_the_next(single, lora, tiny_pipe_dir, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("INVDIFF_CACHE", str(tmp_path / "cache"))
    given = ["--dtype", "bf16", "--lora", f"{lora}:0.8", "--model-config", str(tiny_pipe_dir)]
    loose = tmp_path / "loose.json"
    loose.write_text('{"solver": "exact", "min_images": 4, "caption_threshold": 0.0}')
    words = ("audit", single, tiny_folder, "--output", tmp_path / "audit", "--config", loose, *given)
    for more in ((), ("--steps", 2, "--batch-size", 4, "--preserve", 0)):
        words = next_command(succeed(*words, *more, "--quiet"))[1:]
        assert words[-len(given) :] == given
    assert words[0] == "generate"
    assert Audit.load(tmp_path / "audit").settings["dtype"] == "bf16"


def test_a_single_file_says_itself_that_it_predicts_v(tiny_pipe_dir, tmp_path, monkeypatch):
    path = save_single_file(make_tiny("sd2-v"), tmp_path / "model.safetensors")
    save_file(load_file(path) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    settings = {"pretrained_model_name_or_path": str(tiny_pipe_dir)}
    monkeypatch.setattr("invdiff.models.load.fetch_diffusers_config", lambda weights: settings)  # the hub's
    scheduler = load_pipeline(path).scheduler.config
    assert (scheduler.prediction_type, scheduler.rescale_betas_zero_snr) == ("v_prediction", True)


def test_a_model_with_an_ip_adapter_is_guided_but_not_audited_or_drawn_from(tiny_pipe, tmp_path):
    guidance = [make_guidance_module(tiny_pipe), make_guidance_lora(tiny_pipe)]
    sizes = {"embed_dims": 16, "output_dims": 16, "hidden_dims": 16, "depth": 1, "dim_head": 8, "heads": 2}
    plus = embeddings.IPAdapterPlusImageProjection(**sizes, num_queries=4)
    tiny_pipe.unet.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection([plus])
    tiny_pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    for each in guidance:
        attach(tiny_pipe, each).detach()
    with pytest.raises(ModelError, match=r"unload_ip_adapter\(\) first"):
        generate(tiny_pipe, ["a bird"], tmp_path, progress=False)


def test_weights_that_sequential_offload_keeps_elsewhere_are_compared(tiny_pipe):
    module, digest = make_guidance_module(tiny_pipe), weights_digest(tiny_pipe.unet)
    other = make_tiny_pipeline(seed=1)
    for pipe in (tiny_pipe, other):
        accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    attach(tiny_pipe, module).detach()
    assert weights_digest(tiny_pipe.unet) == digest != weights_digest(other.unet)
    with pytest.raises(ModelError, match="trained for another model"):
        attach(other, module)


def test_texts_that_the_model_does_not_read_to_their_end_are_named(tiny_pipe, tmp_path, capsys):
    settings = GenerateConfig(images_per_prompt=1, num_inference_steps=1)
    generate(tiny_pipe, ["a bird", "a bird " * 40], tmp_path, config=settings, progress=False)
    told = " ".join(capsys.readouterr().err.split())
    assert f"1 of 2 texts are longer than the {tiny_pipe.tokenizer.model_max_length} tokens" in told


def test_adapters_are_not_trained_under_gradient_checkpointing(tiny_pipe):
    tiny_pipe.unet.enable_gradient_checkpointing()
    with FrozenDenoiser(tiny_pipe) as frozen, pytest.raises(ModelError, match=r"disable_gradient_checkpointing\(\)"):
        make_guidance_lora(tiny_pipe).guided(frozen, None, None)


def test_a_folder_is_loaded_quiet_in_the_type_asked_for(tiny_pipe_dir):
    pipe = load_pipeline(tiny_pipe_dir, device="cpu", dtype=torch.bfloat16)
    assert pipe._progress_bar_config["disable"] is True
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    pipe = load_pipeline(str(tiny_pipe_dir))
    assert pipe.text_encoder.dtype == torch.float32
    assert pipe.device.type == default_device().type


def test_a_safety_checker_that_the_folder_names_is_left_out(tiny_pipe_dir, tmp_path):
    index = json.loads((tiny_pipe_dir / "model_index.json").read_text())
    shutil.copytree(tiny_pipe_dir, tmp_path / "model")
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # whose weights are not there
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(tmp_path / "model").safety_checker is None


@pytest.mark.parametrize("name", ["./absent", "~/absent-model", "/absent/model", "out/absent/model", "absent/"])
def test_a_path_to_nothing_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", lambda source: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=f"folder at {name}, found nothing there"):
        load_pipeline(name)


def test_of_a_local_folder_only_its_last_name_is_public(tiny_pipe_dir, monkeypatch):
    assert public_name("org/model") == "org/model"
    assert public_name("/home/somebody/secret/model") == "model"
    monkeypatch.chdir(tiny_pipe_dir.parent.parent)
    relative = f"{tiny_pipe_dir.parent.name}/{tiny_pipe_dir.name}"
    assert public_name(relative) == tiny_pipe_dir.name
    pipe = load_pipeline(relative)
    monkeypatch.chdir("/")  # where the relative name could pass for one of the hub
    assert public_name(pipe.name_or_path) == tiny_pipe_dir.name


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 492265168\n"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_a_weight(path):
    """Flip one bit of a name in the header, which stays whole."""
    data = bytearray(path.read_bytes())
    data[data.index(b'weight":')] ^= 1
    path.write_bytes(data)


def need_torchsde(folder):
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverSDEScheduler"])
    edit(folder / "scheduler/scheduler_config.json", _class_name="DPMSolverSDEScheduler")


QUANTISED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
WEIGHTS = ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((lambda folder, f=f: (folder / f).write_bytes(POINTER), f"{f} is a pointer of Git LFS") for f in WEIGHTS),
        *((lambda folder, f=f: os.truncate(folder / f, 3000), f"{f} is damaged or cut short") for f in WEIGHTS),
        *((lambda folder, f=f: os.truncate(folder / f, 0), f"{f} is damaged .*empty") for f in WEIGHTS),
        *((lambda folder, f=f: rename_a_weight(folder / f), "Expected all weights of .*none of") for f in WEIGHTS),
        (lambda folder: os.truncate(folder / "tokenizer/tokenizer.json", 99), "tokenizer.json is damaged or cut"),
        (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), "a tokenizer .* knows no word"),
        (lambda folder: os.truncate(folder / "unet/config.json", 9), "unet/config.json is damaged or cut short"),
        (lambda folder: edit(folder / "model_index.json", _class_name="NewPipeline"), "NewPipeline. Upgrade"),
        (need_torchsde, "requires the torchsde library .*Install"),
        (lambda folder: edit(folder / "unet/config.json", **QUANTISED), "bitsandbytes. Install that package"),
    ],
)
def test_one_line_says_which_file_or_package_is_missing_or_damaged(tiny_pipe_dir, tmp_path, damage, message):
    folder = shutil.copytree(tiny_pipe_dir, tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_pipeline(folder)
    assert "network" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder"), ("unet",)])
def test_a_folder_of_a_variant_alone_loads(tiny_pipe_dir, tmp_path, parts):
    folder = shutil.copytree(tiny_pipe_dir, tmp_path / "model")
    for part in parts:
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    plain, pipe = load_pipeline(tiny_pipe_dir, device="cpu"), load_pipeline(folder, device="cpu")
    assert weights_digest(pipe.unet) == weights_digest(plain.unet)
    assert weights_digest(pipe.text_encoder) == weights_digest(plain.text_encoder)
