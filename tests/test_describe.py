import functools
import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import write_tiny_folder
from invdiff import cli
from invdiff.auditing import describe
from invdiff.auditing import run as audit_module
from invdiff.auditing.describe import IMAGES_PER_GROUP, MOST_WORDS, NO_WORD, TEMPLATES, describe_groups
from invdiff.auditing.result import WORDS, Audit, PromptAudit, read_words
from invdiff.auditing.run import audit
from invdiff.config import AuditConfig
from invdiff.data.captioned import CaptionedImages, load_captioned_images
from invdiff.errors import ConfigError, ModelError
from tiny import save_clip

LAND, WATER = 0, 1
WIDTH = 256
PROMPTS = ("a photo of a landbird", "a photo of a waterbird")


@functools.cache
def direction(name):
    """A vector that depends on the name alone; different names are nearly orthogonal."""
    digest = hashlib.sha256(name.encode()).digest()
    vector = np.random.default_rng(list(digest)).normal(size=WIDTH)
    return vector / np.linalg.norm(vector)


class StandIn:
    """An encoder of known embeddings: all lie in a cone, as CLIP's do, and images near to what they show.

    Args:
        shown: For each image, names of what it shows.
        alike: Word to a word that means nearly the same.
    """

    name = "stand-in"

    def __init__(self, shown, alike=None):
        self.alike = alike or {}
        self.images, self.texts = [], []
        noise = np.random.default_rng(0).normal(size=(len(shown), WIDTH)) / np.sqrt(WIDTH)
        self.features = (
            noise + direction("an image") + [0.6 * sum(map(direction, names), np.zeros(WIDTH)) for names in shown]
        )

    def weights_digest(self):
        return "0" * 16

    def extract(self, images):
        places = [image.getpixel((0, 0))[0] * 256 + image.getpixel((0, 0))[1] for image in images]
        self.images += places
        return self.features[places].astype(np.float32)

    def text_features(self, texts):
        self.texts += texts
        return np.stack([self.embed(text) for text in texts]).astype(np.float32)

    def embed(self, text):
        for template in TEMPLATES[::-1]:  # the bare word, which fits every text, comes last
            before, after = template.split("{}")
            if text.startswith(before) and text.endswith(after):
                word = text[len(before) : len(text) - len(after)]
                break
        meaning = direction(word)
        if word in self.alike:
            meaning = direction(self.alike[word]) + 0.3 * meaning
        return 7 * (2 * direction("a text") + meaning + 0.2 * direction(template))


def pictures(count):
    """Files of images that say their number in their colour."""
    files = []
    for index in range(count):
        file = io.BytesIO()
        Image.new("RGB", (2, 2), (index // 256, index % 256, 0)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def made_up(labels, prompt_ids, captions=None, prompts=PROMPTS):
    """An audit of groups as told, and its images."""
    labels, prompt_ids = np.asarray(labels), np.asarray(prompt_ids)
    names = [f"{index}.png" for index in range(len(labels))]
    found = Audit(
        group_weights=(np.eye(labels.max() + 1, dtype=np.float32)[labels],),
        scores=np.zeros(len(labels), np.float32),
        prompt_ids=prompt_ids,
        prompts=[
            PromptAudit(prompt, [prompt], int((prompt_ids == index).sum()), found=True, reason="")
            for index, prompt in enumerate(prompts)
        ],
        names=names,
        forwards_per_image=0.0,
        settings={},
    )
    captions = captions or [prompts[index] for index in prompt_ids]
    return found, CaptionedImages(captions, names, {}, 0.0, pictures(len(names)))


def birds(rare=30, usual=90):
    """Two prompts; group 1 is rare under the first and frequent under the second."""
    labels = [LAND] * usual + [WATER] * rare + [WATER] * usual + [LAND] * rare
    return np.array(labels), np.repeat([0, 1], rare + usual)


def tell(found, data, encoder, tmp_path, **options):
    rows = torch.arange(len(found.names))
    return describe_groups(found, data, rows, encoder, cache_dir=tmp_path, progress=False, **options)


def words_of(told, prompt, group):
    return [word.word for word in told.of(prompt, group).words]


def test_the_right_words_come_out_under_each_prompt_and_over_all(tmp_path):
    labels, prompt_ids = birds()
    encoder = StandIn([("sea", "boat") if label == WATER else ("forest",) for label in labels])
    found, data = made_up(labels, prompt_ids)
    told = tell(found, data, encoder, tmp_path)
    for prompt in (0, 1, None):
        assert set(words_of(told, prompt, WATER)) == {"sea", "boat"}
        assert words_of(told, prompt, LAND) == ["forest"]
    assert told.of(0, WATER).caption == PROMPTS[0]
    assert all(entry.words[0].effect > 1 and entry.words[0].p_value <= 0.01 for entry in told.groups)
    assert (told.model, told.audit, told.images) == ("stand-in", found.fingerprint, 240)


def test_words_of_what_both_groups_show_are_not_told(tmp_path):
    labels, prompt_ids = birds()
    shown = [("sky", "sea") if label == WATER else ("sky",) for label in labels]
    told = tell(*made_up(labels, prompt_ids), StandIn(shown), tmp_path)
    assert words_of(told, None, WATER) == ["sea"]
    assert set(words_of(told, None, LAND)) <= {"sky"}  # which is all that land shows


def test_where_groups_look_alike_no_word_is_told(tmp_path):
    labels, prompt_ids = birds()
    told = tell(*made_up(labels, prompt_ids), StandIn([("sea",)] * len(labels)), tmp_path)
    assert [entry.line for entry in told.groups] == [NO_WORD] * 6


def test_a_difference_that_nobody_could_see_is_not_told(tmp_path, monkeypatch):
    labels, prompt_ids = np.arange(800) % 2, np.zeros(800, dtype=int)
    found, data = made_up(labels, prompt_ids, prompts=PROMPTS[:1])
    encoder = StandIn([("sea",)] * 800)
    encoder.features[labels == WATER] += 0.02 * direction("sea")
    monkeypatch.setattr(describe, "IMAGES_PER_GROUP", 400)
    assert words_of(tell(found, data, encoder, tmp_path), 0, WATER) == []
    monkeypatch.setattr(describe, "LEAST_EFFECT", 0.2)
    assert words_of(tell(found, data, encoder, tmp_path), 0, WATER) == ["sea"]


def test_words_that_the_prompt_says_are_not_told_under_it(tmp_path):
    labels, prompt_ids = birds()
    encoder = StandIn([("boat", "sea") if label == WATER else () for label in labels])
    found, data = made_up(labels, prompt_ids, prompts=("boats", "a bird"))
    told = tell(found, data, encoder, tmp_path)
    assert words_of(told, 0, WATER) == ["sea"]
    assert set(words_of(told, 1, WATER)) == set(words_of(told, None, WATER)) == {"boat", "sea"}


def test_words_of_captions_and_of_the_user_are_tried(tmp_path):
    labels, prompt_ids = birds()
    encoder = StandIn([("heron", "Old Harbour") if label == WATER else () for label in labels])
    captions = ["a heron or not"] * len(labels)
    found, data = made_up(labels, prompt_ids, captions)
    told = tell(found, data, encoder, tmp_path, words=["Old Harbour"])
    assert set(words_of(told, None, WATER)) == {"heron", "Old Harbour"}
    assert told.vocabulary == tell(found, data, encoder, tmp_path).vocabulary + 1


def test_near_synonyms_and_plurals_are_thinned_to_the_best(tmp_path):
    labels, prompt_ids = birds()
    alike = {"ocean": "sea", "surf": "sea"}
    encoder = StandIn([("sea", "boat", "boats") if label == WATER else () for label in labels], alike)
    told = tell(*made_up(labels, prompt_ids), encoder, tmp_path, words=["ocean", "surf", "boats"])
    for prompt in (0, 1, None):
        boat, sea = sorted(words_of(told, prompt, WATER), key=lambda word: word not in ("boat", "boats"))
        assert boat in ("boat", "boats")
        assert sea in ("sea", "ocean", "surf")


def test_the_best_words_come_first_and_are_few(tmp_path):
    labels, prompt_ids = birds()
    words = ["sea", "boat", "waves", "pond", "lake", "island", "harbour", "fish"]
    encoder = StandIn([words if label == WATER else () for label in labels])
    encoder.features[labels == WATER] += 0.3 * direction("pond")
    told = words_of(tell(*made_up(labels, prompt_ids), encoder, tmp_path), 0, WATER)
    assert len(told) == MOST_WORDS
    assert told[0] == "pond"
    assert set(told) < set(words)


def test_images_that_are_near_to_every_word_are_told_by_none(tmp_path):
    labels, prompt_ids = birds()
    encoder = StandIn([()] * len(labels))
    encoder.features[labels == WATER] += 0.2 * direction("a text")
    told = tell(*made_up(labels, prompt_ids), encoder, tmp_path)
    assert all(entry.words == () for entry in told.groups)


def test_at_most_so_many_images_of_each_group_are_looked_at_once(tmp_path):
    labels, prompt_ids = np.array([LAND] * 700 + [WATER] * 30), np.zeros(730, dtype=int)
    found, data = made_up(labels, prompt_ids, prompts=PROMPTS[:1])
    encoder = StandIn([("sea",) if label == WATER else () for label in labels])
    told = tell(found, data, encoder, tmp_path)
    assert told.images == len(set(encoder.images)) == len(encoder.images) == IMAGES_PER_GROUP + 30
    assert told.of(None, WATER) is None  # with one prompt, all are one
    again = StandIn([()] * 730)
    assert tell(found, data, again, tmp_path) == told
    assert again.images == []  # embeddings were kept


def test_images_that_were_left_out_are_not_looked_at(tmp_path):
    labels, prompt_ids = birds()
    found, data = made_up(labels, prompt_ids)
    encoder = StandIn([("sea",) if label == WATER else () for label in labels])
    weights = found.group_weights[0].copy()
    weights[:40] = 0
    tell(replace(found, group_weights=(weights,)), data, encoder, tmp_path)
    assert set(encoder.images) == set(range(40, 240))


def test_images_stand_where_the_data_has_them(tmp_path):
    labels, prompt_ids = birds()
    found, _ = made_up(labels, prompt_ids)
    count = len(labels) + 5
    rows = np.random.default_rng(0).permutation(count)[:-5]
    shown = [()] * count
    for row, label in zip(rows, labels, strict=True):
        shown[row] = ("sea",) if label == WATER else ()
    data = CaptionedImages(["a bird"] * count, [str(i) for i in range(count)], {}, 0.0, pictures(count))
    told = describe_groups(found, data, torch.from_numpy(rows), StandIn(shown), cache_dir=tmp_path, progress=False)
    assert words_of(told, 0, WATER) == ["sea"]


def test_small_groups_are_not_judged(tmp_path):
    labels, prompt_ids = birds(rare=6)
    encoder = StandIn([("sea",) if label == WATER else ("forest",) for label in labels])
    told = tell(*made_up(labels, prompt_ids), encoder, tmp_path)
    assert "too few images" in told.of(0, WATER).note
    assert "too few images" in told.of(0, LAND).note  # there is nothing to compare it with
    assert told.of(None, WATER).words == ()


def test_a_prompt_that_hides_nothing_has_no_words(tmp_path):
    labels, prompt_ids = birds()
    found, data = made_up(labels, prompt_ids)
    found.prompts[1] = replace(found.prompts[1], found=False)
    told = tell(found, data, StandIn([("sea",) if label == WATER else () for label in labels]), tmp_path)
    assert {entry.prompt for entry in told.groups} == {0}


def test_each_hidden_factor_has_words_of_its_own(tmp_path):
    labels, prompt_ids = birds()
    at_night = np.arange(len(labels)) % 4 == 0
    found, data = made_up(labels, prompt_ids)
    second = np.eye(2, dtype=np.float32)[at_night.astype(int)]
    shown = [
        [word for word, there in (("sea", a == WATER), ("night", b)) if there]
        for a, b in zip(labels, at_night, strict=True)
    ]
    told = tell(replace(found, group_weights=(*found.group_weights, second)), data, StandIn(shown), tmp_path)
    assert words_of(told, None, WATER) == ["sea"]
    assert [word.word for word in told.of(None, 1, factor=1).words] == ["night"]


@pytest.mark.parametrize("hostile", ["<img src=x onerror=alert(1)>", "x" * 10_000, "\u202e{0}{} %s \ud800"])
def test_hostile_captions_are_harmless(hostile, tmp_path):
    labels, prompt_ids = birds()
    found, data = made_up(labels, prompt_ids, [f"{hostile} sea"] * len(labels), prompts=(hostile, hostile))
    encoder = StandIn([("sea",) if label == WATER else () for label in labels])
    told = tell(found, data, encoder, tmp_path, words=["{}", "<b>{0}</b>"])
    assert words_of(told, 0, WATER) == ["sea"]
    assert max(map(len, encoder.texts)) < 100
    told.save(tmp_path)
    assert read_words(tmp_path, told.audit) == told


def test_null_audits_are_told_apart_by_a_word_as_seldom_as_stated(tmp_path, monkeypatch):
    """The whole way, 50 times: groups drawn at random from images that differ in much else."""
    monkeypatch.setattr(describe, "LEVEL", 0.05)
    numbers = np.random.default_rng(3)
    scenes = np.array(["sea", "forest", "city", "snow"])
    wrong = 0
    encoder = StandIn([(scene,) for scene in numbers.choice(scenes, 60)])
    for _ in range(50):
        found, data = made_up(numbers.permutation(np.arange(60) % 2), np.zeros(60, dtype=int), prompts=PROMPTS[:1])
        wrong += any(entry.words for entry in tell(found, data, encoder, tmp_path).groups)
    assert wrong <= 7  # 2.5 are expected, with a standard deviation of 1.5


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    """A whole CLIP model with random weights."""
    return save_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("photos"), 60)


EXACT = AuditConfig(solver="exact", min_images=6, min_share=0.3, caption_threshold=100.0)


def test_an_audit_asks_a_clip_model_and_saves_its_words(clip_dir, tiny_pipe, photos, tmp_path):
    data = load_captioned_images(photos)
    config = replace(EXACT, words_model=str(clip_dir), words=("palm tree",))
    found = audit(tiny_pipe, data, config=config, cache_dir=tmp_path / "cache", progress=False)
    assert found.words.model == "tiny-clip"
    assert {(entry.prompt, entry.group) for entry in found.words.groups} == {(0, 0), (0, 1)}
    assert all(word.p_value <= 0.01 for entry in found.words.groups for word in entry.words)
    found.save(tmp_path / "audit")
    assert read_words(tmp_path / "audit", found.fingerprint) == found.words


def test_words_change_nothing_else_and_cost_no_new_measurement(clip_dir, tiny_pipe, photos, tmp_path, monkeypatch):
    data = load_captioned_images(photos)
    plain = audit(tiny_pipe, data, config=EXACT, cache_dir=tmp_path / "cache", progress=False)
    plain.save(tmp_path / "audit")
    monkeypatch.setattr("invdiff.groups.scores._measure", None)  # evidence is read back
    config = replace(EXACT, words_model=str(clip_dir))
    told = audit(tiny_pipe, data, config=config, cache_dir=tmp_path / "cache", progress=False)
    assert (told.fingerprint, told.prompts) == (plain.fingerprint, plain.prompts)
    told.save(tmp_path / "audit")
    plain.save(tmp_path / "audit")  # of the same groups: the words stay true
    assert read_words(tmp_path / "audit", plain.fingerprint) == told.words
    other = replace(plain, group_weights=(plain.group_weights[0][:, ::-1],))
    other.save(tmp_path / "audit")
    assert not (tmp_path / "audit" / WORDS).exists()


def test_other_weights_at_the_same_place_are_asked_anew(clip_dir, photos, tmp_path):
    encoder = audit_module.ClipEncoder.load(clip_dir)
    data, rows = load_captioned_images(photos), torch.arange(4)
    first = describe._embed_images(encoder, data, rows, tmp_path, progress=False)
    encoder.model.visual_projection.weight.data *= -1
    second = describe._embed_images(encoder, data, rows, tmp_path, progress=False)
    np.testing.assert_allclose(second, -first, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_wrong_name_is_told_before_the_work(tiny_pipe, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_module, "collect_evidence", None)
    config = replace(EXACT, words_model=str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="Expected a CLIP model"):
        audit(tiny_pipe, load_captioned_images(photos), config=config, cache_dir=tmp_path, progress=False)


def test_latents_alone_cannot_be_looked_at(clip_dir, tiny_pipe, photos, tmp_path):
    encoded = audit_module.as_encoded(tiny_pipe, load_captioned_images(photos), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="for a CLIP model to look at"):
        audit(tiny_pipe, encoded, config=replace(EXACT, words_model=str(clip_dir)), cache_dir=tmp_path, progress=False)


@pytest.mark.parametrize("words", [("",), ("x" * 61,), (" ",)])
def test_words_are_short(words):
    with pytest.raises(ConfigError, match="words of 1 to 60 characters"):
        AuditConfig(words_model="clip", words=words)


def test_words_without_a_model_to_read_them_are_refused():
    with pytest.raises(ConfigError, match="nothing without words_model"):
        AuditConfig(words=("sea",))


def test_the_command_reads_words_and_prints_what_was_told(clip_dir, tiny_pipe_dir, photos, tmp_path):
    (tmp_path / "words.txt").write_text("palm tree\n\nharbour\n")
    (tmp_path / "settings.json").write_text(json.dumps(EXACT.to_dict()))
    arguments = ["audit", tiny_pipe_dir, photos, "--output", tmp_path / "audit", "--cache-dir", tmp_path / "cache"]
    arguments += ["--config", tmp_path / "settings.json", "--words-model", clip_dir, "--words", tmp_path / "words.txt"]
    done = CliRunner().invoke(cli.app, [str(word) for word in [*arguments, "--quiet"]], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "Words that tell groups apart under the prompt" in done.output
    assert "tiny-clip's opinion" in done.output
    told = read_words(tmp_path / "audit", Audit.load(tmp_path / "audit").fingerprint)
    assert f"group 0: {told.of(0, 0).line}" in done.output
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["settings"]["words"] == ["palm tree", "harbour"]
