"""Words that separate groups: how they are chosen, kept and shown."""

import functools
import hashlib
import io
import json
from dataclasses import asdict, replace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from conftest import write_tiny_folder
from invdiff import AuditConfig, audit
from invdiff.auditing import words as words_module
from invdiff.auditing.edits import apply
from invdiff.auditing.result import WORD_LIMIT, WORDS, Audit, AuditWords, GroupWords, PromptAudit, Word
from invdiff.data.captioned import CaptionedImages, load_captioned_images
from invdiff.errors import AuditError, ConfigError, ModelError
from invdiff.report.grids import save_audit_picture
from runs import LAND, NASTY, built_audit, make_audit, report
from test_cli import succeed
from tiny import CAPTIONS, save_clip

pytestmark = pytest.mark.usefixtures("plain")

ON_LAND, ON_WATER = 0, 1
WIDTH = 256


@functools.cache
def direction(name):
    """A vector that depends on the name alone; different names are nearly orthogonal."""
    vector = np.random.default_rng(list(hashlib.sha256(name.encode()).digest())).normal(size=WIDTH)
    return vector / np.linalg.norm(vector)


class StandIn:
    """An encoder of known embeddings: all lie in a cone, as CLIP's do, and images near to the names they show."""

    name = "stand-in"

    def __init__(self, shown):
        self.alike = {}  # word to a word that means nearly the same
        self.images, self.texts = [], []
        self.embed = functools.cache(self.embed)
        noise = np.random.default_rng(0).normal(size=(len(shown), WIDTH)) / np.sqrt(WIDTH)
        meanings = [0.6 * sum(map(direction, names), np.zeros(WIDTH)) for names in shown]
        self.features = noise + direction("an image") + meanings

    def features_digest(self):
        return "0" * 16

    def extract(self, images):
        places = [image.getpixel((0, 0))[0] * 256 + image.getpixel((0, 0))[1] for image in images]
        self.images += places
        return self.features[places].astype(np.float32)

    def text_features(self, texts):
        self.texts += texts
        return np.stack([self.embed(text) for text in texts]).astype(np.float32)

    def embed(self, text):
        for template in words_module.TEMPLATES[::-1]:  # the bare word, which fits every text, comes last
            before, after = template.split("{}")
            if text.startswith(before) and text.endswith(after):
                word = text[len(before) : len(text) - len(after)]
                break
        meaning = direction(word)
        meaning = direction(self.alike[word]) + 0.3 * meaning if word in self.alike else meaning
        return 7 * (2 * direction("a text") + meaning + 0.2 * direction(template))


def pictures(count):
    """Files of images that say their number in their colour."""
    files = [io.BytesIO() for _ in range(count)]
    for index, file in enumerate(files):
        Image.new("RGB", (2, 2), (index // 256, index % 256, 0)).save(file, "PNG")
    return [file.getvalue() for file in files]


def birds(on_water=("sea",), on_land=(), *, rare=30, labels=None, captions=None, prompts=CAPTIONS):
    """An audit, its images and an encoder; group 1 is rare under the first prompt, or `labels` are of one prompt."""
    prompt_ids = np.repeat([0, 1], 90 + rare) if labels is None else np.zeros(len(labels), dtype=int)
    labels = np.repeat([ON_LAND, ON_WATER, ON_WATER, ON_LAND], [90, rare, 90, rare]) if labels is None else labels
    names = [f"{index}.png" for index in range(len(labels))]
    entries = [PromptAudit(prompt, [prompt], 0, found=True, reason="") for prompt in prompts[: prompt_ids[-1] + 1]]
    captions = captions or [prompts[index] for index in prompt_ids]
    data = CaptionedImages(captions, names, {}, 0.0, pictures(len(names)).__getitem__)
    encoder = StandIn([on_water if label == ON_WATER else on_land for label in labels])
    return built_audit(np.eye(2)[labels], prompt_ids, entries, names), data, encoder


def tell(found, data, encoder, tmp_path, rows=None, words=(), distinct=None):
    rows = np.arange(len(found.names)) if rows is None else rows
    distinct = np.ones(len(found.names), dtype=bool) if distinct is None else distinct
    options = {"cache_dir": tmp_path, "progress": False}
    config = AuditConfig(words_model="stand-in", words=tuple(words))
    return words_module.describe_groups(found, data, rows, encoder, config, distinct, **options)


def on_water(found):
    return found.group_weights[0].argmax(axis=1) == ON_WATER


def words_of(told, prompt, group):
    return [word.word for word in told.of(prompt, group).words]


def test_the_words_that_part_groups_are_named_first_under_each_prompt_and_over_all(tmp_path):
    found, data, encoder = birds(("sea", "boat", "sky"), ("forest", "sky"))
    encoder.features[on_water(found)] += 0.2 * direction("a text")  # nearer to every word, which tells nothing
    told = tell(found, data, encoder, tmp_path)
    for prompt in (0, 1, None):
        assert set(words_of(told, prompt, ON_WATER)[:2]) == {"sea", "boat"}
        assert words_of(told, prompt, ON_LAND)[0] == "forest"
        assert "sky" not in words_of(told, prompt, ON_WATER)
    assert all(entry.words[0].effect > 1 and entry.words[0].p_value <= 0.01 for entry in told.groups)
    assert (told.model, told.audit, told.images) == ("stand-in", found.fingerprint, 240)


def test_where_groups_look_alike_hardly_ever_is_a_word_named(tmp_path):
    """The whole way, 50 times: small groups drawn at random from images that differ in much else."""
    numbers = np.random.default_rng(3)
    encoder = StandIn([(scene,) for scene in numbers.choice(["sea", "forest", "city", "snow"], 60)])
    labels, wrong = np.arange(60) < words_module.LEAST_IMAGES, 0
    for _ in range(50):
        found, data, _ = birds(labels=numbers.permutation(labels).astype(int))
        told = tell(found, data, encoder, tmp_path)
        wrong += any(entry.words for entry in told.groups)
        assert {entry.line for entry in told.groups if not entry.words} <= {words_module.NO_WORD}
    assert wrong <= 2  # 0.5 at most are expected


def test_copies_of_images_prove_no_word(tmp_path):
    """Copies of one image that shows the sea by chance are one image."""
    labels = np.arange(120) < 30
    found, data, encoder = birds(labels=labels.astype(int))
    assert "sea" in words_of(tell(found, data, encoder, tmp_path), 0, ON_WATER)
    told = tell(found, data, encoder, tmp_path, distinct=~labels | (np.arange(120) < 5))
    assert told.of(0, ON_WATER).line == words_module.TOO_FEW


def test_a_difference_that_nobody_could_see_is_not_named(tmp_path, monkeypatch):
    found, data, encoder = birds(on_land=("sea",), labels=np.arange(800) % 2)
    encoder.features[on_water(found)] += 0.03 * direction("sea")
    monkeypatch.setattr(words_module, "IMAGES_PER_GROUP", 400)
    monkeypatch.setattr(words_module, "LEAST_EFFECT", 0.8)
    assert words_of(tell(found, data, encoder, tmp_path), 0, ON_WATER) == []
    monkeypatch.setattr(words_module, "LEAST_EFFECT", 0.2)
    assert words_of(tell(found, data, encoder, tmp_path), 0, ON_WATER) == ["sea"]


def test_words_of_captions_and_of_the_user_are_tried_but_those_that_the_prompt_says(tmp_path):
    words, captions = ("heron", "Old Harbour", "boat"), ["a heron or not"] * 240
    found, data, encoder = birds(words, captions=captions, prompts=("an old harbour with BOATS", "a bird"))
    told = tell(found, data, encoder, tmp_path, words=["Old Harbour"])
    assert words_of(told, 0, ON_WATER) == ["heron"]
    assert set(words_of(told, 1, ON_WATER)) == set(words_of(told, None, ON_WATER)) == set(words)


def test_near_synonyms_and_plurals_are_thinned_to_the_best(tmp_path):
    found, data, encoder = birds(("sea", "boat", "boats"))
    encoder.alike = {"ocean": "sea", "surf": "sea"}
    told = tell(found, data, encoder, tmp_path, words=["ocean", "surf", "boats"])
    alike = {"boat": "boats", "ocean": "sea", "surf": "sea"}
    for prompt in (0, 1, None):
        assert sorted(alike.get(word, word) for word in words_of(told, prompt, ON_WATER)) == ["boats", "sea"]


def test_the_best_words_come_first_and_are_few(tmp_path):
    words = ["sea", "boat", "waves", "pond", "lake", "island", "harbour", "fish"]
    found, data, encoder = birds(words)
    encoder.features[on_water(found)] += 0.15 * direction("pond")
    told, most = words_of(tell(found, data, encoder, tmp_path), 0, ON_WATER), words_module.MOST_WORDS
    assert (told[0], len(set(told) & set(words)), len(told)) == ("pond", most, most)


def test_at_most_so_many_images_of_each_group_are_shown_once(tmp_path):
    found, data, encoder = birds(labels=np.repeat([ON_LAND, ON_WATER], [700, 30]))
    told = tell(found, data, encoder, tmp_path)
    assert told.images == len(set(encoder.images)) == len(encoder.images) == words_module.IMAGES_PER_GROUP + 30
    assert told.of(None, ON_WATER) is None  # with one prompt, all are one
    again = StandIn([()] * 730)
    assert tell(found, data, again, tmp_path) == told
    assert again.images == []  # embeddings were kept
    again.features_digest = lambda: "1" * 16
    tell(found, data, again, tmp_path)
    assert len(again.images) == told.images  # but not those of other weights


@pytest.mark.parametrize("weight", [0, 0.5])  # people left images out, or nothing is known of them
def test_only_the_images_that_count_are_shown_from_where_the_data_has_them(weight, tmp_path):
    found, _, _ = birds()
    labels = on_water(found)
    found.group_weights[0][:40] = weight
    count = len(labels) + 5
    rows = np.random.default_rng(0).permutation(count)[:-5]
    shown = [()] * count
    for row in rows[labels]:
        shown[row] = ("sea",)
    data = CaptionedImages(["a bird"] * count, [str(i) for i in range(count)], {}, 0.0, pictures(count).__getitem__)
    encoder = StandIn(shown)
    assert words_of(tell(found, data, encoder, tmp_path, rows), 0, ON_WATER) == ["sea"]
    assert set(encoder.images) == set(rows[40:])


def test_small_groups_are_not_judged(tmp_path):
    told = tell(*birds(on_land=("forest",), rare=words_module.LEAST_IMAGES - 4), tmp_path)
    assert "too few images" in told.of(0, ON_WATER).note
    assert "too few images" in told.of(0, ON_LAND).note  # there is nothing to compare it with
    assert told.of(None, ON_WATER).words == ()


def test_a_prompt_that_hides_nothing_has_no_words(tmp_path):
    found, data, encoder = birds()
    found.factors[0].splits[:] = [split for split in found.factors[0].splits if split.prompt == 0]
    assert {entry.prompt for entry in tell(found, data, encoder, tmp_path).groups} == {0}


def test_each_hidden_factor_has_words_of_its_own(tmp_path):
    found, data, _ = birds()
    at_night = np.arange(240) % 4 == 0
    second = np.eye(2, dtype=np.float32)[at_night.astype(int)]
    encoder = StandIn([["sea"] * int(a) + ["night"] * int(b) for a, b in zip(on_water(found), at_night, strict=True)])
    found = built_audit((*found.group_weights, second), found.prompt_ids, found.prompts, found.names)
    told = tell(found, data, encoder, tmp_path)
    assert words_of(told, None, ON_WATER) == ["sea"]
    assert [word.word for word in told.of(None, 1, factor=1).words] == ["night"]


@pytest.mark.parametrize("hostile", ["<img src=x onerror=alert(1)>", "x" * 10_000, "\u202e{0}{} %s \ud800"])
def test_hostile_captions_are_harmless(hostile, tmp_path):
    found, data, encoder = birds(captions=[f"{hostile} sea"] * 240, prompts=(hostile, hostile))
    assert words_of(tell(found, data, encoder, tmp_path, words=["{}", "<b>{0}</b>"]), 0, ON_WATER) == ["sea"]
    assert max(map(len, encoder.texts)) < 100


def test_the_vocabulary_holds_each_word_once_the_user_s_first():
    captions = ["A heron, 3 photos of THE heron_2 by a pond"] * 3 + ["a stork"] * 2
    words = words_module.vocabulary(captions, ["Old\nHarbour", "POND", "x" * 100, " "])
    assert words[:2] == ["Old Harbour", "POND"]
    assert len(words[2]) == WORD_LIMIT
    assert "heron" in words
    assert not {"pond", "photos", "the", "stork", "heron_2", "3", "by"} & set(words)
    assert len(words) > 400
    assert words_module.vocabulary([]) == words_module.vocabulary(["the photo"] * 5)


def test_an_audit_shows_copies_of_an_image_once(tiny_pipe, tiny_folder, clip_dir, tmp_path, monkeypatch):
    shown = Mock(return_value=None)
    monkeypatch.setattr("invdiff.auditing.run.describe_groups", shown)
    data = load_captioned_images(tiny_folder)
    twice = replace(data.select([*range(12)] * 2), names=[*data.names, *(f"again-{name}" for name in data.names)])
    config = AuditConfig(min_images=4, words_model=str(clip_dir))
    audit(tiny_pipe, twice, attribute="background", config=config, cache_dir=tmp_path, progress=False)
    distinct = shown.call_args.args[5]
    assert (len(distinct), distinct.sum()) == (24, 12)


def test_words_change_nothing_else_and_cost_no_new_measurement(tiny_pipe, tiny_pipe_dir, tmp_path, monkeypatch):
    folder, clip_dir = write_tiny_folder(tmp_path / "data", 60), save_clip(tmp_path / "tiny-clip")
    data, cache = load_captioned_images(folder), tmp_path / "cache"
    exact = AuditConfig(solver="exact", min_images=6, min_share=0.3, caption_threshold=100.0)
    config = replace(exact, words_model=str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="Expected a CLIP model"):
        audit(tiny_pipe, data, config=config, cache_dir=cache, progress=False)
    assert not (cache / "evidence").exists()  # a wrong name is an error before the work
    plain = audit(tiny_pipe, data, config=exact, cache_dir=cache, progress=False)
    monkeypatch.setattr("invdiff.auditing.evidence.paired_losses", None)  # evidence is read back

    (tmp_path / "words.txt").write_text("palm tree\n\nharbour\n")
    (tmp_path / "settings.json").write_text(json.dumps(exact.to_dict()))
    options = ("--config", tmp_path / "settings.json", "--words-model", clip_dir, "--words", tmp_path / "words.txt")
    where = ("--output", tmp_path / "audit", "--cache-dir", cache, "--quiet")
    shown = succeed("audit", tiny_pipe_dir, folder, *where, *options)
    told = Audit.load(tmp_path / "audit")
    assert (told.fingerprint, told.prompts) == (plain.fingerprint, plain.prompts)
    assert told.settings["words"] == ["palm tree", "harbour"]
    assert told.words.model == "tiny-clip"
    assert {(entry.prompt, entry.group) for entry in told.words.groups} == {(0, 0), (0, 1)}
    for text in ("Words that separate", "as tiny-clip sees them", f"group 0: {told.words.of(0, 0).line}"):
        assert text in shown


def test_words_are_short_and_need_a_model_to_read_them():
    for word in ("", "x" * 61, " "):
        with pytest.raises(ConfigError, match="words of 1 to 60 characters"):
            AuditConfig(words_model="clip", words=(word,))
    with pytest.raises(ConfigError, match="nothing without words_model"):
        AuditConfig(words=("sea",))


AUDIT = built_audit(np.eye(2), [0, 0], [PromptAudit("a bird", ["a bird"], 2, True, "made up")])
WATER = GroupWords(0, 0, 1, (Word("water", 2.1, 0.001), Word("boat", 0.9, 0.004)), "")
NOTHING = GroupWords(None, 0, 0, (), "no word tells it apart")
FOUND = AuditWords("clip-tiny", AUDIT.fingerprint, 500, 80, 0.01, (WATER, NOTHING))
KEPT = json.dumps(asdict(FOUND))


def test_words_come_back_whole_and_on_one_line_and_are_found_by_prompt_factor_and_group(tmp_path):
    assert Audit.load(AUDIT.save(tmp_path)).words is None
    assert Audit.load(replace(AUDIT, words=FOUND).save(tmp_path)).words == FOUND
    assert Audit.load(AUDIT.save(tmp_path)).words == FOUND  # of the same groups, so they stay
    other = replace(AUDIT, group_weights=(AUDIT.group_weights[0][::-1],), words=FOUND)
    assert Audit.load(other.save(tmp_path / "other")).words is None
    assert (FOUND.of(0, 1), FOUND.of(None, 0)) == (WATER, NOTHING)
    assert FOUND.of(0, 0) is FOUND.of(0, 1, factor=1) is None
    assert (WATER.line, NOTHING.line) == ("water, boat", "no word tells it apart")
    document = asdict(FOUND)
    document["groups"][0]["words"][0]["word"] = "\u202e<b>\n" + "x" * 10_000
    (tmp_path / WORDS).write_text(json.dumps(document))
    assert Audit.load(tmp_path).words.groups[0].words[0].word == ("<b> " + "x" * WORD_LIMIT)[: WORD_LIMIT - 1] + "…"


OTHER = KEPT.replace(AUDIT.fingerprint, "0" * 16)
DAMAGED = ["[]", "\xff", KEPT.replace('"group": 1', '"group": true'), KEPT.replace("2.1", "NaN")]


@pytest.mark.parametrize("text", [OTHER, *DAMAGED])
def test_other_files_and_words_of_another_audit_are_refused_and_removed(tmp_path, text):
    (AUDIT.save(tmp_path) / WORDS).write_text(text, encoding="latin-1")
    found = r"those of another \(0{16}\)" if text is OTHER else r"Expected (words for groups|JSON)"
    with pytest.raises(AuditError, match=rf"{found}.*--words-model"):
        Audit.load(tmp_path)
    AUDIT.save(tmp_path)
    assert not (tmp_path / WORDS).exists()


def with_words(folder, *, told=("water", "boat"), model="clip-tiny", factors=1):
    """An audit with words for group 1, and none for group 0; returns its images."""
    data, words = make_audit(folder, factors=factors, prompts=(LAND,)), tuple(Word(word, 2.0, 0.001) for word in told)
    groups = [
        GroupWords(prompt, factor, group, words[factor:] if group else (), "" if group else "no word tells it apart")
        for prompt in (0, None)
        for factor in range(factors)
        for group in (0, 1)
    ]
    document = asdict(AuditWords(model, Audit.load(folder).fingerprint, 512, 40, 0.01, tuple(groups)))
    (folder / WORDS).write_text(json.dumps(document))  # holds what UTF-8 does not have
    return data


def test_a_report_shows_words_under_their_group_and_factor_and_who_chose_them_before_people_s_changes(tmp_path, plain):
    data = with_words(tmp_path, factors=2)
    page, twin = report(tmp_path / "report", audit=tmp_path, data=data)
    assert "Most typical of group 0 Words: no word tells it apart says “clip-tiny”, asked about 512" in page.words
    assert "Most typical of group 1 Words: water, boat says “clip-tiny”" in page.words
    assert page.words.count("Words: water, boat") == page.words.count("Words: boat") == 1
    assert "group 1: 10% (3% to 30%), words: water, boat" in twin
    audit = Audit.load(tmp_path)
    apply(audit, audit.edits.without_images([0]).with_name(0, 1, "at sea")).save_edits(tmp_path)
    changed, changed_twin = report(tmp_path / "report", audit=tmp_path, data=data)
    assert "Most typical of at sea Words: water, boat" in changed.words
    for text, by_people in ((page.words, False), (twin, False), (changed.words, True), (changed_twin, True)):
        assert "the opinion of a CLIP model, “clip-tiny”, and no proof" in text
        assert "Words that separate groups over all prompts" in text
        assert ("before people's changes" in text) == by_people
    (tmp_path / WORDS).unlink()
    page, _ = report(tmp_path / "report", audit=tmp_path)
    assert not any(word in page.words for word in ("Words", "CLIP"))


def test_pictures_show_as_many_words_as_there_is_room_for(tmp_path, drawn):
    told = ["water", "boat", "a very long description of what can be seen", "of the sea", "x" * 60, "y" * 60, "z" * 60]
    save_audit_picture(tmp_path, with_words(tmp_path, told=told))
    assert drawn.count(", ".join(told)) == 1
    assert any("words by “clip-tiny”" in str(part) for part in drawn)
    assert not any("no word tells" in str(part) for part in drawn)
    save_audit_picture(tmp_path / "nasty", with_words(tmp_path / "nasty", told=NASTY))
