import errno
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from conftest import CAPTIONS, contents, write_tiny_folder
from invdiff.data import encode as encode_module
from invdiff.data.captioned import load_captioned_images
from invdiff.data.encode import ShardedTensor, as_encoded, model_fingerprint, pixel_values
from invdiff.errors import ConfigError, DataError, ModelError
from invdiff.models.load import denoiser_of
from tiny import make_tiny


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(encode_module, "SHARD_SIZE", 5)


def run(pipe, data, cache, **options):
    return as_encoded(pipe, data, cache, batch_size=2, progress=False, **options)


def with_broken(tmp_path, *broken, num_images=12, **options):
    folder = write_tiny_folder(tmp_path / "images", num_images)
    for row in broken:
        (folder / f"{row:02d}.png").write_bytes(b"")
    return load_captioned_images(folder, **options)


def test_latents_are_the_scaled_mode_of_each_image_and_other_data_and_models_do_not_meet(tiny_pipe, data, tmp_path):
    encoded = run(tiny_pipe, data, tmp_path)
    assert (len(encoded), encoded.latents.shape) == (12, (12, 4, 8, 8))
    with torch.no_grad():
        mode = tiny_pipe.vae.encode(pixel_values(data.image(7), 32)[None]).latent_dist.mode()
    torch.testing.assert_close(encoded.latents[[7]], mode * tiny_pipe.vae.config.scaling_factor)
    torch.testing.assert_close(run(tiny_pipe, data.select([3, 4]), tmp_path).latents[:], encoded.latents[[3, 4]])
    tiny_pipe.vae.register_to_config(shift_factor=0.5, scaling_factor=2.0)
    torch.testing.assert_close(run(tiny_pipe, data, tmp_path).latents[[7]], (mode - 0.5) * 2.0)
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 4.0, 0.5])  # as decoding undoes them
    tiny_pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    expected = (mode - mean.view(-1, 1, 1)) / std.view(-1, 1, 1) * 2.0
    torch.testing.assert_close(run(tiny_pipe, data, tmp_path).latents[[7]], expected)


def test_each_caption_is_encoded_once_in_order_and_the_empty_one_beside(tiny_pipe, tmp_path):
    folder = write_tiny_folder(tmp_path / "images")
    captions = [f"a photo of bird {row % 11}" for row in range(12)]  # more than two files of the cache
    rows = "".join(f"{row:02d}.png,{caption}\n" for row, caption in enumerate(captions))
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    encoded = run(tiny_pipe, load_captioned_images(folder), tmp_path / "cache")
    assert (encoded.captions, encoded.caption_ids.tolist()) == (captions[:11], [*range(11), 0])
    prompts = tiny_pipe.encode_prompt([*encoded.captions, ""], "cpu", 1, False)[0].detach()
    torch.testing.assert_close(encoded.conditions["prompt_embeds"], prompts)
    assert torch.equal(encoded.condition(torch.tensor([encoded.null_id]))["prompt_embeds"][0], prompts[11])


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (20, 20)])
def test_the_shortest_side_is_resized_and_the_centre_cut(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    half = image.resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS)
    left, top = (half.width - 10) // 2, (half.height - 10) // 2
    expected = np.asarray(half.crop((left, top, left + 10, top + 10)), dtype=np.float32) / 127.5 - 1
    torch.testing.assert_close(pixel_values(image, 10), torch.from_numpy(expected).permute(2, 0, 1))


def test_a_half_precision_autoencoder_gives_float32_latents(tiny_pipe, data, tmp_path):
    full = run(tiny_pipe, data, tmp_path)
    half = run(tiny_pipe.to(torch.bfloat16), data, tmp_path)
    assert full.latents[[0]].dtype == half.latents[[0]].dtype == torch.float32
    assert half.conditions["prompt_embeds"].dtype == torch.bfloat16
    torch.testing.assert_close(half.latents[:], full.latents[:], atol=0.02, rtol=0.05)


def test_resolution_is_the_models_own_or_the_one_given(tiny_pipe, data, tmp_path):
    assert run(tiny_pipe, data, tmp_path, resolution=16).latents.shape == (12, 4, 4, 4)
    for wrong in (30, 2, -4):
        with pytest.raises(ConfigError, match=f"multiple of 4, got {wrong}"):
            run(tiny_pipe, data, tmp_path, resolution=wrong)
    with pytest.raises(ModelError, match="got a object"):
        run(object(), data, tmp_path)


@pytest.mark.parametrize("num_written", [0, 2, 3])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tiny_pipe, tmp_path, monkeypatch, kill, num_written):
    data, killed = with_broken(tmp_path, 6, max_unreadable=0.5), tmp_path / "killed"
    whole = run(tiny_pipe, data, tmp_path / "whole")
    kill(encode_module, "write_tensors", num_written + 1, run, tiny_pipe, data, killed)
    finished = {path: path.stat().st_mtime_ns for path in killed.rglob("*.safetensors")}
    assert len(finished) == num_written
    run(tiny_pipe, data, killed)
    assert contents(killed) == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished

    monkeypatch.setattr(encode_module, "write_tensors", lambda *_, **__: pytest.fail("wrote again"))
    again = run(tiny_pipe, data, killed)
    assert torch.equal(again.latents[:], whole.latents[:])
    assert torch.equal(again.conditions["prompt_embeds"], whole.conditions["prompt_embeds"])


def test_a_full_disk_keeps_the_finished_shards(tiny_pipe, data, tmp_path, monkeypatch):
    save, saved = safetensors.torch.save_file, []

    def save_file(tensors, path, metadata):
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata=metadata)
        saved.append(path)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(DataError, match=r"latents-00002.*No space left on device.*finished work is kept"):
        run(tiny_pipe, data, tmp_path)
    kept = sorted(tmp_path.rglob("*.safetensors"))
    assert [path.name for path in kept] == ["latents-00000.safetensors", "latents-00001.safetensors"]
    kept[1].write_bytes(b"x" * 100)  # damaged
    with pytest.raises(DataError, match=r"latents-00001\.safetensors, found something else"):
        run(tiny_pipe, data, tmp_path)


def test_images_that_were_in_no_known_format_are_tried_again(tiny_pipe, tmp_path, monkeypatch):
    data = with_broken(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "ID", [])
        with pytest.raises(DataError, match="not an image in a known format"):
            run(tiny_pipe, data, tmp_path / "cache")
    assert len(run(tiny_pipe, data, tmp_path / "cache")) == len(data)


def test_unreadable_images_are_skipped_and_listed(tiny_pipe, tmp_path):
    data = with_broken(tmp_path, 0, 1, 2, 3, 4, 6, max_unreadable=0.5)  # the first five are a whole shard
    encoded = run(tiny_pipe, data, tmp_path / "cache")
    rows = [5, 7, 8, 9, 10, 11]
    assert encoded.source_index.tolist() == rows
    assert encoded.names == [f"{row:02d}.png" for row in rows]
    assert [encoded.captions[i] for i in encoded.caption_ids] == [data.captions[row] for row in rows]
    assert encoded.unreadable == dict.fromkeys([f"{row:02d}.png" for row in (0, 1, 2, 3, 4, 6)], "the file is empty")
    renamed = replace(data, names=[f"{name} copy" for name in data.names])
    expected = {f"{name} copy": reason for name, reason in encoded.unreadable.items()}
    assert run(tiny_pipe, renamed, tmp_path / "cache").unreadable == expected
    torch.testing.assert_close(encoded.latents[:], run(tiny_pipe, data.select(rows), tmp_path / "good").latents[:])


def test_models_that_encode_differently_have_different_fingerprints(tiny_pipe, tiny_pipe_dir, tmp_path):
    first = model_fingerprint(tiny_pipe)
    shutil.copytree(tiny_pipe_dir, tmp_path / "copy")
    copy = StableDiffusionPipeline.from_pretrained(tmp_path / "copy")
    assert model_fingerprint(copy) == first
    with torch.no_grad():
        next(copy.unet.parameters()).add_(1)
    assert model_fingerprint(copy) == first
    seen = {first}
    for parameter in (next(copy.text_encoder.parameters()), next(copy.vae.parameters())):
        with torch.no_grad():
            parameter.flatten()[-1] += 0.25
        seen.add(model_fingerprint(copy))
    copy.vae.register_to_config(scaling_factor=0.5)
    seen.add(model_fingerprint(copy))
    copy.tokenizer.add_tokens(["newword"])
    seen.add(model_fingerprint(copy))
    assert len(seen) == 5
    for family, setting in (("ddpm", "out_channels"), ("dit", "num_embeds_ada_norm")):
        pipe = make_tiny(family)
        before = model_fingerprint(pipe)
        denoiser_of(pipe).register_to_config(**{setting: 1})
        assert model_fingerprint(pipe) != before
    copy.vae.to("meta")  # as sequential offload leaves it
    with pytest.raises(ModelError, match="weights of vae in memory"):
        model_fingerprint(copy)


def test_a_sharded_tensor_indexes_like_a_tensor():
    whole = torch.arange(20.0).reshape(10, 2)
    sharded = ShardedTensor(whole.split([4, 1, 5]))
    for rows in ([9, 0, 4, 4, 3], [], [-1, -10], slice(None), slice(2, 9, 3), torch.tensor([5, 1, 9])):
        assert torch.equal(sharded[rows], whole[rows]), rows
    assert (sharded.shape, len(sharded)) == (whole.shape, 10)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pipe: pipe.vae.encoder.conv_in.weight, r"autoencoder, found NaN .* for image .*00\.png.*bf16"),
        (lambda pipe: pipe.text_encoder.get_input_embeddings().weight, f"text encoder, .* caption '{CAPTIONS[0]}'"),
    ],
)
def test_the_part_that_returns_no_number_is_named_and_nothing_kept(tiny_pipe, tiny_folder, tmp_path, damage, message):
    with torch.no_grad():
        damage(tiny_pipe).fill_(torch.nan)
    for _ in range(2):
        with pytest.raises(ModelError, match=message):
            as_encoded(tiny_pipe, load_captioned_images(tiny_folder), tmp_path, progress=False)
