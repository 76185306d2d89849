import pytest
import torch

from invdiff.errors import ModelError
from invdiff.models.load import default_device, load_pipeline, public_name


def test_a_folder_is_loaded_quiet_without_a_safety_checker_in_the_type_asked_for(tiny_pipe_dir):
    pipe = load_pipeline(tiny_pipe_dir, device="cpu", dtype=torch.bfloat16)
    assert pipe.safety_checker is None
    assert pipe._progress_bar_config["disable"] is True
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    pipe = load_pipeline(str(tiny_pipe_dir))
    assert pipe.text_encoder.dtype == torch.float32
    assert pipe.device.type == default_device().type


def test_what_is_no_pipeline_is_refused(tiny_pipe_dir, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0", '
        '"unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    for source, message in (
        (tiny_pipe_dir / "unet", r"found no model_index\.json there"),
        (tmp_path / "model.safetensors", "from_single_file"),  # the way to convert it
        (tmp_path, "Expected a whole diffusers pipeline"),  # weights are missing
        ("nobody/nothing", "an existing folder or a reachable hub model at nobody/nothing"),
    ):
        with pytest.raises(ModelError, match=message):
            load_pipeline(source)


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
