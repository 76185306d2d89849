"""Groups that a user asks for: by a column of the data, or by a few labels."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from conftest import write_tiny_folder
from invdiff import Audit, AuditConfig, TrainConfig, audit, load_captioned_images, train
from invdiff.auditing.asked import Asked, labels_asked
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.evidence import Evidence
from invdiff.auditing.probe import spread_labels
from invdiff.auditing.result import PromptSplit
from invdiff.auditing.run import infer
from invdiff.auditing.scores import Margins
from invdiff.auditing.splits import given_factors
from invdiff.errors import AuditError, ConfigError, DataError
from invdiff.evaluation.fairness.intervals import share_interval
from invdiff.report.read import splits_of
from runs import made_up_data, report, sharded
from test_cli import succeed
from tiny import CAPTIONS

pytestmark = pytest.mark.usefixtures("plain")

SMALL, EXACT = AuditConfig(min_images=4), AuditConfig(solver="exact")
VALUES = ["land", "water", "land", "water", "water", "land", "", "water", "land", "land"] * 2
"""Of 20 images, two of them not labelled."""


def write_labelled_folder(folder):
    """Write 20 images of noise of two captions with a column `place`."""
    write_tiny_folder(folder, 20)
    rows = [f"{index:02d}.png,{CAPTIONS[index % 2]},{value}" for index, value in enumerate(VALUES)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,place", *rows]))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_labelled_folder(tmp_path / "data")


def test_a_column_that_is_asked_for_is_the_factor_and_trains_as_the_same_groups_do(tiny_pipe, folder, tmp_path):
    data, options = load_captioned_images(folder), {"cache_dir": tmp_path / "cache", "progress": False}
    found = audit(tiny_pipe, data, attribute="place", config=SMALL, **options)
    assert [factor.name for factor in found.factors] == ["place"]
    assert found.group_names == (("land", "water"),)
    expected = {"land": [1, 0], "water": [0, 1], "": [0.5, 0.5]}
    assert found.group_weights[0].tolist() == [expected[value] for value in VALUES]
    assert "column “place”" in found.asked
    assert Audit.load(found.save(tmp_path / "audit")).asked == found.asked
    unnamed = [replace(factor, name="factor 1", values=[]) for factor in found.factors]
    same = replace(found, factors=unnamed, settings={k: v for k, v in found.settings.items() if k != "asked"})
    written = []
    for name, one in (("asked", found), ("found", same)):
        train(tiny_pipe, data, one, tmp_path / name, config=TrainConfig(steps=2, batch_size=4, preserve=0), **options)
        written.append((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes())
    assert written[0] == written[1]
    assert "they are the values of the column" in (tmp_path / "asked" / "README.md").read_text()
    assert "without labels" in (tmp_path / "found" / "README.md").read_text()


def test_what_is_asked_for_wrongly_is_told_before_the_work(tiny_pipe, folder, tmp_path):
    data, words = load_captioned_images(folder), "place: land, water"
    for asked, error, message in (
        ({"attribute": "gender"}, DataError, "'gender' in the data, found place"),
        ({"labels": {"place": {"00.png": "land"}}}, DataError, "4 more of land"),
        ({"attribute": ["place", "place"]}, ConfigError, "in one way, once, got 'place' again"),
        ({"attribute": "place", "ask": words}, ConfigError, "in one way, once, got 'place' again"),
        ({"attribute": "place", "config": EXACT}, ConfigError, "solver 'auto'"),
        ({"ask": words, "config": EXACT}, ConfigError, "solver 'auto'"),
    ):
        with pytest.raises(error, match=message):
            audit(tiny_pipe, data, **{"config": SMALL, "cache_dir": tmp_path / "cache", **asked})
    assert not (tmp_path / "cache").exists()


def test_values_that_are_rare_under_a_prompt_are_no_group_there():
    labels = np.repeat([0, 1, 2, 3, 0, 1], [50, 46, 4, 0, 99, 1])
    asked = Asked("age", ["a", "b", "c", "d"], np.eye(4)[labels], "the column 'age'")
    members = {0: np.arange(100), 1: np.arange(100, 200)}
    search = given_factors([asked], members, AuditConfig())
    assert (search.values, list(search.factors[0])) == ([["a", "b", "c"]], [0])
    assert search.candidates[1][0].refusal == "fewer than two values have 2.0% of its images, and 4 of them"
    search = given_factors([asked], members, AuditConfig(min_share=0.1))
    weights = search.factors[0][0].weights
    assert search.values == [["a", "b"]]
    assert weights[-4:].tolist() == [[0.5, 0.5]] * 4


def partly_labelled(*sizes, captions=CAPTIONS, prompt_of=(0, 1), **settings):
    """An audit of a column; each caption has images of these numbers on land, on water, and without a label."""
    labels, ids = np.repeat([0, 1, 2] * len(sizes), np.concatenate(sizes)), np.arange(len(sizes))
    ids, config = np.repeat(ids, np.sum(sizes, axis=1)), AuditConfig(**settings)
    asked = Asked("place", ["land", "water"], np.eye(3)[labels, :2], "the column 'place'")
    evidence = Evidence(np.zeros((len(ids), 1, 2, 2)), sharded(np.zeros((len(ids), 2, 1))))
    ways = {"asked": lambda judged: given_factors([asked], judged, config), "progress": False}
    return infer(made_up_data(list(captions), ids), evidence, np.array(prompt_of), config, **ways)


def test_images_without_a_label_count_in_no_share_and_no_group():
    found = partly_labelled((72, 8, 120), (100, 100, 0))
    assert found.split(0, 0).shares == [0.9, 0.1]
    assert found.split(0, 0).intervals[1] == tuple(round(end, 4) for end in share_interval(8, 80))
    assert "is known of 120 of 200 images" in " ".join(found.prompts[0].notes)
    assert not found.prompts[1].notes
    assert np.flatnonzero(found.rare()[:200]).tolist() == list(range(72, 80))
    assert [group.size for page in splits_of(found) for group in page.groups] == [72, 8, 100, 100]
    edited = apply(found, Edits().with_cuts(0, 0, [0.5]).without_images([0, 1, 199]))
    assert edited.split(0, 0).shares == [round(70 / 78, 4), round(8 / 78, 4)]
    assert (edited.group_weights[0][80:199] == 0.5).all()
    with pytest.raises(AuditError, match="of which place is known"):
        apply(found, Edits().without_images(range(80)))


def test_images_without_a_label_are_stated_by_no_caption():
    found = partly_labelled((36, 4, 60), (4, 36, 60))
    assert [split.shares for split in found.factors[0].splits] == [[0.9, 0.1], [0.1, 0.9]]
    stating = ["a bird on land", "a bird on water", "a bird", "one duck"]
    found = partly_labelled((50, 0, 0), (0, 50, 0), (0, 0, 90), (40, 40, 0), captions=stating, prompt_of=(0, 0, 0, 1))
    assert [found.prompts[split.prompt].prompt for split in found.factors[0].splits] == ["one duck"]
    silent = next(prompt for prompt in found.prompts if prompt.prompt == "a bird")
    assert silent.reason == "not split: nothing is known of its images"


def test_a_prompt_is_not_split_away_by_its_own_name():
    found = partly_labelled((1800, 200, 0), (1984, 16, 0), min_share=0.005)  # of 10% and .8%
    assert [(prompt.prompt, prompt.found) for prompt in found.prompts] == [(caption, True) for caption in CAPTIONS]


def test_what_every_caption_states_is_no_factor():
    found = partly_labelled((50, 0, 0), (0, 50, 0), captions=["a bird on land", "a bird on water"], prompt_of=(0, 0))
    reasons = [f"its captions state the group (words: {place})" for place in ("land", "water")]
    assert [prompt.reason for prompt in found.prompts] == reasons
    assert (found.factors, found.biased) == ([], False)
    assert (found.group_weights[0] == 0.5).all()
    with pytest.raises(AuditError, match="found none"):
        found.check_found()


def test_the_command_and_the_report_say_what_was_asked_for(tiny_pipe_dir, folder, tmp_path):
    rows = [f"{index:02d}.png,{VALUES[index]}" for index in range(14)]
    (tmp_path / "few.CSV").write_text("\n".join(["file_name,scene", *rows]))
    options = ("--output", tmp_path / "audit", "--min-images", 4, "--cache-dir", tmp_path / "cache", "-q")
    asked = ("--labels", tmp_path / "few.CSV", "--attribute", "place")
    shown = succeed("audit", tiny_pipe_dir, folder, *options, *asked)
    for words in ("Factors asked for", "water: ", "“scene” was learned from labels of few images"):
        assert words in shown
    found = Audit.load(tmp_path / "audit")
    assert found.settings["asked"]["labels"]["scene"]["images"] == {"land": 7, "water": 6}
    assert [factor.name for factor in found.factors] == ["place"]
    reason = "not split: by 13 labels, labels left out are not guessed better than by chance within a prompt"
    for prompt in found.prompts:  # pictures are noise
        assert any(reason in note for note in prompt.notes)
    page, text = report(tmp_path / "report", audit=tmp_path / "audit", data=load_captioned_images(folder))
    for words in (page.words, text):
        for said in ("they are the values of the column “place”", "--labels labels.csv", "--attribute place", "water"):
            assert said in words
        for measured in ("0.00", "Rand index with the truth at least", "10^"):  # nothing is, of groups that are given
            assert measured not in words


def labelled(per_cell=10, strength=4.0, seed=0):
    """Features (1600, 60) of two prompts with an attribute in 10% / 90%, the attribute, and labels drawn evenly."""
    rng, prompt = np.random.default_rng(seed), np.arange(1600) % 2
    truth = rng.random(1600) < np.where(prompt == 0, 0.1, 0.9)
    features = rng.normal(size=(1600, 60))
    features[:, 0] += strength * truth
    features[:, 1] += 1.5 * prompt
    labels = [""] * 1600
    for cell in range(4):
        for row in rng.permutation(np.flatnonzero(2 * prompt + truth == cell))[:per_cell]:
            labels[row] = ["no", "yes"][int(truth[row])]
    return features / features.std(axis=0), prompt, truth, labels


def test_few_labels_spread_to_all_images_at_the_shares_that_images_have():
    features, prompt, truth, labels = labelled()
    margins = Margins([features], prompt).of_pairs()
    asked = spread_labels("wet", labels, [features], margins, prompt)
    assert asked.values == ["no", "yes"]
    assert not asked.refusal
    assert asked.record["labels"]["wet"]["images"] == {"no": 20, "yes": 20}
    checked = asked.record["labels"]["wet"]
    assert sorted(checked["hits"] + checked["misses"]) == [row for row, label in enumerate(labels) if label]
    rest = np.array([not label for label in labels])
    for number, share in enumerate((0.1, 0.9)):
        own = prompt == number
        assert abs(asked.weights[own, 1].mean() - share) < 0.2  # and far from even
        assert roc_auc_score(truth[own & rest], asked.weights[own & rest, 1]) > 0.9
        alone = spread_labels("wet", labels, [features], margins[:, :0], prompt).weights
        assert roc_auc_score(truth[own & rest], alone[own & rest, 1]) < 0.85
    assert asked.weights[~rest, 1].tolist() == truth[~rest].tolist()


def test_labels_of_what_features_do_not_show_are_not_spread():
    features, prompt, _, labels = labelled(strength=0.0)
    asked = spread_labels("wet", labels, [features], np.zeros((1600, 0)), prompt)
    assert "not guessed better than by chance" in asked.refusal
    stated = [["no", "yes"][int(prompt[row] ^ (row < 2))] if row < 22 else "" for row in range(1600)]
    told = spread_labels("wet", stated, [features], np.zeros((1600, 0)), prompt).refusal
    assert int(told.removesuffix("% right, 50% by chance)")[-2:]) < 60  # where the prompt alone gives 20 of the 22
    search = given_factors([asked], {of: np.flatnonzero(prompt == of) for of in (0, 1)}, AuditConfig())
    assert not search.factors
    assert search.candidates[0][0].refusal == asked.refusal


def test_a_prompt_of_which_nobody_labelled_an_image_has_wide_intervals():
    features, prompt, _, labels = labelled()
    prompt[labels.index("")] = 2
    asked = spread_labels("wet", labels, [features], np.zeros((1600, 0)), prompt)
    assert not asked.refusal
    assert asked.intervals[2][0] == pytest.approx((0, 1), abs=0.1)


def test_copies_of_labelled_images_prove_nothing():
    rng = np.random.default_rng(0)
    features, prompt = np.repeat(rng.normal(size=(400, 60)), 2, axis=0), np.repeat([0, 1], 400)
    labels = [""] * 800
    for row in (*range(0, 40, 2), *range(400, 440, 2)):
        labels[row] = labels[row + 1] = ["no", "yes"][int(rng.random() < 0.5)]
    margins = np.zeros((800, 0))
    assert not spread_labels("wet", labels, [features], margins, prompt).refusal
    asked = spread_labels("wet", labels, [features], margins, prompt, np.arange(800) % 2 == 0)
    assert "not guessed better than by chance" in asked.refusal
    assert (asked.weights[np.array([bool(label) for label in labels])].max(axis=1) == 1).all()


def test_intervals_of_shares_count_how_labels_left_out_are_mistaken():
    covered = []
    for seed in range(12):
        features, prompt, truth, labels = labelled(strength=2.0, seed=seed)
        asked = spread_labels("wet", labels, [features], Margins([features], prompt).of_pairs(), prompt)
        search = given_factors([asked], {of: np.flatnonzero(prompt == of) for of in (0, 1)}, AuditConfig())
        for of, cut in (search.factors[0] if search.factors else {}).items():
            (low, high), share = cut.intervals[1], truth[prompt == of].mean()
            covered.append(low <= share <= high)
    assert np.mean(covered) >= 0.9  # 0.4 of them where the errors are not counted


def test_shares_of_a_part_of_a_prompt_are_as_unsure_as_those_of_all():
    known = np.repeat([[1.0, 0.0], [0.0, 1.0]], [80, 20], axis=0)
    unsure = np.repeat([[0.9, 0.1], [0.6, 0.4]], [80, 20], axis=0)
    split = PromptSplit(0, "40 labels", [0.84, 0.16], [(0.5, 1.0), (0.0, 0.5)], 0.0, 1.0, 1.0, 0.0)
    assert split.with_shares_of(known).intervals[1] == pytest.approx(share_interval(20, 100), abs=1e-4)
    assert np.allclose(split.with_shares_of(unsure).intervals, [(0.5, 1.0), (0.0, 0.5)], atol=1e-3)
    low, high = replace(split, intervals=[]).with_shares_of(unsure).intervals[1]
    assert low < share_interval(16, 100)[0]
    assert high > share_interval(16, 100)[1]


def test_labels_must_be_of_the_images_and_enough():
    for given, message in (
        ({"x.png": "a", **{f"{i}.png": "ab"[i % 2] for i in range(12)}}, r"found 1 of 13 names .* such as 'x.png'"),
        ({f"{i}.png": "a" for i in range(12)}, r"two values of 'age' or more, .* found a \(12\)"),
        ({f"{i}.png": "ab"[i > 7] for i in range(12)}, r"5 images each or more, found a \(8\), b \(4\)"),
    ):
        with pytest.raises(DataError, match=message):
            labels_asked({"age": given}, [f"{i}.png" for i in range(12)])
    with pytest.raises(DataError, match="attribute to image to value"):
        labels_asked({"0.png": "a", "1.png": "b"}, ["0.png", "1.png"])


def test_labels_drawn_evenly_do_not_make_even_shares():
    features, prompt, _, labels = labelled(strength=2.0)
    asked = spread_labels("wet", labels, [features], Margins([features], prompt).of_pairs(), prompt)
    low, high = (asked.weights[prompt == number, 1].mean() for number in (0, 1))
    assert low < 0.35  # 0.39 and 0.64 as the labels alone would have it; in truth 0.10 and 0.90
    assert high > 0.69


def test_the_only_image_of_a_prompt_has_no_margin():
    prompt = np.array([0] * 20 + [1] * 20 + [2])
    margins = Margins([np.random.default_rng(0).normal(size=(41, 5)) + prompt[:, None]], prompt).of_pairs()
    assert np.isfinite(margins).all()
    assert not margins[-1].any()
