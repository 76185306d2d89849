import html
import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from invdiff import save_report
from invdiff.auditing.result import WORD_LIMIT, WORDS, Audit, AuditWords, GroupWords, PromptAudit, Word, apply
from invdiff.errors import AuditError
from invdiff.report.audit_pictures import save_audit_pictures
from test_pictures import HOSTILE, LAND, make_audit
from test_report import NASTY, Page

AUDIT = Audit(
    (np.eye(2, dtype=np.float32),),
    np.zeros(2, np.float32),
    np.zeros(2, np.int64),
    [PromptAudit("a bird", ["a bird"], 2, True, "made up", shares=[0.5, 0.5])],
    ["a.png", "b.png"],
    6.0,
    {},
)
OTHER = replace(AUDIT, group_weights=(AUDIT.group_weights[0][::-1],))
WATER = GroupWords(0, "a bird", 0, 1, (Word("water", 2.1, 0.001), Word("boat", 0.9, 0.004)), "")
NOTHING = GroupWords(None, "", 0, 0, (), "no word tells it apart")
FOUND = AuditWords("clip-tiny", AUDIT.fingerprint, 500, 80, 0.01, (WATER, NOTHING))


def changed(folder, change):
    replace(AUDIT, words=FOUND).save(folder)
    document = json.loads((folder / WORDS).read_text())
    change(document)
    (folder / WORDS).write_text(json.dumps(document))


def test_words_come_back_whole(tmp_path):
    assert Audit.load(AUDIT.save(tmp_path)).words is None
    assert Audit.load(replace(AUDIT, words=FOUND).save(tmp_path)).words == FOUND
    assert Audit.load(AUDIT.save(tmp_path)).words == FOUND  # of the same groups, so they stay


def test_words_are_found_by_prompt_factor_and_group():
    assert FOUND.of(0, 1) == WATER
    assert FOUND.of(None, 0) == NOTHING
    assert FOUND.of(0, 0) is None
    assert FOUND.of(0, 1, factor=1) is None
    assert (WATER.line, NOTHING.line) == ("water, boat", "no word tells it apart")


def test_words_of_another_audit_are_refused_and_removed(tmp_path):
    replace(AUDIT, words=FOUND).save(tmp_path / "one")
    OTHER.save(tmp_path / "two")
    (tmp_path / "one" / WORDS).rename(tmp_path / "two" / WORDS)
    with pytest.raises(AuditError, match=rf"those of another \({AUDIT.fingerprint}\).*--words-model"):
        Audit.load(tmp_path / "two")
    with pytest.raises(AuditError, match="those of another"):
        save_report(tmp_path / "report", audit=tmp_path / "two")
    assert Audit.load(replace(OTHER, words=FOUND).save(tmp_path / "two")).words is None


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"groups": 1}', "\xff"])
def test_other_files_are_refused_and_removed(tmp_path, text):
    (AUDIT.save(tmp_path) / WORDS).write_text(text, encoding="latin-1")
    with pytest.raises(AuditError, match="Expected words for groups"):
        Audit.load(tmp_path)
    AUDIT.save(tmp_path)
    assert not (tmp_path / WORDS).exists()


@pytest.mark.parametrize(
    ("name", "value"), [("group", True), ("prompt", "0"), ("caption", None), ("words", [1]), ("words", [{"word": 1}])]
)
def test_a_group_of_another_kind_is_refused(tmp_path, name, value):
    changed(tmp_path, lambda document: document["groups"][0].update({name: value}))
    with pytest.raises(AuditError, match="Expected words for groups"):
        Audit.load(tmp_path)


def test_figures_are_finite(tmp_path):
    changed(tmp_path, lambda document: document["groups"][0]["words"][0].update({"effect": float("inf")}))
    with pytest.raises(AuditError, match="a finite number, got inf"):
        Audit.load(tmp_path)


def test_hostile_words_are_cut_to_one_line(tmp_path):
    hostile = "\u202e<b>\n" + "x" * 10_000
    changed(tmp_path, lambda document: document["groups"][0]["words"][0].update({"word": hostile}))
    word = Audit.load(tmp_path).words.groups[0].words[0].word
    assert word.startswith("<b> xxx")
    assert len(word) == WORD_LIMIT


# How they are shown.


def made_up(folder, *, told=("water", "boat"), model="clip-tiny", factors=1, prompts=(LAND,)):
    """An audit with words for group 1, and none for group 0; returns its images."""
    data = make_audit(folder, factors=factors, prompts=prompts)
    words = tuple(Word(word, 2.0, 0.001) for word in told)
    groups = [
        GroupWords(
            prompt, "", factor, group, words[factor:] if group else (), "" if group else "no word tells it apart"
        )
        for prompt in (*range(len(prompts)), None)
        for factor in range(factors)
        for group in (0, 1)
    ]
    fingerprint = Audit.load(folder).fingerprint
    document = asdict(AuditWords(model, fingerprint, 512, 40, 0.01, tuple(groups)))
    (folder / WORDS).write_text(json.dumps(document))  # holds what UTF-8 does not have
    return data


def shown(folder, data=None):
    page = Page(save_report(folder / "report", audit=folder, data=data).read_text(encoding="utf-8"))
    return page, html.unescape((folder / "report" / "report.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("with_images", [True, False])
def test_a_report_shows_words_under_their_group_and_who_chose_them(tmp_path, with_images):
    data = made_up(tmp_path)
    page, twin = shown(tmp_path, data if with_images else None)
    typical = "Most typical of " * with_images
    assert f"{typical}group 0 Words: no word tells it apart says “clip-tiny”, asked about 512 words" in page.words
    assert f"{typical}group 1 Words: water, boat says “clip-tiny”" in page.words
    assert "group 1: 10% (3% to 30%), words: water, boat" in twin
    for text in (page.words, twin):
        assert "the opinion of a CLIP model, “clip-tiny”, and no proof" in text
        assert "Words that tell groups apart over all prompts" in text
        assert "people's changes" not in text


def test_without_words_a_report_says_nothing_of_them(tmp_path):
    page, twin = shown(tmp_path, make_audit(tmp_path))
    assert not any(word in text for text in (page.words, twin) for word in ("Words", "CLIP"))


def test_words_stand_beside_the_factor_they_are_of(tmp_path):
    page, _ = shown(tmp_path, made_up(tmp_path, factors=2))
    assert page.words.count("Words: water, boat") == 1
    assert page.words.count("Words: boat") == 1


def test_words_of_groups_that_people_changed_are_said_to_be_older(tmp_path):
    data = made_up(tmp_path)
    audit = Audit.load(tmp_path)
    apply(audit, audit.edits.without_images([0]).with_name(0, 1, "at sea")).save_edits(tmp_path)
    page, twin = shown(tmp_path, data)
    assert "Most typical of at sea Words: water, boat" in page.words
    for text in (page.words, twin):
        assert "before people's changes" in text


def test_hostile_words_are_text(tmp_path):
    plain, _ = shown(tmp_path / "plain", made_up(tmp_path / "plain", told=["water"] * len(NASTY)))
    nasty, twin = shown(tmp_path / "nasty", made_up(tmp_path / "nasty", told=NASTY, model=NASTY[0]))
    assert [tag for tag, _ in nasty.elements] == [tag for tag, _ in plain.elements]
    assert "<script" not in (tmp_path / "nasty" / "report" / "report.md").read_text(encoding="utf-8")
    assert NASTY[0] in nasty.text
    assert NASTY[0] in twin


def test_pictures_show_as_many_words_as_there_is_room_for(tmp_path, written):
    told = ["water", "boat", "a very long description of what can be seen", "of the sea", "x" * 60, "y" * 60, "z" * 60]
    save_audit_pictures(tmp_path, made_up(tmp_path, told=told))
    lines = [line for line in written if line.startswith("water, boat")]
    assert len(lines) == 2  # in the overview and on the prompt's own sheet
    assert all(line.split(", ") == told[: line.count(", ") + 1] for line in lines)  # no word is cut
    assert all(2 < line.count(", ") + 1 < len(told) for line in lines)
    assert any("words that “clip-tiny” chose" in line for line in written)
    assert not any("no word tells" in line for line in written)


def test_hostile_words_are_drawn(tmp_path):
    save_audit_pictures(tmp_path, made_up(tmp_path, told=HOSTILE[:-1], model=HOSTILE[0]))
