"""Attributes asked for in words: how images are read, which groups are believed, and what is said."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from invdiff import AuditConfig, audit, load_captioned_images
from invdiff.auditing import asking
from invdiff.auditing.asking import DRAWS, LEVELS, REST, Reading, asked_factors, questions, read_by_clip
from invdiff.auditing.factors import Search
from invdiff.errors import AuditError, ConfigError
from runs import made_up_data
from test_words import birds, on_water
from tiny import make_ddpm

PLACE = {"place": ("land", "water")}
CONFIG = AuditConfig(min_images=4, batch_size=4)
FORWARDS = len(LEVELS) * DRAWS


def test_questions_are_lines_or_a_mapping_and_common_is_a_list_of_about_thirty():
    lines = ["place: forest, sea,city", "a b:x y, z"]
    assert questions(lines) == {"place": ("forest", "sea", "city"), "a b": ("x y", "z")}
    assert questions(PLACE) == PLACE
    assert questions("place: land, water") == questions({"place": "land, water"}) == PLACE
    assert questions({"a: b": ("x, y", "z")}) == {"a: b": ("x, y", "z")}
    common = questions(["mine: a, b", "common"])
    assert 25 <= len(common) <= 35
    assert common["mine"] == ("a", "b")


@pytest.mark.parametrize("line", ["place", "p, sea: land", "p: sea", "p: sea, Sea", ": a, b", "a: b, " + "c" * 61])
def test_what_is_no_question_is_refused(line):
    with pytest.raises(ConfigError, match="place: forest, sea, city"):
        questions([line])
    with pytest.raises(ConfigError, match="each once"):
        questions(["a: b, c", "a: d, e"])


def factors(values, shown, noise=0.5, captions=("a dog", "a cat"), caption_ids=None, look=None, **settings):
    """What is made of readings of images of which `shown` (N,) is the true value, half of them of each prompt."""
    rng = np.random.default_rng(0)
    look = np.vstack([np.eye(len(values)), np.zeros(len(values))]) if look is None else look  # last: none of them
    scores = 3.0 * np.array(look)[shown] + noise * rng.normal(size=(2, len(shown), len(values)))
    scores -= scores.mean(axis=2, keepdims=True)
    half = len(shown) // 2
    ids = np.repeat([0, 1], half) if caption_ids is None else caption_ids
    data, members = made_up_data(list(captions), ids), {0: np.arange(half), 1: np.arange(half, 2 * half)}
    search, config = Search([], {0: [], 1: []}), AuditConfig(**settings)
    return asked_factors(search, [Reading("what", values, scores)], data, np.ones(len(shown), bool), config, members)


def shown(*shares, count=600):
    """The value of each image, of prompts with these shares of values."""
    counts = [np.round(np.array(own) * count).astype(int) for own in shares]
    return np.concatenate([np.repeat(np.arange(len(own)), own) for own in counts])


def test_of_more_values_those_that_are_told_apart_have_groups_and_the_rest_another():
    truth = shown((0.5, 0.1, 0.2, 0.2), (0.1, 0.6, 0.2, 0.1))
    search = factors(("forest", "sea", "city"), truth)
    assert search.values == [["forest", "sea", "city", REST]]
    weights = np.concatenate([search.factors[0][prompt].weights for prompt in (0, 1)])
    assert (weights.argmax(axis=1) == truth).mean() > 0.97
    assert np.allclose(weights.sum(axis=1), 1)
    groups = factors(("forest", "sea", "other"), truth).values[0]
    assert len(set(groups)) == len(groups) == 4


def test_a_value_that_no_image_shows_makes_no_group():
    names = ("man", "woman", "child")
    assert factors(names, shown((0.8, 0.2, 0), (0.2, 0.8, 0)), noise=0.8).values == [["man", "woman"]]
    # A value that captions state alone is of the rest, never of another value.
    truth, ids = shown((0.8, 0.2, 0), (0.2, 0.8, 0)), np.repeat([0, 1], 600)
    ids[:100] = 2
    search = factors(names, truth, captions=("a person", "someone", "a person, child"), caption_ids=ids)
    assert search.values == [["man", "woman", REST]]
    assert (search.factors[0][0].weights[:100].argmax(axis=1) == 2).all()


def test_an_image_that_like_values_claim_is_of_the_one_that_it_looks_most_like():
    look = [[1, 0, 0.1], [0, 1, 0.8]]
    truth = shown((0.9, 0.1), (0.1, 0.9))
    search = factors(("forest", "sea", "lake"), truth, noise=0.1, look=look)
    assert search.values == [["forest", "sea"]]  # no image shows a lake
    weights = np.concatenate([search.factors[0][prompt].weights for prompt in (0, 1)])
    assert (weights[np.arange(1200), truth] > 0.95).all()


def test_what_no_value_claims_under_a_prompt_is_of_the_value_that_it_shows_under_another():
    look = [[1, 0, 0], [0, 1, 0], [0.9, 0, 1]]
    truth = shown((0.9, 0.1, 0), (0.9, 0, 0.1))
    search = factors(("forest", "sea", "city"), truth, noise=0.12, look=look)
    assert search.values == [["forest", "sea", "city"]]
    second = search.factors[0][1]
    assert second.candidate.shares == pytest.approx([0.9, 0, 0.1], abs=0.01)
    assert second.intervals[1] == (0.0, pytest.approx(1.96**2 / 604, abs=1e-4))  # Wilson's, of none in 600


def test_what_is_not_found_has_its_reason():
    for truth, noise, refusal in (
        (shown((0.5, 0.5), (0.5, 0.5)), 0.5, "the groups are even"),
        (shown((0.9, 0.1), (0.1, 0.9)), 4.0, "the groups overlap too much to part them"),
        (shown((1.0, 0.0), (1.0, 0.0)), 0.5, "nearly all look more like 'land'"),
    ):
        search = factors(("land", "water"), truth, noise)
        assert search.factors == []
        assert [candidate.refusal for of in search.candidates.values() for candidate in of] == [refusal] * 2


def test_images_whose_captions_state_a_value_have_that_group_and_are_not_judged():
    truth = shown((0.9, 0.1), (0.1, 0.9))
    ids = np.repeat([0, 1], 600)
    ids[:100], truth[:100] = 2, 1  # they look like water and say so
    search = factors(("land", "water"), truth, captions=("a dog", "a cat", "a dog on water"), caption_ids=ids)
    assert (search.names, search.values) == (["what"], [["land", "water"]])
    groups = np.concatenate([search.factors[0][prompt].weights.argmax(axis=1) for prompt in (0, 1)])
    assert (groups == truth).mean() > 0.99
    assert [search.candidates[prompt][0].refusal for prompt in (0, 1)] == ["", ""]
    assert search.words == {0: {"land": 0, "water": 1}}
    assert (search.factors[0][0].weights[:100] == [0, 1]).all()
    assert search.candidates[0][0].shares[1] == pytest.approx(60 / 500, abs=0.01)
    stated = factors(("dog", "cat"), truth)
    assert stated.factors == []
    assert "captions state" in stated.candidates[0][0].refusal


def run(pipe, folder, cache, ask=PLACE):
    return audit(pipe, load_captioned_images(folder), ask=ask, config=CONFIG, cache_dir=cache, progress=False)


def test_the_audited_model_reads_each_image_for_each_value_once_and_says_so(tiny_pipe, tiny_folder, tmp_path):
    calls = []
    tiny_pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    spent, audits = [], []
    for ask in ((), (), PLACE, PLACE):
        audits.append(run(tiny_pipe, tiny_folder, tmp_path / "cache", ask=ask))
        spent.append(sum(calls))
        calls.clear()
    _, plain, found, again = audits
    assert plain.forwards_per_image == pytest.approx(spent[0] / 12, abs=1e-3)
    assert spent[2:] == [spent[1] + 2 * FORWARDS * 12, spent[1]]  # what was read is kept
    assert found.forwards_per_image == plain.forwards_per_image + 2 * FORWARDS
    assert again.fingerprint == found.fingerprint
    assert found.settings["asked"] == {"ask": {"place": {"values": ["land", "water"], "reader": "the audited model"}}}
    told = "Groups were asked for, not sought: the audited model read the images for place (land, water)."
    assert found.asked == told
    assert "asked" not in plain.settings
    assert json.loads((found.save(tmp_path / "audit") / "audit.json").read_text())["settings"]["asked"]


def test_the_model_reads_all_images_of_a_prompt_under_its_usual_caption_that_states_no_value(tiny_pipe, monkeypatch):
    texts, captions = [], ["a bird on land", "a bird", "one bird", "a wet bird", "a cat"]
    data = made_up_data(captions, np.repeat([0, 1, 2, 3, 4], [9, 3, 5, 5, 1]))
    monkeypatch.setattr(asking, "in_shards", lambda _, made_of, label, measure, *rest, **options: [measure(rest[2])])
    monkeypatch.setattr(asking, "encode_captions", lambda pipe, own: texts.append(own) or {})
    monkeypatch.setattr(asking, "paired_losses", lambda denoiser, latents, *rest: torch.rand(len(latents), 5, 2, 2))
    data = replace(data, latents=torch.zeros(23, 4, 8, 8))
    options = {"work_dir": None, "progress": False}
    asking.read_by_model(tiny_pipe, None, data, np.array([0, 0, 0, 0, 1]), PLACE, CONFIG, **options)
    assert texts == [[f"one bird, {value}", f"a cat, {value}"] for value in ("land", "water")]


def test_many_attributes_are_first_read_in_some_images(tiny_pipe, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "FIRST", 2)
    even = [[[0.0, 1.0], [1.0, 0.0]]]
    monkeypatch.setattr(asking, "_likelier", lambda losses: np.tile(even, (1, len(losses) // 2, 1)))
    many = {f"attribute {number}": ("a", "b") for number in range(9)}
    plain = run(tiny_pipe, tiny_folder, tmp_path, ask=())
    found = run(tiny_pipe, tiny_folder, tmp_path, ask=many)
    assert found.forwards_per_image - plain.forwards_per_image == pytest.approx(9 * 2 * FORWARDS * 2 / 12)
    assert not found.biased
    assert "which look even in the first 2 images" in found.prompts[0].reason


def test_a_clip_model_reads_by_cosine_with_no_forwards(tiny_pipe, data, clip_dir, tmp_path):
    shown, pictures, encoder = birds(("sea",), ("forest",))
    rows = np.arange(len(pictures.names))
    (read,) = read_by_clip(encoder, pictures, rows, {"place": ("forest", "sea")}, cache_dir=tmp_path, progress=False)
    assert (read.scores[0].argmax(axis=1) == on_water(shown)).mean() > 0.95
    config = replace(CONFIG, words_model=str(clip_dir))
    found = audit(tiny_pipe, data, ask=PLACE, config=config, cache_dir=tmp_path, progress=False)
    assert found.settings["asked"]["ask"]["place"]["reader"] == "tiny-clip"
    assert found.forwards_per_image < 2 * FORWARDS


def test_a_model_that_reads_no_captions_cannot_be_asked(tiny_folder, tmp_path):
    with pytest.raises(AuditError, match="words_model"):
        run(make_ddpm(), tiny_folder, tmp_path)
