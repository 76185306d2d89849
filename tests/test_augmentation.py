"""The augmentation test: ways to train a classifier on biased features, and the accuracy of groups."""

import json

import augmentation
import numpy as np
import pytest
from sklearn.metrics import recall_score


@pytest.fixture(scope="module")
def biased():
    """Two features, subject and place, of which place is the plainer; they agree in 95% of 1,000 images."""
    return draw(1000, 0.95, seed=0)


def draw(count, agreement, seed):
    numbers = np.random.default_rng(seed)
    subjects = numbers.integers(2, size=count)
    places = np.where(numbers.random(count) < agreement, subjects, 1 - subjects)
    features = np.stack([2 * subjects - 1, 4 * places - 2], axis=1) + numbers.normal(0, 0.7, (count, 2))
    return augmentation.Images(features, subjects, np.ones(count)), 2 * subjects + places


def worst(model):
    images, groups = draw(4000, 0.5, seed=1)
    return augmentation.group_figures(model.predict(images.features) == images.subjects, groups)["worst"]


def test_group_dro_and_even_weights_raise_the_worst_group_and_equal_losses_are_its_optimum(biased):
    images, groups = biased
    erm = augmentation.fit(images, 0.01)
    dro = augmentation.group_dro(images, groups, 0.01)
    balanced = augmentation.fit(images, 0.01, augmentation.even(images.subjects, np.eye(2)[groups % 2]))
    assert worst(erm) < 0.7
    assert worst(dro) > worst(erm) + 0.15
    assert worst(balanced) > worst(erm) + 0.15
    losses = -np.log(dro.predict_proba(images.features)[np.arange(1000), images.subjects])
    by_group = np.bincount(groups, losses) / np.bincount(groups)
    assert by_group.max() < by_group.mean() + 0.02


def test_jtt_weighs_what_a_classifier_errs_on(biased):
    images, groups = biased
    weights = augmentation.jtt_weights(images, 3.0, 20.0)
    contradict = np.isin(groups, (1, 2))
    assert set(weights) == {1.0, 20.0}
    assert (weights[contradict] == 20).mean() > 0.9
    assert (weights[~contradict] == 20).mean() < 0.05
    assert worst(augmentation.fit(images, 0.01, weights)) > worst(augmentation.fit(images, 0.01)) + 0.1


def test_group_figures_are_recalls_and_those_of_a_perfect_classifier_are_one():
    numbers = np.random.default_rng(3)
    groups, right = numbers.choice(["a", "b", "c"], 400), numbers.random(400) < 0.7
    found = augmentation.group_figures(right, groups)
    recalls = recall_score(groups, np.where(right, groups, "none"), labels=["a", "b", "c"], average=None)
    assert list(found["groups"].values()) == pytest.approx(recalls.tolist())
    assert found["low"] < found["worst"] == recalls.min() < found["high"]
    perfect = augmentation.group_figures(np.ones(400, bool), groups)
    assert {perfect[name] for name in ("accuracy", "worst", "low", "high")} == {1.0}


def test_settings_are_chosen_by_the_worst_validation_group_and_tables_give_means_over_seeds(biased, tmp_path):
    validation, groups = draw(1000, 0.95, seed=2)
    images = validation.features, validation.subjects
    groupings = {"true": groups, "average": np.zeros(1000)}
    models = {"even": biased[1] >= 0, "biased": biased[1] % 3 == 0}
    candidates = [(name, augmentation.fit(biased[0], 0.01, np.where(of, 1.0, 1e-6))) for name, of in models.items()]
    found = augmentation.chosen(iter(candidates), images, groupings, images, groups)
    assert found["true"]["settings"] == "even"
    assert found["average"]["accuracy"] >= found["true"]["accuracy"]
    (tmp_path / "augmentation").mkdir()
    for seed, value in ((0, 0.5), (1, 0.7)):
        ways = {key: {"accuracy": value, "worst": value / 2} for key in ("audit", "true", "average")}
        figures = {"figures": {"biased images": {"given": "none", "chosen by": ways}}}
        (tmp_path / "augmentation" / f"waterbirds-seed-{seed}.json").write_text(json.dumps(figures))
    assert "| biased images | none | 0.600 | 0.300 (0.250 to 0.350) |" in augmentation.table(tmp_path)
