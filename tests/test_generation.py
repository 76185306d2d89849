import functools
import importlib
import json
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CAPTIONS, contents, make_guidance_module, make_tiny_pipeline
from invdiff import GenerateConfig, attach, sampling
from invdiff.errors import ConfigError, InvDiffError, ModelError
from invdiff.sampling import Drawing, generate
from invdiff.seeds import derived_seed
from tiny import RESOLUTION, make_tiny


def run(pipe, folder, prompts=CAPTIONS, **options):
    """Generate five images per prompt in batches of four, unless told otherwise, and return the manifest."""
    beside = {name: options.pop(name) for name in ("module", "environments") if name in options}
    values = {"images_per_prompt": 5, "num_inference_steps": 2, "batch_size": 4} | options
    assert generate(pipe, prompts, folder, config=GenerateConfig(**values), progress=False, **beside) == folder
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pixels(folder):
    arrays = {}
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            arrays[str(path.relative_to(folder))] = np.asarray(image)
    return arrays


def groups(rows):
    return [row["environment"] for row in rows]


def count_calls(pipe):
    """Return a list that later denoiser calls append their number of rows to."""
    calls = []
    pipe.unet.register_forward_hook(lambda network, inputs, output: calls.append(len(inputs[0])))
    return calls


def test_images_are_not_drawn_from_a_model_that_is_guided_already(tiny_pipe, tmp_path):
    attachment = attach(tiny_pipe, make_guidance_module(tiny_pipe))
    for unet in (tiny_pipe.unet, torch.compile(tiny_pipe.unet, backend="eager")):
        tiny_pipe.unet = unet
        with pytest.raises(ModelError, match="found a guidance module attached"):
            generate(tiny_pipe, list(CAPTIONS), tmp_path, progress=False)
    attachment.detach()


@pytest.mark.parametrize("guided", [False, True])
def test_the_manifest_names_every_image_by_prompt_and_number(tiny_pipe, tmp_path, guided):
    module = make_guidance_module(tiny_pipe, mode="invariant") if guided else None  # which sees no groups
    rows = run(tiny_pipe, tmp_path, images_per_prompt=2, seed=3, module=module, scale=0.5)
    same = {"environment": None, "scale": 0.5 * guided, "guidance_scale": 3.0, "num_inference_steps": 2}
    for row, (place, image) in zip(rows, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        seed = derived_seed("generate", 3, CAPTIONS[place], image) % 2**32
        name = f"{place:05d}/{image:06d}.png"
        assert row == {"file_name": name, "prompt": CAPTIONS[place], "seed": seed} | same
    images = pixels(tmp_path)
    assert {name: image.shape for name, image in images.items()} == {row["file_name"]: (32, 32, 3) for row in rows}


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_pipe, tmp_path, kill):
    pipe = make_tiny_pipeline()
    run(pipe, tmp_path / "whole", module=make_guidance_module(pipe, num_groups=(2, 3)))
    module = make_guidance_module(tiny_pipe, num_groups=(2, 3))
    kill(sampling, "save_image", 8, functools.partial(run, module=module), tiny_pipe, tmp_path / "cut")
    assert len(list((tmp_path / "cut").rglob("*.png"))) == 7
    calls = count_calls(tiny_pipe)
    run(tiny_pipe, tmp_path / "cut", module=module)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert calls == [8, 8, 4, 4]  # the second batch of 4 images and one of 2, 2 steps each, 2 rows per image


def test_a_finished_run_draws_nothing_and_damaged_images_are_drawn_again(tiny_pipe, tmp_path):
    run(tiny_pipe, tmp_path)
    before, calls = contents(tmp_path), count_calls(tiny_pipe)
    run(tiny_pipe, tmp_path)
    assert calls == []
    images = sorted(tmp_path.rglob("*.png"))
    whole = images[0].read_bytes()
    (tmp_path / "00001/.000003.png.abc.png").write_bytes(b"left by a killed run")
    own = images[5].read_bytes()
    spoilt = own[:-16] + bytes(4) + own[-12:]  # the checksum of its pixels
    for damage in (b"", b"not a picture", whole, whole[: len(whole) // 2], spoilt):  # one at a time: a batch is whole
        images[5].write_bytes(damage)
        run(tiny_pipe, tmp_path)
        assert contents(tmp_path) == before


def test_images_do_not_depend_on_batch_size_or_the_order_of_prompts(tiny_pipe, tmp_path):
    tiny_pipe.scheduler = diffusers.DDPMScheduler.from_config(tiny_pipe.scheduler.config)
    module = make_guidance_module(tiny_pipe, num_groups=5)
    rows = run(tiny_pipe, tmp_path / "a", module=module)
    assert [sorted(groups(rows)[of]) for of in (slice(5), slice(5, 10))] == [[[e] for e in range(5)]] * 2
    turned = run(tiny_pipe, tmp_path / "b", CAPTIONS[::-1], module=module, batch_size=3)
    assert groups(rows) == groups(turned[5:] + turned[:5])
    before, after = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    for name, image in before.items():
        turned_name = name.replace("00000/", "x/").replace("00001/", "00000/").replace("x/", "00001/")
        assert np.abs(image.astype(int) - after[turned_name]).max() <= 1


@pytest.mark.parametrize("draws", ["iid", "uniform"])
def test_a_run_asked_for_more_images_draws_those_that_are_missing(tiny_pipe, tmp_path, kill, draws):
    options = {"module": make_guidance_module(tiny_pipe, num_groups=3), "environments": draws}
    run(tiny_pipe, tmp_path / "grown", images_per_prompt=4, **options)
    few = contents(tmp_path / "grown")
    more = options | {"images_per_prompt": 8}
    kill(sampling, "save_image", 1, functools.partial(run, **more), tiny_pipe, tmp_path / "grown")
    assert not (tmp_path / "grown/manifest.jsonl").exists()  # evaluate reads no folder that is half old, half new
    calls = count_calls(tiny_pipe)
    rows = run(tiny_pipe, tmp_path / "grown", **more)
    if draws == "iid":
        assert len(calls) == 2 * 2  # two batches of new images, two steps each
        drawn = {name: of for name, of in few.items() if name.endswith(".png")}
        assert drawn.items() <= contents(tmp_path / "grown").items()
    assert rows == run(tiny_pipe, tmp_path / "afresh", **more)
    assert contents(tmp_path / "grown") == contents(tmp_path / "afresh")


@pytest.mark.parametrize("given", [[0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1, 1, 0, 0, 0]], ids=["alike", "each"])
def test_groups_can_be_given_for_each_image(tiny_pipe, tmp_path, given):
    module = make_guidance_module(tiny_pipe)
    rows = run(tiny_pipe, tmp_path / "given", module=module, environments=torch.tensor(given))
    assert groups(rows) == [[group] for group in (given * 2)[:10]]
    assert groups(run(tiny_pipe, tmp_path / "ones", module=module, environments=[0.0, 1.0])) == [[1]] * 10
    images, ones = pixels(tmp_path / "given"), pixels(tmp_path / "ones")
    same = [np.array_equal(images[row["file_name"]], ones[row["file_name"]]) for row in rows]
    assert same == [group == [1] for group in groups(rows)]


def test_the_pipeline_is_left_as_it_was(tiny_pipe, tmp_path, kill, capfd):
    tiny_pipe.set_progress_bar_config(desc="mine", disable=False)
    guided = functools.partial(run, module=make_guidance_module(tiny_pipe))
    capfd.readouterr()
    for go in (functools.partial(kill, sampling, "save_image", 3, guided), guided):
        go(tiny_pipe, tmp_path)
        assert capfd.readouterr() == ("", "")  # the pipeline's own bar is silent
        assert tiny_pipe._progress_bar_config == {"desc": "mine", "disable": False}
        assert not any(network._forward_hooks for network in tiny_pipe.unet.modules())


def test_another_run_is_not_mixed_in(tiny_pipe, tmp_path):
    options = {"module": make_guidance_module(tiny_pipe)}
    run(tiny_pipe, tmp_path, **options)
    before = contents(tmp_path)

    def refused(message, **change):
        with pytest.raises(ConfigError, match=message + ".*another output folder, or delete this one"):
            run(tiny_pipe, tmp_path, **(options | change))

    refused("seed was 0, now 1", seed=1)
    refused("batch_size was 4, now 3", batch_size=3)
    refused("images_per_prompt was 5, now 4", images_per_prompt=4)
    refused("seed was 0, now 1", seed=1, images_per_prompt=6)
    refused("environments was .*0.5.*, now .*0.8", environments=[0.2, 0.8])
    refused("draws was 'stratified', now 'iid'", environments="iid")
    refused("prompts was", prompts=[*CAPTIONS, "another"])
    refused("module was '[0-9a-f]{16}', now None; environments was", module=None)
    options["module"].register_to_config(null_adapter="off")
    refused("null_adapter was None, now 'off'")
    options["module"].register_to_config(null_adapter="on")
    tiny_pipe.scheduler = diffusers.DDPMScheduler.from_config(tiny_pipe.scheduler.config)
    refused("scheduler was 'DDIMScheduler .* now 'DDPMScheduler")
    with torch.no_grad():
        tiny_pipe.vae.decoder.conv_out.bias[0] += 0.01
    refused("model was .*; scheduler was")
    assert contents(tmp_path) == before


def test_where_something_else_lies_nothing_is_written(tiny_pipe, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000/000000.png").write_text("")
    places = {"": "found generated images in", "file": "Could not write", "file/in": "Could not write"}
    for place, message in places.items():
        with pytest.raises(InvDiffError, match=message):
            run(tiny_pipe, tmp_path / place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "at least one prompt, got none"),
        ({"prompts": "a photo"}, "a list of prompts, got 'a photo'"),
        ({"prompts": [None]}, r"a list of prompts, got \[None\]"),
        ({"prompts": ["a photo", "a photo"]}, "got 'a photo' again"),
        ({"mode": "balanced", "environments": [0, 1, 0, 1]}, r"for 5 images .* or for all 10, got 4"),
        ({"environments": [0.5, 0.5]}, "a module beside environments"),
        ({"mode": "balanced", "of": 1}, "trained for another model"),
        ({"mode": "invariant", "environments": "calibrated"}, "a balanced module at scale 1"),
        ({"mode": "balanced", "environments": "calibrated", "scale": 0.5}, "a balanced module at scale 1"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_folder_behind(tiny_pipe, tmp_path, options, message):
    given = {name: value for name, value in options.items() if name not in ("mode", "of")}
    if "mode" in options:
        given["module"] = make_guidance_module(make_tiny_pipeline(options.get("of", 0)), mode=options["mode"])
    with pytest.raises((ConfigError, ModelError), match=message):
        run(tiny_pipe, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_safety_checker_that_blackens_images_is_noticed(tiny_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_pipe, "run_safety_checker", lambda images, *_: (images, [False, True, False, False]))
    with pytest.raises(ModelError, match="safety_checker=None"):
        run(tiny_pipe, tmp_path)


SDE = {"algorithm_type": "sde-dpmsolver++"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
COMPATIBLE = sorted({kind.__name__ for kind in diffusers.DDIMScheduler().compatibles} - {"DPMSolverSDEScheduler"})
SCHEDULERS = [
    *(("sd1", name, {}) for name in COMPATIBLE),
    *(("sd1", name, {}) for name in ("LCMScheduler", "TCDScheduler", "SASolverScheduler")),
    *(("sd1", f"DPMSolver{kind}Scheduler", SDE) for kind in ("Multistep", "Singlestep")),
    *((family, "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}) for family in ("sd3", "flux")),
    *((family, "FlowMatchLCMScheduler", {}) for family in ("sd3", "flux")),
    ("sd3", "FlowMatchHeunDiscreteScheduler", {}),
    ("sd3", "DPMSolverMultistepScheduler", FLOW),
    ("flux", "UniPCMultistepScheduler", FLOW),
    ("sd2-v", "HeunDiscreteScheduler", {}),
    *((family, "DPMSolverMultistepScheduler", SDE) for family in ("pixart", "dit", "ddpm")),
    *((family, "EulerAncestralDiscreteScheduler", {}) for family in ("dit", "ddpm")),
]
tiny_of = functools.cache(make_tiny)


def drawn(pipe, family, batch_size=2, *, guided=True):
    """Two images of one prompt."""
    sizes = {"images_per_prompt": 2, "num_inference_steps": 4, "batch_size": batch_size}
    sizes |= {"resolution": RESOLUTION.get(family, 0), "guidance_scale": 1.0 if family == "ddpm" else 3.0}
    prompts = {"ddpm": [], "dit": ["landbird"]}.get(family, ["a photo of a landbird"])
    module = make_guidance_module(pipe, num_groups=7) if guided else None
    with Drawing(pipe, prompts, module=module, config=GenerateConfig(**sizes)) as drawing:
        images = [np.asarray(image, int) for places in drawing.batches() for image in drawing.batch(places)]
    return np.stack(images)


def check_noise_follows_from_seeds(pipe, family):
    guided = "EDM" not in type(pipe.scheduler).__name__  # which has no noise schedule of training
    images = drawn(pipe, family, guided=guided)
    assert np.abs(drawn(pipe, family, 1, guided=guided) - images).max() <= 1
    assert (np.abs(drawn(pipe, family, guided=False) - images).max() > 1) == guided
    assert not {"step", "decode", "encode_prompt"} & {*vars(pipe), *vars(pipe.scheduler), *vars(tiny_of("sd1").vae)}


@pytest.mark.parametrize(("family", "name", "options"), SCHEDULERS)
def test_all_noise_follows_from_the_seeds_and_every_scheduler_is_guided(family, name, options, monkeypatch):
    pipe = tiny_of(family)
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, name).from_config(pipe.scheduler.config, **options))
    check_noise_follows_from_seeds(pipe, family)


@pytest.mark.parametrize("family", ["sd1", "dit"])
def test_brownian_trees_follow_from_the_seeds(family, monkeypatch):
    class BrownianInterval:
        def __init__(self, size, entropy, **options):
            self.size, self.rng = size, torch.Generator().manual_seed(entropy)

        def __call__(self, start, end):
            return torch.randn(self.size, generator=self.rng)

    monkeypatch.setitem(sys.modules, "torchsde", SimpleNamespace(BrownianInterval=BrownianInterval))
    kind = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    pipe = tiny_of(family)
    monkeypatch.setattr(pipe, "scheduler", kind.from_config(pipe.scheduler.config, noise_sampler_seed=5))
    check_noise_follows_from_seeds(pipe, family)
    assert pipe.scheduler.noise_sampler_seed == 5


class GlobalNoise(diffusers.DDPMScheduler):
    def step(self, model_output, timestep, sample, **options):
        return super().step(model_output + torch.randn_like(sample), timestep, sample, **options)


def overflow(weight):
    weight.mul_(1e38)


def use(scheduler, **options):
    return lambda pipe: setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config, **options))


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda pipe: overflow(pipe.vae.decoder.conv_in.weight), "autoencoder, found .*--dtype.* autoencoder that"),
        (lambda pipe: overflow(pipe.vae.decoder.conv_out.bias.add_(5)), "autoencoder, found"),  # infinity, no NaN
        (lambda pipe: overflow(pipe.unet.conv_out.weight.add_(1)), "denoiser, found .*fp32 or bf16"),
        (lambda pipe: overflow(pipe.text_encoder.get_input_embeddings().weight), "text encoder, found .*fp32 or bf16"),
        (use(diffusers.DDIMScheduler, **ZERO_SNR), "scheduler DDIMScheduler, found .*v_prediction only"),
        (use(GlobalNoise), "images' own generators, got GlobalNoise.* Choose another scheduler"),
    ],
)
@torch.no_grad()
def test_a_part_that_returns_no_number_or_draws_other_noise_is_named(tiny_pipe, tmp_path, damage, part):
    damage(tiny_pipe)
    with pytest.raises(ModelError, match=f"from the {part}"):
        run(tiny_pipe, tmp_path)
    assert not list(tmp_path.rglob("*.png"))


@torch.no_grad()
def test_images_before_one_that_is_no_number_are_kept_and_black_ones_are_images(tiny_pipe, tmp_path):
    (token,) = set(tiny_pipe.tokenizer(CAPTIONS[1]).input_ids) - set(tiny_pipe.tokenizer(CAPTIONS[0]).input_ids)
    embeddings = tiny_pipe.text_encoder.get_input_embeddings().weight
    before = embeddings[token].clone()
    embeddings[token] = torch.nan
    with pytest.raises(ModelError, match=f"text encoder, found NaN or infinity for prompt '{CAPTIONS[1]}', seed"):
        run(tiny_pipe, tmp_path / "a", batch_size=5)
    assert len(pixels(tmp_path / "a")) == 5
    embeddings[token] = before
    tiny_pipe.vae.decoder.conv_out.bias.fill_(-1000)
    run(tiny_pipe, tmp_path / "b")
    assert not any(image.any() for image in pixels(tmp_path / "b").values())
