from collections import Counter

import numpy as np
import pytest
from birds import explicit_prompts, held_out_prompts

from conftest import contents
from invdiff import Audit, DemoConfig, load_captioned_images, load_guidance, load_pipeline
from invdiff.assets import BIRDS_DEMO, BIRDS_MODEL
from invdiff.data.birds import BACKGROUNDS, NATURAL_BACKGROUND, SUBJECTS, BirdsWorld, canonical_prompts
from invdiff.data.birds.drawing import Scene
from invdiff.data.birds.world import TRAINING_TEMPLATES
from invdiff.errors import ConfigError, DataError
from invdiff.files import read_json
from invdiff.guidance.attach import check_fit

ROWS = BirdsWorld(4000, seed=1).metadata()


def four_sigma(probability: float, count: int) -> float:
    return 4 * (probability * (1 - probability) / count) ** 0.5


def test_rows_follow_from_the_seed_whatever_the_number_of_images_and_are_those_that_would_be_read_back(tmp_path):
    short, long, other = (BirdsWorld(count, seed=seed).captioned() for count, seed in ((7, 3), (300, 3), (300, 4)))
    read = load_captioned_images(BirdsWorld(7, seed=3).write(tmp_path))
    for field in ("names", "captions", "attributes", "fingerprint"):
        assert getattr(short, field) == getattr(read, field) == getattr(long.select(range(7)), field)
    assert long.captions != other.captions
    assert short.image(0).size == (64, 64)


@pytest.mark.parametrize(
    "settings", [{"severity": 0.0}, {"severity": 0.5}, {"severity": 0.95}, {"severity": 0.85, "world": "one-prompt"}]
)
def test_the_background_agrees_with_the_subject_as_often_as_asked(settings):
    world = BirdsWorld(2000, **settings)
    rows = world.metadata()
    found = np.mean([NATURAL_BACKGROUND[row["subject"]] == row["background"] for row in rows])
    assert abs(found - world.severity) <= four_sigma(world.severity, 2000)
    if world.world == "one-prompt":
        found = {(row["text"], row["subject"], row["states_background"]) for row in rows}
        assert found == {("a photo of a bird", "landbird", False)}


def test_free_attributes_split_in_halves_independently_of_subject_and_background():
    columns = {name: np.array([row[name] == ROWS[0][name] for row in ROWS]) for name in ROWS[0] if name != "text"}
    for name in ("subject", "colour", "side", "light"):
        assert abs(columns[name].mean() - 0.5) < four_sigma(0.5, len(ROWS)), name
    for name in ("colour", "side", "light", "states_background"):
        for other in ("subject", "background"):
            assert abs(np.corrcoef(columns[name], columns[other])[0, 1]) < 4 / len(ROWS) ** 0.5, (name, other)


def test_captions_name_the_subject_and_only_explicit_ones_the_true_background():
    for row in ROWS:
        assert row["subject"] in row["text"].split()
        stated = [background for background in BACKGROUNDS if f"on {background}" in row["text"]]
        assert stated == ([row["background"]] if row["states_background"] else [])
    used = Counter(row["text"] for row in ROWS)
    canonical = sum(used[prompt] for prompt in canonical_prompts()) / len(ROWS)
    explicit = np.mean([row["states_background"] for row in ROWS])
    assert abs(canonical - 0.65) < four_sigma(0.65, len(ROWS))
    assert abs(explicit - 0.10) < four_sigma(0.10, len(ROWS))
    assert all(used[template.format(subject)] for template in TRAINING_TEMPLATES for subject in SUBJECTS)
    assert all(used[prompt] for prompt in explicit_prompts())
    vocabulary = {word for caption in used for word in caption.split()}
    for prompt in held_out_prompts():
        assert not any(caption.startswith(prompt) for caption in used)
        assert set(prompt.split()) <= vocabulary


def test_a_killed_write_is_resumed_to_the_same_bytes_and_two_sets_are_never_mixed(tmp_path):
    world, folder = BirdsWorld(5, seed=2), tmp_path / "birds"
    world.write(folder)
    whole, kept = contents(folder), folder / "images/00000.png"
    stamp = kept.stat().st_mtime_ns
    (folder / "metadata.csv").unlink()
    (folder / "images/00003.png").unlink()
    world.write(folder)
    assert kept.stat().st_mtime_ns == stamp
    assert contents(folder) == whole
    with pytest.raises(ConfigError, match="seed was 2, now 1"):
        BirdsWorld(5, seed=1).write(folder)
    (folder / ".birds.json").unlink()
    with pytest.raises(DataError, match="empty folder"):
        world.write(folder)


def test_settings_out_of_range_are_refused():
    for name, value in (("severity", 1.2), ("world", "three"), ("resolution", 8), ("seed", -1), ("num_images", 0)):
        with pytest.raises(ConfigError, match=f"{name}: expected"):
            BirdsWorld(**{"num_images": 2, name: value})


def test_the_sun_follows_the_light_that_a_scene_is_given():
    scene = Scene("landbird", "land", np.random.default_rng(0))
    suns = []
    for scene.light in (0.0, 1.0):
        suns.append((scene.sun[1], *scene.sunlight))
    assert (np.diff(suns, axis=0) != 0).tolist() == [[True, False, True, True]]


def test_the_bundled_demo_is_of_the_bundled_model_and_the_default_world():
    check_fit(load_pipeline(BIRDS_MODEL), load_guidance(BIRDS_DEMO / "module"))
    found = Audit.load(BIRDS_DEMO / "audit")
    assert found.has_trained(load_guidance(BIRDS_DEMO / "module").config["record"])
    defaults = DemoConfig()
    world = BirdsWorld(defaults.num_images, severity=defaults.severity, seed=defaults.seed)
    assert found.names == world.captioned().names
    assert read_json(BIRDS_DEMO / "results.json")["run"]["settings"] == defaults.to_dict()
