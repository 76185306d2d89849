from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from invdiff.errors import ModelError
from invdiff.models.load import default_device, denoiser_of, load_pipeline, public_name


def test_loads_a_folder_quiet_and_without_a_safety_checker(tiny_pipe_dir: Path) -> None:
    pipe = load_pipeline(tiny_pipe_dir, device="cpu", dtype=torch.bfloat16)
    assert pipe.safety_checker is None
    assert pipe._progress_bar_config["disable"] is True
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_weights_are_float32_on_the_default_device_unless_asked_otherwise(tiny_pipe_dir: Path) -> None:
    pipe = load_pipeline(str(tiny_pipe_dir))
    assert pipe.text_encoder.dtype == torch.float32
    assert pipe.device.type == default_device().type


def test_a_folder_without_model_index_is_refused(tiny_pipe_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"found no model_index\.json there"):
        load_pipeline(tiny_pipe_dir / "unet")


def test_a_single_file_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="from_single_file"):
        load_pipeline(tmp_path / "model.safetensors")


def test_an_unreachable_name_is_refused() -> None:
    with pytest.raises(ModelError, match="an existing folder or a reachable hub model at nobody/nothing"):
        load_pipeline("nobody/nothing")


@pytest.mark.parametrize("name", ["./absent", "~/absent-model", "/absent/model", "out/absent/model", "absent/"])
def test_a_path_to_nothing_is_refused_without_asking_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", lambda source: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=f"folder at {name}, found nothing there"):
        load_pipeline(name)


def test_a_pipeline_with_missing_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0", '
        '"unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    with pytest.raises(ModelError, match="Expected a whole diffusers pipeline"):
        load_pipeline(tmp_path)


def test_the_denoiser_is_the_unet_or_the_transformer() -> None:
    net = torch.nn.Identity()
    assert denoiser_of(SimpleNamespace(unet=net)) is net
    assert denoiser_of(SimpleNamespace(unet=None, transformer=net)) is net
    with pytest.raises(ModelError, match="got a SimpleNamespace with neither"):
        denoiser_of(SimpleNamespace())


def test_of_a_local_folder_only_its_last_name_is_public(tiny_pipe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert public_name("org/model") == "org/model"
    assert public_name("/home/somebody/secret/model") == "model"
    monkeypatch.chdir(tiny_pipe_dir.parent.parent)
    relative = f"{tiny_pipe_dir.parent.name}/{tiny_pipe_dir.name}"
    assert public_name(relative) == tiny_pipe_dir.name
    pipe = load_pipeline(relative)
    monkeypatch.chdir("/")  # where the relative name could pass for one of the hub
    assert public_name(pipe.name_or_path) == tiny_pipe_dir.name
