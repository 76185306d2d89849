import json
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from conftest import make_guidance_module
from invdiff import Audit, AuditConfig, attach, load_captioned_images
from invdiff.auditing import evidence as evidence_module
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.evidence import Evidence
from invdiff.auditing.run import audit, distinct
from invdiff.data.encode import as_encoded
from invdiff.errors import AuditError, ConfigError, ModelError
from invdiff.files import CURATION
from runs import inferred, made_up_data, sharded


def made_up_evidence(minority, *, contrast, features, seed=0):
    """Evidence in which the minority stands apart by so many standard deviations."""
    rng = np.random.default_rng(seed)
    count = len(minority)
    score = rng.normal(size=(count, 1)) + contrast * minority[:, None]
    draws = score + rng.normal(0, 0.3, (count, 2))
    losses = np.stack([draws, np.zeros_like(draws)], axis=2)[:, None]
    style = rng.normal(size=(count, 5)) @ rng.normal(size=(5, 24))
    content = style + features * np.outer(minority, rng.normal(size=24))
    views = np.stack([content + rng.normal(0, 0.1, content.shape) for _ in range(2)], axis=1)
    return Evidence(losses, sharded(views))


def test_where_nothing_is_hidden_or_can_be_judged_the_true_reason_is_given():
    for count, strength, settings, reason in (
        (600, 0, {}, "no hidden group"),
        (20, 9, {}, "too few images to judge (20;"),
        (3, 0, {"min_images": 1}, "(3; at least 4 are needed)"),
        (200, 0, {"num_groups": 5}, "measured shows 5 humps"),
    ):
        evidence = made_up_evidence(np.arange(count) >= count - 5, contrast=strength, features=strength)
        found = inferred(made_up_data(["a bird"], np.zeros(count, dtype=int)), evidence, [0], **settings)
        assert not found.biased
        assert reason in found.prompts[0].reason
        assert bool(found.prompts[0].candidates) == (count == 600)
        assert (found.group_weights[0] == 0.5).all()


@pytest.mark.parametrize("noise", [0, 1e-2])
@pytest.mark.parametrize("pictures", [3, 4000])
def test_of_copies_among_many_images_one_is_distinct_under_each_prompt(pictures, noise):
    rng = np.random.default_rng(0)
    picture, prompt = rng.integers(0, pictures, 6000), torch.arange(6000) % 2
    every = rng.normal(size=(pictures, 4, 8, 8))[picture] + noise * rng.normal(size=(6000, 4, 8, 8))
    first = distinct(made_up_data(["a", "b"], prompt.numpy(), torch.from_numpy(every)), prompt)
    kinds = 2 * picture + prompt.numpy()
    assert np.flatnonzero(first).tolist() == sorted(np.unique(kinds, return_index=True)[1])


STATING = ["a landbird", "a landbird on land", "a waterbird", "a waterbird on water"]


@pytest.mark.parametrize(
    ("captions", "sizes", "rare", "words"),
    [
        (["a bird on land", "a bird"], [150, 850], [range(940, 1000)], "land, on"),
        # Under neither prompt does the rare group come with "on"; both prompts together show that it is no luck.
        (STATING, [500, 90, 500, 90], [range(30), range(590, 620)], "on"),
    ],
)
def test_captions_that_state_the_group_are_set_apart(captions, sizes, rare, words):
    minority = np.isin(np.arange(sum(sizes)), np.concatenate(rare))
    ids = np.repeat(np.arange(len(sizes)), sizes)
    evidence = replace(made_up_evidence(minority, contrast=8, features=8), contrast_only=True)
    found = inferred(made_up_data(captions, ids), evidence, [k // 2 for k in range(len(captions))], max_factors=1)
    plain = [caption for caption in captions if " on " not in caption]
    assert [prompt.captions for prompt in found.prompts if prompt.found] == [[caption] for caption in plain]
    stated = [prompt for prompt in found.prompts if not prompt.found]
    assert all(" on " in prompt.prompt and words in prompt.reason for prompt in stated)
    assert (found.group_weights[0][np.isin(ids, [captions.index(prompt.prompt) for prompt in stated])] == 0.5).all()


@pytest.fixture(scope="module")
def found():
    """An audit of two prompts of 300 images each, the last 20 of either in the rare group."""
    minority = np.arange(600) % 300 >= 280
    data = made_up_data(["a bird", "a fish"], np.arange(600) // 300)
    evidence = replace(made_up_evidence(minority, contrast=8, features=8), contrast_only=True)
    return inferred(data, evidence, [0, 1], max_factors=1)


def edited(audit):
    edits = Edits(names=(("", ""),)).with_name(0, 1, "on land")
    return apply(audit, edits.without_images([0, 1, 290, 599]).with_cuts(0, 1, [1.0]))


def same(one, other):
    parts = ("fingerprint", "prompts", "factors", "names", "group_names", "forwards_per_image")
    edits = [audit.edits if audit.edits.changed else None for audit in (one, other)]
    alike = all(getattr(one, part) == getattr(other, part) for part in parts)
    return alike and edits[0] == edits[1] and np.array_equal(one.scores, other.scores)


@pytest.mark.parametrize(
    "damage",
    [
        lambda document, arrays: document.clear(),
        lambda document, arrays: document.update(names=document["names"][1:]),
        lambda document, arrays: document["prompts"].pop(),
        lambda document, arrays: document.pop("factors"),  # of a version before
        lambda document, arrays: document["factors"].append(document["factors"][0]),
        lambda document, arrays: document["factors"][0]["splits"][0].update(shares=[1.0]),
        lambda document, arrays: document["factors"][0]["splits"][0].update(prompt=2),
        lambda document, arrays: document["prompts"][0]["candidates"][0].update(agreement=float("nan")),
        lambda document, arrays: arrays.pop("scores"),
        lambda document, arrays: arrays.update(scores=np.full((1, 600), np.nan, np.float32)),
        lambda document, arrays: arrays.update(scores=np.ones(600, np.float32)),
        lambda document, arrays: arrays.update(prompt_ids=np.full(600, 2)),
        lambda document, arrays: arrays.update({"group_weights.0": arrays["scores"][0]}),
    ],
)
def test_a_damaged_audit_is_an_error_that_says_what_to_do(found, tmp_path, damage):
    found.save(tmp_path)
    document, arrays = json.loads((tmp_path / "audit.json").read_text()), load_file(tmp_path / "audit.safetensors")
    damage(document, arrays)
    (tmp_path / "audit.json").write_text(json.dumps(document))
    save_file(arrays, tmp_path / "audit.safetensors")
    with pytest.raises(AuditError, match="Run `invdiff audit` again"):
        Audit.load(tmp_path)


def test_a_folder_that_is_no_audit_is_refused(found, tmp_path):
    with pytest.raises(AuditError, match=r"found no audit\.json"):
        Audit.load(tmp_path)
    file = found.save(tmp_path) / "audit.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1  # one bit of one number: the file is as readable as before
    for damaged in (b"{", flipped):
        file.write_bytes(damaged)
        with pytest.raises(AuditError, match="Run `invdiff audit` again"):
            Audit.load(tmp_path)
    other = replace(found, group_weights=(found.group_weights[0][::-1],))
    file.write_bytes((other.save(tmp_path / "other") / file.name).read_bytes())
    with pytest.raises(AuditError, match="of two audits"):
        Audit.load(tmp_path)


def test_a_file_is_replaced_whole_and_never_changed_in_place(found, tmp_path):
    file = found.save(tmp_path) / "audit.json"
    before = file.read_text()
    with file.open() as reader:  # as a run that is reading, or a kill in the midst of writing
        replace(found, names=[f"other {name}" for name in found.names]).save(tmp_path)
        assert reader.read() == before != file.read_text()


def test_the_rare_group_is_of_the_images_that_people_left_in_and_parted(found):
    minority = np.arange(600) % 300 >= 280
    assert np.array_equal(found.rare(), minority)
    assert found.scores[0, minority].min() > found.scores[0, ~minority].max()
    splits = [replace(split, shares=split.shares[::-1]) for split in found.factors[0].splits]
    # Column 0 is the first maximum of a row of zeros.
    weights, factors = found.group_weights[0][:, ::-1], [replace(found.factors[0], splits=splits)]
    for whole in (found, replace(found, group_weights=(weights,), factors=factors)):
        less = apply(whole, Edits().without_images([285, 3])).rare()
        assert less.sum() == 39
        assert not less[[3, 285]].any()
    whole = apply(found, Edits(cuts={(0, 0): (99.0,)}))
    assert whole.split(0, 0).shares == [1.0, 0.0]
    assert np.array_equal(whole.rare(), np.arange(600) >= 580)


def test_an_audit_that_people_changed_is_saved_with_what_it_was(found, tmp_path):
    edited(found).save_edits(found.save(tmp_path / "a"))
    loaded = Audit.load(tmp_path / "a")
    again = Audit.load(replace(loaded, settings={"seed": 1}).save(tmp_path / "b"))
    assert same(again, loaded)
    assert same(Audit.load(tmp_path / "b", edited=False), found)
    assert again.settings == {"seed": 1}
    assert same(Audit.load(again.save(tmp_path / "b")), loaded)
    assert same(apply(again, Edits()), found)
    assert [path.name for path in (tmp_path / "b").iterdir() if "curation" in path.name] == [CURATION]


def test_the_same_audit_leaves_people_s_changes_and_others_put_them_aside(found, tmp_path):
    edited(found).save_edits(found.save(tmp_path))
    text = (tmp_path / CURATION).read_text()
    found.save(tmp_path)
    assert (tmp_path / CURATION).read_text() == text
    other = replace(found, group_weights=(found.group_weights[0][::-1],))
    assert same(Audit.load(other.save(tmp_path)), other)
    assert (tmp_path / f"curation-{found.fingerprint}.json").read_text() == text
    assert not (tmp_path / CURATION).exists()
    edited(found).save_edits(found.save(tmp_path))
    other = apply(found, Edits().without_images([7]))
    assert same(Audit.load(other.save(tmp_path)), other)
    assert (tmp_path / f"curation-{found.fingerprint}-2.json").read_text() == text


def test_groups_replaced_after_people_s_changes_are_saved_as_they_are(found, tmp_path):
    replaced = replace(edited(found), group_weights=(found.group_weights[0][::-1],))
    loaded = Audit.load(replaced.save(tmp_path))
    assert loaded.fingerprint == replaced.fingerprint
    assert (loaded.edits.left_out, loaded.group_names) == ((), (("", "on land"),))


def run(pipe, folder, cache, **changes):
    config = AuditConfig(**{"solver": "exact", "batch_size": 4, "min_images": 4, "min_share": 0.1} | changes)
    return audit(pipe, load_captioned_images(folder), config=config, cache_dir=cache, progress=False)


def test_a_killed_audit_goes_on_to_the_same_result(tiny_pipe, tiny_folder, tmp_path, monkeypatch, kill):
    monkeypatch.setattr(evidence_module, "SHARD_SIZE", 4)
    run(tiny_pipe, tiny_folder, tmp_path / "whole").save(tmp_path / "a")
    kill(evidence_module, "paired_losses", 3, run, tiny_pipe, tiny_folder, tmp_path / "cut")
    monkeypatch.setattr(evidence_module, "paired_losses", measure := Mock(wraps=evidence_module.paired_losses))
    run(tiny_pipe, tiny_folder, tmp_path / "cut").save(tmp_path / "b")
    assert [len(call.args[1]) for call in measure.call_args_list] == [4]
    for name in ("audit.safetensors", "audit.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("name", "model"), [("vision_encoder", "a vision encoder"), ("words_model", "a CLIP model")])
def test_models_that_look_at_images_need_images(tiny_pipe, encoded, tmp_path, name, model):
    with pytest.raises(ConfigError, match=f"for {model} to look at"):
        audit(tiny_pipe, encoded, config=AuditConfig(**{name: "any"}), cache_dir=tmp_path, progress=False)


def test_images_of_another_resolution_are_measured_afresh(tiny_pipe, tiny_folder, encoded, tmp_path):
    small, large = (run(tiny_pipe, tiny_folder, tmp_path, resolution=side) for side in (16, 32))
    alone = run(tiny_pipe, tiny_folder, tmp_path / "other")
    assert np.array_equal(large.scores, alone.scores)
    assert not np.array_equal(small.scores, large.scores)
    assert (small.settings["resolution"], alone.settings["resolution"]) == (16, 32)
    assert "own_images_of" not in small.settings
    fingerprint = small.settings["denoiser_fingerprint"]
    large.check_matches(encoded, fingerprint)
    with pytest.raises(AuditError, match="Expected images of 16 pixels, as they were audited, got 32"):
        small.check_matches(encoded, fingerprint)
    with pytest.raises(ConfigError, match="encoded at resolution 16, got 32"):
        as_encoded(tiny_pipe, encoded, resolution=16)


def test_a_guided_model_is_not_audited_as_the_plain_one(tiny_pipe, tiny_folder, tmp_path):
    with attach(tiny_pipe, make_guidance_module(tiny_pipe)) as attachment:
        with pytest.raises(ModelError, match=r"Expected the plain model, found a guidance module.* Call detach\(\)"):
            run(tiny_pipe, tiny_folder, tmp_path)
        attachment.calls = 1  # nothing was to be drawn


def test_another_model_is_measured_afresh_but_not_for_another_solver(tiny_pipe, tiny_folder, tmp_path):
    first = run(tiny_pipe, tiny_folder, tmp_path)
    before = sorted((tmp_path / "evidence").rglob("*"))
    run(tiny_pipe, tiny_folder, tmp_path, solver="gradient")
    assert sorted((tmp_path / "evidence").rglob("*")) == before
    with torch.no_grad():
        tiny_pipe.unet.conv_out.weight.mul_(1.5)
    second = run(tiny_pipe, tiny_folder, tmp_path)
    assert first.settings["denoiser_fingerprint"] != second.settings["denoiser_fingerprint"]
    assert not np.array_equal(first.scores, second.scores)
