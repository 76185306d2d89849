"""Rivals that train: what their papers promise, in small worlds."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from methods import Guided, World
from PIL import Image
from rivals import groups
from rivals.groups import GroupBalanced, caption_odds, eiil, groups_of, jtt, kmeans
from rivals.inner import GuidedInside, InnerModule
from rivals.invdiff_released import InvDiff, Second, mixed, released_groups
from rivals.tiw import TIW, Pairs, alpha_sigma, corrected, of_mixture, ratio_loss
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import cross_entropy

from conftest import write_tiny_folder
from invdiff import FinetuneConfig, GenerateConfig, generate, load_captioned_images
from invdiff.data.encode import as_encoded
from invdiff.errors import ConfigError, DataError
from invdiff.files import read_json, read_tensors, weights_digest
from invdiff.models.schedule import NoiseSchedule

SHORT = FinetuneConfig(steps=2, batch_size=4, mixed_precision="no")


@pytest.fixture(scope="module")
def world(tiny_folder: Path, tiny_pipe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    images = load_captioned_images(tiny_folder)
    prompts = {caption: caption.split()[-1] for caption in images.captions}
    words = {"land": "on land", "water": "on water"}
    parts = (images, images, "background", "subject", prompts, words, tiny_pipe_dir, tmp_path_factory.mktemp("world"))
    return World(*parts, finetuning=SHORT)


BIASED, BALANCED = (1.0, 0.8), (-1.0, 0.5)
"""Mean and deviation of two Gaussians, of which one is known and the other is wanted."""


def true_ratio(schedule):
    """The log ratio of the densities of noisy latents of both."""

    def log_ratio(z, timesteps, condition):
        def log_density(mean, deviation):
            variance = (alpha * deviation) ** 2 + sigma**2
            return -((z - alpha * mean) ** 2) / (2 * variance) - variance.log() / 2

        alpha, sigma = alpha_sigma(schedule, timesteps)
        return (log_density(*BALANCED) - log_density(*BIASED)).flatten()

    return log_ratio


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_score_correction_turns_one_gaussian_s_posterior_mean_into_another_s(kind):
    schedule, timesteps = NoiseSchedule(DDPMScheduler(prediction_type=kind)), torch.tensor([20, 300, 700])
    z = torch.randn(3, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    alpha, sigma = alpha_sigma(schedule, timesteps)

    def best_target(mean, deviation):
        variance = (alpha * deviation) ** 2 + sigma**2
        latents = mean + alpha * deviation**2 / variance * (z - alpha * mean)
        return schedule.target(latents, (z - alpha * latents) / sigma, timesteps)

    target, log_weights = corrected(true_ratio(schedule), schedule, z, timesteps, best_target(*BIASED), {})
    torch.testing.assert_close(target, best_target(*BALANCED))
    assert torch.equal(log_weights, true_ratio(schedule)(z, timesteps, {}))
    share = log_weights.sigmoid()[:, None, None, None]  # of balanced latents among those that are seen as z
    of_both = share * best_target(*BALANCED) + (1 - share) * best_target(*BIASED)
    target, log_weights = corrected(of_mixture(true_ratio(schedule)), schedule, z, timesteps, of_both, {})
    torch.testing.assert_close(target, best_target(*BALANCED))
    torch.testing.assert_close(log_weights.exp(), 2 * share.flatten())


def test_the_loss_of_the_discriminator_is_least_at_the_true_ratio():
    schedule, rng = NoiseSchedule(DDPMScheduler()), torch.Generator().manual_seed(0)
    pairs = [mean + deviation * torch.randn(20_000, 1, 1, 1, generator=rng) for mean, deviation in (BIASED, BALANCED)]

    def loss(factor, shift):
        ratio, rng = true_ratio(schedule), torch.Generator().manual_seed(1)
        return ratio_loss(lambda *given: factor * ratio(*given) + shift, schedule, pairs, {}, rng).item()

    assert loss(1, 0) < min(loss(*wrong) for wrong in ((0.8, 0), (1.2, 0), (-1, 0), (1, 0.1), (1, -0.1)))


def test_tiw_is_fitted_on_a_pipeline_and_read_back(world, tmp_path):
    method = TIW(reference=0.5, discriminator_steps=2)
    first = method.fit(world, tmp_path / "tiw")
    again = method.fit(world, tmp_path / "tiw")
    assert again.about == first.about
    assert first.about["reference"] == 6
    assert weights_digest(again.pipe.unet) == weights_digest(first.pipe.unet)
    with pytest.raises(ConfigError, match=r"reference was 0\.5, now 0\.25"):
        replace(method, reference=0.25).fit(world, tmp_path / "tiw")
    with pytest.raises(DataError, match="a balanced image of every caption"):
        replace(method, reference=0.01).fit(world, tmp_path / "other")
    of_both = replace(method, mixture=True).fit(world, tmp_path / "mixture")
    control = replace(method, mixture=True, weighted=False).fit(world, tmp_path / "control")
    assert len({weights_digest(fitted.pipe.unet) for fitted in (first, of_both, control)}) == 3
    assert control.about["mean ratio"] is None
    assert control.parameters < of_both.parameters


def test_half_of_what_tiw_shows_is_balanced_if_it_shows_a_mixture(world, tiny_pipe):
    biased, balanced = (as_encoded(tiny_pipe, images) for images in (world.data, world.balanced))
    both, chances = Pairs(biased, balanced).mixture()
    assert len(both) == len(biased) + len(balanced)
    assert chances[: len(biased)].sum().item() == pytest.approx(chances[len(biased) :].sum().item())
    for caption, share in enumerate(torch.bincount(biased.caption_ids) / len(biased)):
        for part in (slice(len(biased)), slice(len(biased), None)):
            assert chances[part][both.caption_ids[part] == caption].sum().item() == pytest.approx(share.item())
    assert torch.equal(both.latents[[len(biased)]], balanced.latents[[balanced.names.index(both.names[len(biased)])]])


def test_the_second_network_starts_as_the_first_in_the_paper_and_at_nothing_in_the_released_code(tiny_pipe):
    unet = tiny_pipe.unet
    rng = torch.Generator().manual_seed(0)
    batch = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([3, 700]), torch.randn(2, 16, 16, generator=rng)
    with torch.no_grad():
        alone = unet(*batch).sample
        for released, share in ((False, 1.0), (True, 0.2)):
            with mixed(unet, Second(unet, released=released), 0.8):
                torch.testing.assert_close(unet(*batch).sample, share * alone)
                torch.testing.assert_close(unet(*batch, return_dict=False)[0][1:], share * alone[1:])
        assert torch.equal(unet(*batch).sample, alone)


def test_the_released_code_parts_images_by_loss():
    hard = np.repeat([0.1, 1.0], 20)
    found = released_groups(hard, 2, 0.0, seed=0)
    assert np.allclose(found.sum(axis=1), 1)
    assert (found.argmax(axis=1) == found[0].argmax()).tolist() == (hard < 0.5).tolist()


@pytest.mark.parametrize(("variant", "given"), [("paper", False), ("paper", True), ("released", False)])
def test_invdiff_is_fitted_beside_the_biased_model_and_read_back(variant, given, world, tmp_path):
    settings = {"variant": variant, "forwards": 2 * 4 * 4 + (0 if given else 12), "true_groups": given}
    settings |= {"mixed_precision": "bf16" if given else "no"}
    method = InvDiff(**settings, batch_size=4, num_groups=2, learning_rate=1e-3)
    assert method.supervision == ("labels" if given else "none")
    fitted = method.fit(world, tmp_path / "invdiff")
    assert (fitted.about["steps"], fitted.forwards) == (2, method.forwards)
    if given:  # as many as captions and classes together
        cells = zip(world.data.captions, world.labelled.attributes["background"], strict=True)
        shares = [count / len(world.data) for count in Counter(cells).values()]
        assert sorted(fitted.about["shares of groups"]) == pytest.approx(sorted(shares), abs=1e-4)
    again = method.fit(world, tmp_path / "invdiff")
    assert sorted(path.name for path in (tmp_path / "invdiff").iterdir()) == ["fitted.json", "second.safetensors"]

    def images(of):
        with of.hooked(0):
            options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
            return of.pipe("a photo of a landbird", num_images_per_prompt=2, **options).images

    assert np.array_equal(images(fitted), images(again))
    assert not np.array_equal(images(again), images(replace(again, hooked=type(again)(None).hooked)))
    with pytest.raises(ConfigError, match=r"penalty was 1\.0, now 0\.0"):
        replace(method, penalty=0.0).fit(world, tmp_path / "invdiff")


def test_invdiff_learns_in_half_precision_what_it_learns_in_full(world, tmp_path):
    """Copies of weights in 16 bits that outlive a step would be trained no further."""
    moved = []
    for precision in ("no", "bf16"):
        settings = {"steps": 60, "batch_size": 4, "num_groups": 2, "learning_rate": 1e-2, "true_groups": True}
        fitted = InvDiff(**settings, mixed_precision=precision).fit(world, tmp_path / precision)
        start = Second(fitted.pipe.unet, released=False).state_dict()
        found = read_tensors(tmp_path / precision / "second.safetensors")
        moved.append(torch.cat([(found[name] - start[name]).flatten() for name in start]))
    assert torch.cosine_similarity(*moved, dim=0) > 0.6


def hidden_groups():
    """Features, captions and a hidden attribute that agrees with the caption in 90%."""
    rng = np.random.default_rng(0)
    captions = np.repeat([0, 1], 300)
    attribute = np.where(rng.random(600) < 0.1, 1 - captions, captions)
    features = rng.normal(size=(600, 6))
    features[:, 0] += 6 * attribute
    features[:, 1] += captions
    return features, captions, attribute


def test_classifiers_and_clusters_find_an_attribute_that_predicts_the_caption():
    features, captions, attribute = hidden_groups()
    assert (jtt(features, captions) == (attribute != captions)).mean() > 0.95
    assert np.array_equal(eiil(features, captions), jtt(features, captions))  # of two captions
    clusters = kmeans(features[:, :2], captions)
    for caption in (0, 1):
        own = captions == caption
        assert adjusted_rand_score(attribute[own], clusters[own]) > 0.8


def test_eiil_s_environments_maximise_the_penalty_of_a_classifier_of_three_captions():
    features, captions, _ = hidden_groups()
    captions = captions + (np.arange(600) % 3 == 0)
    logits, scale = torch.from_numpy(caption_odds(features, captions)), torch.ones((), requires_grad=True)
    losses = cross_entropy(scale * logits, torch.tensor(captions), reduction="none")
    slopes = torch.stack([torch.autograd.grad(loss, scale, retain_graph=True)[0] for loss in losses]).numpy()
    found, others = eiil(features, captions), np.random.default_rng(0).random((50, 600))
    penalties = [(q @ slopes) ** 2 + ((1 - q) @ slopes) ** 2 for q in (found, jtt(features, captions), *others)]
    assert penalties[0] > max(penalties[1:])


def test_fine_tuning_and_guidance_take_given_and_inferred_groups(tiny_pipe_dir, tmp_path, monkeypatch):
    images = load_captioned_images(write_tiny_folder(tmp_path / "images", 60))
    rare = np.arange(60) < 6
    images = replace(images, attributes={"background": np.where(rare, "water", "land").tolist()})
    prompts = {caption: caption.split()[-1] for caption in images.captions}
    world = World(images, images, "background", "subject", prompts, {}, tiny_pipe_dir, tmp_path, finetuning=SHORT)
    GroupBalanced("true").fit(world, tmp_path / "true-groups")
    fitted = read_json(tmp_path / "true-groups" / "finetune.json")["settings"]
    assert fitted["audit"] == world.true.fingerprint
    assert np.array_equal(world.true.rare(), rare)
    monkeypatch.setattr(groups, "INFERRED", {"jtt": lambda features, captions, seed: rare.astype(int)})
    assert np.array_equal(groups_of(world, "jtt").rare(), rare)
    with pytest.raises(ConfigError, match=r"Expected groups of audit, true, .*jtt, got 'george'"):
        groups_of(world, "george")
    short = {"backend": "lora", "steps": 1, "batch_size": 4, "preserve": 0.0, "mixed_precision": "no"}
    guided = Guided(config=short, groups="jtt")
    assert guided.supervision == "none"
    fitted = guided.fit(world, tmp_path / "guided")
    assert fitted.guidance.num_groups == (2,)
    beside = Guided(config=short | {"backend": "module"}, groups="jtt").fit(world, tmp_path / "beside")
    assert fitted.forwards - beside.forwards == (3 - 1) * 4  # no gradient goes through the frozen model
    inside = GuidedInside(config=short | {"backend": "module"}, groups="jtt")
    fitted = inside.fit(world, tmp_path / "inside")
    assert any(shift.up.weight.any() for shift in fitted.guidance.shifts)
    again = inside.fit(world, tmp_path / "inside").guidance  # read back
    assert weights_digest(again) == weights_digest(fitted.guidance)


def test_shifts_inside_the_denoiser_are_zero_at_first_and_steer_a_pipeline_once_learned(tiny_pipe, tmp_path):
    prompts, config = ["a photo of a landbird"], GenerateConfig(images_per_prompt=2, num_inference_steps=2)
    module = InnerModule.for_pipeline(tiny_pipe, num_groups=(2,))
    drawn = {}
    for name, guidance in (("plain", None), ("untrained", module), ("learned", module)):
        if name == "learned":
            for shift in module.shifts:
                torch.nn.init.normal_(shift.up.weight)
        folder = generate(tiny_pipe, prompts, tmp_path / name, module=guidance, config=config, progress=False)
        drawn[name] = [np.asarray(Image.open(path)).tolist() for path in sorted(folder.rglob("00*.png"))]
    assert len(drawn["plain"]) == 2
    assert drawn["plain"] == drawn["untrained"]
    assert drawn["plain"] != drawn["learned"]
