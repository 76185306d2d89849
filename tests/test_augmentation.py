import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, recall_score

from invdiff.errors import ConfigError, DataError, EvaluationError, TrainingError
from invdiff.evaluation import augmentation
from invdiff.evaluation.annotators.labelled import load_labelled_images
from invdiff.evaluation.augmentation import AugmentationConfig, augmentation_test
from invdiff.evaluation.augmentation_results import group_accuracy

CLASSES, COLOURS = ("cat", "dog"), {"red": (230, 40, 40), "blue": (40, 40, 230)}
ACCIDENT = dict(zip(CLASSES, COLOURS, strict=True))
FAST = AugmentationConfig(steps=60, batch_size=32, resolution=16)
INSTANT = AugmentationConfig(steps=1, batch_size=4, resolution=8)


def picture(subject, colour, numbers):
    """The left half is dark or bright, faintly; the right half has a colour, plainly."""
    level = numbers.normal(110 if subject == "cat" else 150, 10)
    pixels = numbers.normal(level, 25, (16, 16, 3))
    pixels[:, 8:] = np.array(COLOURS[colour]) + numbers.normal(0, 25, (16, 8, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_model(folder, *, per_subject=100, agreement=1.0, seed=0, prompt="a photo of a {}", **columns):
    """Write generated images; subject and colour agree in `agreement`. `per_subject` may differ by subject."""
    folder.mkdir(parents=True)
    numbers, lines = np.random.default_rng(seed), []
    for subject, count in zip(CLASSES, np.broadcast_to(per_subject, 2), strict=True):
        for index in range(count):
            other = next(colour for colour in COLOURS if colour != ACCIDENT[subject])
            colour = ACCIDENT[subject] if index < agreement * count else other
            name = f"{subject}-{index}.png"
            picture(subject, colour, numbers).save(folder / name)
            lines.append(json.dumps({"file_name": name, "prompt": prompt.format(subject)} | columns))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_test(folder, sizes, *, seed=9):
    """Write labelled images from (subject, colour) to number."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(seed)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "subject", "colour"])
        for (subject, colour), count in sizes.items():
            for index in range(count):
                picture(subject, colour, numbers).save(folder / f"{subject}-{colour}-{index}.png")
                table.writerow([f"{subject}-{colour}-{index}.png", subject, colour])
    return load_labelled_images(folder)


def grid(count):
    return {(subject, colour): count for subject in CLASSES for colour in COLOURS}


def run(folders, data, **settings):
    settings = {"config": FAST, "seeds": (0,), "progress": False} | settings
    return augmentation_test(folders, data, subject_attribute="subject", attribute="colour", **settings)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base", agreement=0.97, seed=1)


@pytest.fixture(scope="module")
def fair(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "guided", agreement=0.5, seed=2)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    return write_test(tmp_path_factory.mktemp("test") / "balanced", grid(30))


@pytest.fixture(scope="module")
def results(biased, fair, balanced):
    return run({"base": biased, "guided": fair}, balanced, seeds=(0, 1))


def test_the_worst_group_is_far_worse_when_the_images_carry_the_accident(results):
    base, guided = results.models["base"], results.models["guided"]
    assert base.worst_accuracy.mean < guided.worst_accuracy.mean - 0.3
    assert guided.worst_accuracy.mean > 0.8


def test_the_worst_group_contradicts_the_accident(results):
    assert results.models["base"].worst_group in ("cat x blue", "dog x red")


def test_every_model_trains_on_the_smallest_number_that_any_model_has_of_any_subject(tmp_path, balanced):
    folders = {
        "base": write_model(tmp_path / "base", per_subject=(20, 14)),
        "guided": write_model(tmp_path / "guided", per_subject=(12, 30)),
    }
    results = run(folders, balanced, config=INSTANT)
    numbers = {"cat": 12, "dog": 12}
    assert [model.train_images for model in results.models.values()] == [numbers, numbers]


def test_seeds_draw_other_images_and_models_the_same_places():
    labels = np.repeat([0, 1], 50)
    first, again, other = (augmentation._draw(labels, 20, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(set(first)) == 40
    assert np.bincount(labels[first]).tolist() == [20, 20]


def test_all_training_images_are_drawn_alike_and_by_subject_alone(monkeypatch, biased, balanced):
    seen = []
    monkeypatch.setattr(augmentation, "train_network", lambda *args, **options: seen.append((args[3], options)))
    run(biased, balanced)
    targets, options = seen[0]
    assert torch.unique(options["weights"]).tolist() == [1]
    assert targets[options["rows"]].flatten().tolist() == [0] * 100 + [1] * 100


def test_the_tests_attribute_decides_on_groups_and_on_nothing_else(results, biased, tmp_path):
    shuffled = write_test(tmp_path / "test", grid(30))
    np.random.default_rng(0).shuffle(shuffled.attributes["colour"])
    changed = run({"base": biased}, shuffled).models["base"].by_seed["0"]
    assert changed.accuracy == results.models["base"].by_seed["0"].accuracy
    assert changed.groups != results.models["base"].by_seed["0"].groups


def test_a_seed_gives_the_same_result_whatever_the_other_models_and_seeds(results, fair, balanced):
    again = run({"guided": fair}, balanced, seeds=(1,)).models["guided"]
    assert again.by_seed["1"] == results.models["guided"].by_seed["1"]


def test_the_global_generator_is_left_alone(biased, balanced):
    before = torch.random.get_rng_state()
    run(biased, balanced, config=INSTANT)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_group_figures_are_those_worked_out_by_hand():
    groups = ["a"] * 10 + ["b"] * 20 + ["c"] * 5
    right = [True] * 8 + [False] * 2 + [True] * 15 + [False] * 5 + [False] * 5
    measured = group_accuracy(right, groups)
    assert measured.groups == {"a": 0.8, "b": 0.75}
    assert measured.accuracy == pytest.approx(23 / 35)
    assert measured.group_mean == pytest.approx(0.775)
    assert (measured.worst_group, measured.worst_accuracy) == ("b", 0.75)
    assert measured.worst_interval == pytest.approx((0.5313, 0.8881), abs=1e-4)  # Wilson, 15 of 20


def test_group_figures_agree_with_scikit_learn():
    numbers = np.random.default_rng(3)
    groups, right = numbers.choice(["a", "b", "c", "d"], 400), numbers.random(400) < 0.7
    measured = group_accuracy(right, groups.tolist())
    # Recall of a group, where a wrong image is predicted to be of no group.
    predicted = np.where(right, groups, "none")
    recalls = recall_score(groups, predicted, labels=["a", "b", "c", "d"], average=None)
    assert list(measured.groups.values()) == pytest.approx(recalls.tolist())
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        mean = balanced_accuracy_score(groups, predicted)
    assert measured.group_mean == pytest.approx(mean)


def test_means_and_deviations_over_seeds_are_those_of_numpy(results):
    base = results.models["base"]
    fits = list(base.by_seed.values())
    for name in ("accuracy", "group_mean", "worst_accuracy"):
        values = [getattr(fit, name) for fit in fits]
        spread = getattr(base, name)
        assert (spread.mean, spread.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert base.groups["cat x red"].mean == pytest.approx(np.mean([fit.groups["cat x red"] for fit in fits]))


def test_a_single_seed_has_no_deviation(biased, balanced):
    assert run(biased, balanced, config=INSTANT).models["base"].accuracy.sd is None


def test_the_interval_is_wilsons_of_the_group_that_is_worst_on_average(results):
    base = results.models["base"]
    mean = base.groups[base.worst_group].mean
    assert mean == min(spread.mean for spread in base.groups.values())
    expected = binomtest(round(30 * mean), 30).proportion_ci(method="wilson")
    assert base.worst_interval == pytest.approx((expected.low, expected.high))


def test_a_balanced_test_set_makes_accuracy_the_mean_over_groups(results):
    fit = results.models["guided"].by_seed["1"]
    assert fit.accuracy == pytest.approx(fit.group_mean)


def test_groups_under_ten_images_are_left_out_and_said_so(biased, tmp_path):
    small = write_test(tmp_path / "test", grid(12) | {("dog", "red"): 9})
    results = run(biased, small, config=INSTANT)
    assert results.test_images == {"cat x red": 12, "cat x blue": 12, "dog x blue": 12}
    assert results.notes == ("dog x red is left out of groups: 9 test images, fewer than 10",)


def test_a_test_set_as_biased_as_the_images_is_refused(biased, tmp_path):
    data = write_test(tmp_path / "test", {("cat", "red"): 20, ("dog", "blue"): 20})
    with pytest.raises(EvaluationError, match="got 0 of cat x blue, 0 of dog x red"):
        run(biased, data)


def test_real_images_train_a_classifier_alone_and_beside_each_models(biased, fair, balanced, tmp_path):
    train = write_test(tmp_path / "real", {("cat", "red"): 70, ("dog", "blue"): 60})
    results = run({"base": biased, "guided": fair}, balanced, train=train)
    assert {name: model.train_images for name, model in results.models.items()} == {
        "real": {"cat": 70, "dog": 60},
        "base": {"cat": 100, "dog": 100},
        "real + base": {"cat": 170, "dog": 160},
        "guided": {"cat": 100, "dog": 100},
        "real + guided": {"cat": 170, "dog": 160},
    }
    worst = {name: model.worst_accuracy.mean for name, model in results.models.items()}
    assert worst["real + guided"] > max(worst["real"], worst["real + base"])
    assert results.models["real"].guidance_scale == ""


def test_real_images_of_other_subjects_are_refused(biased, balanced, tmp_path):
    train = write_test(tmp_path / "real", {("cat", "red"): 10, ("dog", "blue"): 10})
    train.attributes["subject"][0] = "horse"
    with pytest.raises(EvaluationError, match="got cat, dog, horse"):
        run(biased, balanced, train=train)


def test_a_model_named_real_beside_real_images_is_refused(biased, balanced):
    with pytest.raises(EvaluationError, match="other names than 'real'"):
        run({"real": biased}, balanced, train=balanced)


def test_prompts_that_name_no_subject_are_left_out_and_said_so(biased, balanced, tmp_path):
    extra = write_model(tmp_path / "extra", per_subject=10, prompt="a photo of a pet")
    results = run({"base": [biased, extra]}, balanced, config=INSTANT)
    assert results.models["base"].train_images == {"cat": 100, "dog": 100}
    assert results.notes == ("1 of 3 prompts name no subject, first 'a photo of a pet': their 20 images are left out",)


def test_images_without_any_subject_are_refused(balanced, tmp_path):
    folder = write_model(tmp_path / "base", prompt="a photo of a pet")
    with pytest.raises(EvaluationError, match="name one of cat, dog, got 'a photo of a pet'"):
        run(folder, balanced)


def test_a_mapping_names_the_subjects(balanced, tmp_path):
    folder = write_model(tmp_path / "base", per_subject=10, prompt="{}ty")
    results = run(folder, balanced, config=INSTANT, subject_of={"catty": "dog", "dogty": "cat"})
    assert results.models["base"].train_images == {"cat": 10, "dog": 10}


def test_a_mapping_to_an_unknown_subject_is_refused(biased, balanced):
    with pytest.raises(EvaluationError, match="one of cat, dog as the subject of 'x', got 'horse'"):
        run(biased, balanced, subject_of={"x": "horse"})


@pytest.mark.parametrize("count", [0, 9])
def test_a_subject_of_the_test_that_is_hardly_generated_is_named(balanced, tmp_path, count):
    folder = write_model(tmp_path / "base", per_subject=(20, count))
    with pytest.raises(EvaluationError, match=f"at least 10 images of 'dog'.* got {count}"):
        run(folder, balanced)


def test_models_of_other_prompts_are_refused(biased, balanced, tmp_path):
    other = write_model(tmp_path / "guided", prompt="one {}")
    with pytest.raises(EvaluationError, match="images of the same prompts"):
        run({"base": biased, "guided": other}, balanced)


def test_one_of_several_guidance_scales_is_used(balanced, tmp_path):
    low = write_model(tmp_path / "low", per_subject=10, guidance_scale=1)
    high = write_model(tmp_path / "high", per_subject=15, guidance_scale=3)
    results = run({"base": [low, high]}, balanced, config=INSTANT, guidance_scale=3)
    assert results.models["base"].guidance_scale == "3.0"
    assert results.models["base"].train_images == {"cat": 15, "dog": 15}


def test_several_guidance_scales_are_never_mixed(balanced, tmp_path):
    low = write_model(tmp_path / "low", per_subject=10, guidance_scale=1)
    high = write_model(tmp_path / "high", per_subject=10, guidance_scale=3)
    with pytest.raises(EvaluationError, match=r"found 1\.0, 3\.0\. Choose guidance_scale"):
        run({"base": [low, high]}, balanced)


def test_an_absent_guidance_scale_is_refused(biased, balanced):
    with pytest.raises(EvaluationError, match=r"guidance scale 3\.0, found unstated"):
        run(biased, balanced, guidance_scale=3)


def test_a_comparison_across_guidance_scales_is_said_to_be_one(balanced, tmp_path):
    low = write_model(tmp_path / "low", per_subject=10, guidance_scale=1)
    high = write_model(tmp_path / "high", per_subject=10, guidance_scale=3)
    results = run({"base": low, "guided": high}, balanced, config=INSTANT)
    assert results.notes == ("models are compared at different guidance scales: {'base': '1.0', 'guided': '3.0'}",)


def test_an_unknown_column_is_named(biased, balanced):
    with pytest.raises(EvaluationError, match="test images do not do: Expected attribute 'age'"):
        augmentation_test(biased, balanced, subject_attribute="subject", attribute="age")


def test_a_missing_label_is_refused(biased, tmp_path):
    data = write_test(tmp_path / "test", grid(10))
    data.attributes["colour"][3] = float("nan")
    with pytest.raises(EvaluationError, match="found none for 1 of 40"):
        run(biased, data)


def test_a_test_of_one_subject_is_refused(biased, tmp_path):
    data = write_test(tmp_path / "test", {("cat", "red"): 10, ("cat", "blue"): 10})
    with pytest.raises(EvaluationError, match="to have 2 to 50 classes, found 1"):
        run(biased, data)


def test_one_attribute_for_both_is_refused(biased, balanced):
    with pytest.raises(EvaluationError, match="Expected two attributes"):
        augmentation_test(biased, balanced, subject_attribute="subject", attribute="subject")


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_different_and_at_least_one(biased, balanced, seeds):
    with pytest.raises(EvaluationError, match="Expected different seeds"):
        run(biased, balanced, seeds=seeds)


def test_unreadable_test_images_are_left_out_and_said_so(biased, tmp_path):
    write_test(tmp_path / "test", grid(12))
    (tmp_path / "test" / "cat-red-0.png").write_bytes(b"no image")
    data = load_labelled_images(tmp_path / "test", max_unreadable=0.1)
    results = run(biased, data, config=INSTANT)
    assert results.test_images["cat x red"] == 11
    assert results.notes == ("1 of 48 test images cannot be read and are left out",)


def test_too_many_unreadable_test_images_stop_the_work(biased, tmp_path):
    data = write_test(tmp_path / "test", grid(12))
    (tmp_path / "test" / "cat-red-0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="images to be unreadable"):
        run(biased, data)


def test_a_damaged_generated_image_is_named(balanced, tmp_path):
    folder = write_model(tmp_path / "base", per_subject=10)
    (folder / "dog-3.png").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"dog-3\.png"):
        run(folder, balanced)


def test_a_classifier_that_diverges_is_no_result(biased, balanced):
    config = AugmentationConfig(steps=5, batch_size=8, resolution=8, learning_rate=1e30)
    with pytest.raises(TrainingError, match="Lower learning_rate"):
        run(biased, balanced, config=config)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"resolution": 7}, {"learning_rate": 0.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AugmentationConfig(**wrong)


@pytest.mark.parametrize("right", [[0.0, 1.0], [True], [[True], [False]], [float("nan"), 1.0]])
def test_what_is_not_true_or_false_for_each_image_is_refused(right):
    with pytest.raises(EvaluationError, match="true or false for each of 2 images"):
        group_accuracy(right, ["a", "b"])


def test_groups_that_are_all_small_have_no_figures():
    with pytest.raises(EvaluationError, match="a group of at least 10 images"):
        group_accuracy([True, False], ["a", "b"])


def test_the_file_holds_what_the_results_say(results, tmp_path):
    results.save(tmp_path / "augmentation.json")
    saved = json.loads((tmp_path / "augmentation.json").read_text())
    assert saved == json.loads(json.dumps(results.to_dict()))
    assert saved["models"]["guided"]["worst_accuracy"]["mean"] == results.models["guided"].worst_accuracy.mean
    assert saved["test_images"] == {f"{subject} x {colour}": 30 for subject in CLASSES for colour in COLOURS}
