import json
import os
import shutil

import pytest
import torch

from invdiff.errors import ModelError
from invdiff.files import weights_digest
from invdiff.models.load import default_device, load_pipeline, loading, public_name


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


def test_what_is_no_pipeline_is_refused(tiny_pipe_dir, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for source, message in (
        (tiny_pipe_dir / "unet", r"found no model_index\.json there"),
        (tmp_path / "model.safetensors", "Expected a whole diffusers pipeline"),
        ("nobody/nothing", "Expected a diffusers pipeline at nobody/nothing.* spelling, and unset HF_HUB_OFFLINE"),
    ):
        with pytest.raises(ModelError, match=message):
            load_pipeline(source)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match="spelling, and the network"), loading("a model", "nobody/nothing"):
        raise OSError("not found")


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
