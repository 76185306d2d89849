"""Which hidden factors are found in made-up evidence, and an audit of two of them until people see it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from conftest import make_tiny_pipeline
from invdiff import attach, generate, load_captioned_images, load_guidance, train
from invdiff.auditing.cuts import Cut, weigh
from invdiff.auditing.evidence import Evidence
from invdiff.auditing.factors import Shifts, no_bias
from invdiff.auditing.result import Audit, Candidate, PromptAudit
from invdiff.auditing.scores import Score, not_learned
from invdiff.cli.print import print_audit
from invdiff.config import AuditConfig, GenerateConfig, TrainConfig
from invdiff.data.encode import as_encoded
from invdiff.errors import ConfigError
from invdiff.models.frozen import denoiser_fingerprint
from runs import built_audit, inferred, made_up_data, report, sharded, undrawn

OWN = "factor 2 was found under"

BIRDS = ["a landbird", "a waterbird"]
PROMPT = np.arange(600) % 2  # of images of two prompts


def attribute(share, prompt=PROMPT, seed=0):
    """Whether each image has an attribute, which `share` (prompts,) of each prompt's images have exactly."""
    rng, has = np.random.default_rng(seed), np.zeros(len(prompt), dtype=bool)
    for number, part in enumerate(share):
        rows = rng.permutation(np.flatnonzero(prompt == number))
        has[rows[: round(part * len(rows))]] = True
    return has


def views(*attributes, strength=8.0, width=30, seed=1):
    """Features (n, 2, width) of independent styles, the prompt and each attribute, in two noisy views."""
    rng = np.random.default_rng(seed)
    styles = rng.normal(size=(len(PROMPT), 6)) @ rng.normal(size=(6, width))
    content = styles + np.outer(PROMPT, 0.1 * rng.normal(size=width))
    for own in attributes:
        content += strength * np.outer(own, rng.normal(size=width))
    return np.stack([content + rng.normal(0, 0.5, content.shape) for _ in range(2)], axis=1)


def evidence(middle, upper=None):
    losses = np.random.default_rng(2).normal(size=(len(PROMPT), 1, 2, 2))
    stack = None if upper is None else sharded(np.stack([upper, upper[:, ::-1]], axis=1))
    return Evidence(losses, sharded(middle), stack)


def found_in(measured, **settings):
    return inferred(made_up_data(BIRDS, PROMPT), measured, [0, 1], **settings)


def agreements(audit, m, truth):
    """The adjusted Rand index of a factor's groups with the truth under each prompt."""
    groups = audit.group_weights[m].argmax(axis=1)
    return [adjusted_rand_score(truth[prompt == PROMPT], groups[prompt == PROMPT]) for prompt in (0, 1)]


def test_a_confounded_place_that_only_the_margin_shows_is_found_in_both_prompts_with_columns_matched():
    place = attribute([0.1, 0.9])
    # Components are looked for in the middle block alone.
    audit = found_in(evidence(views(), upper=views(place)), max_factors=1)
    assert [len(factor.splits) for factor in audit.factors] == [2]
    assert all(split.evidence.startswith("which-prompt margin") for split in audit.factors[0].splits)
    assert min(agreements(audit, 0, place)) > 0.9
    assert adjusted_rand_score(place, audit.group_weights[0].argmax(axis=1)) > 0.9
    for split in audit.factors[0].splits:
        (low, high), share = split.intervals[int(np.argmin(split.shares))], min(split.shares)
        assert low < share < high < 0.2
        assert low < 0.1 < high


def test_two_hidden_attributes_are_two_factors_unless_one_is_asked_for():
    first, second = attribute([0.1, 0.9]), attribute([0.85, 0.15], seed=5)
    measured = evidence(views(first, second))
    audit = found_in(measured, max_factors=2)
    assert [len(factor.splits) for factor in audit.factors] == [2, 2]
    by_factor = [[min(agreements(audit, m, truth)) for truth in (first, second)] for m in (0, 1)]
    assert max(by_factor, key=lambda pair: pair[0])[0] > 0.9
    assert max(by_factor, key=lambda pair: pair[1])[1] > 0.9
    for split in (split for factor in audit.factors for split in factor.splits):
        candidates = audit.prompts[split.prompt].candidates
        assert split.evidence in [one.evidence for one in candidates if not one.refusal]
    (alone,) = (again := found_in(measured, max_factors=1)).factors
    assert alone == audit.factors[0]
    assert again.group_weights[0].tobytes() == audit.group_weights[0].tobytes()


def test_a_margin_that_mixes_two_attributes_is_parted_into_two_factors(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PROMPT", np.arange(2000) % 2)
    place, light = (attribute([0.1, 0.9], PROMPT, seed) for seed in (0, 5))
    audit = found_in(evidence(views(), upper=views(place, light)))  # components are of the middle block alone
    assert [len(factor.splits) for factor in audit.factors] == [2, 2]
    assert sorted(min(agreements(audit, m, place)) > 0.9 for m in (0, 1)) == [False, True]
    assert sorted(min(agreements(audit, m, light)) > 0.9 for m in (0, 1)) == [False, True]
    told = [one.refusal for prompt in audit.prompts for one in prompt.candidates]
    assert any("it mixes two attributes" in refusal for refusal in told)


@pytest.mark.parametrize(
    ("shares", "reason"), [([0.5, 0.5], "even"), ([0.85, 0.85], "uneven"), ([0.15, 0.0], "uneven"), ([0.0, 1.0], "")]
)
def test_what_is_not_seen_to_differ_between_prompts_or_is_the_prompt_is_no_hidden_bias(shares, reason):
    audit = found_in(evidence(views(attribute(shares))))
    assert audit.factors == []
    assert (audit.group_weights[0] == 0.5).all()
    refusals = [one.refusal for prompt in audit.prompts for one in prompt.candidates]
    assert all(refusals)
    assert any(f"the groups are {reason} (" in refusal for refusal in refusals) == bool(reason)
    for prompt in audit.prompts:
        assert prompt.reason.startswith("no hidden group: ")
        assert prompt.power == "300 images are too few to see a group of any size 4 standard deviations away"


def test_a_cut_of_half_of_a_style_is_not_one_with_the_style_under_another_prompt():
    features = np.random.default_rng(0).normal(size=(4000, 40))
    side = features[:, 0] > 0
    features[:, 0] = 2.0 * side - 1 + 0.3 * features[:, 2]
    half, members = side & (features[:, 1] > 0), {0: np.arange(2000), 1: np.arange(2000, 4000)}

    def cut(groups):
        candidate = Candidate("style", 2, [1 - groups.mean(), groups.mean()], 1.0, 6.0, 1.0, 50.0, "")
        score = Score("style", groups[None].astype(float), lambda known: [])
        return Cut(candidate, score, np.eye(2)[groups.astype(int)])

    own, other = [cut(half[:2000]), cut(side[:2000])], {1: [cut(side[2000:])]}
    shifts = Shifts([features], members)
    assert list(shifts.gather(0, own[1], own, other, 0)) == [0, 1]
    assert list(shifts.gather(0, own[0], own, other, 0)) == [0]
    assert list(shifts.gather(0, own[0], own[:1], other, 0)) == [0, 1]  # without the style beside it they are alike


def test_a_prompt_alone_is_judged_by_how_uneven_it_is():
    tinted, other = attribute([0.15, 0.15]), attribute([0.2, 0.2], seed=7)
    audit = inferred(made_up_data(["a bird"], 0 * PROMPT), evidence(views(tinted, other)), [0])
    assert len(audit.factors) == 1  # more are styles, unless they are asked for
    labels = audit.group_weights[0].argmax(axis=1)
    assert max(adjusted_rand_score(own, labels) for own in (tinted, other)) > 0.9


@pytest.mark.parametrize("alike", [False, True])
def test_prompts_that_hide_different_attributes_have_a_factor_each_and_its_groups_mean_nothing_elsewhere(alike):
    hidden = [attribute([0.1, 0.0]), attribute([0.0, 0.1], seed=1)]
    measured = evidence(views(hidden[0] | hidden[1]) if alike else views(*hidden))
    measured.losses[..., 0] += 20 * (hidden[0] | hidden[1])[:, None, None]  # the contrast shows both
    audit = found_in(measured, solver="exact")
    expected = [[0, 1]] if alike else [[0], [1]]
    assert repr(audit).startswith("Audit(600 images; prompts: 'a landbird', 'a waterbird'; factors: factor 1 (2 gro")
    assert [[split.prompt for split in factor.splits] for factor in audit.factors] == expected
    each = [f"factor {m} was found under {bird!r} alone" for m, bird in enumerate(BIRDS, start=1)]
    assert audit.caveats == ("" if alike else f"{', '.join(each)}; under other prompts such groups have no meaning.")
    for m, factor in enumerate(audit.factors):
        for split in factor.splits:
            assert agreements(audit, m, hidden[split.prompt])[split.prompt] == 1
    if not alike:  # guidance learns to ignore what it is given of the other prompt
        assert (audit.group_weights[0][PROMPT == 1] == 0.5).all()
        assert (audit.group_weights[1][PROMPT == 0] == 0.5).all()


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """The folder of an audit, and its images: factor 1 splits both prompts, factor 2 the second one, softly."""
    folder, pipe, images = tmp_path_factory.mktemp("made"), make_tiny_pipeline(), load_captioned_images(tiny_folder)
    data = as_encoded(pipe, images, folder / "cache", progress=False)
    ids, last, odd = data.caption_ids.numpy(), np.arange(12) >= 9, np.arange(12) % 4 == 3
    soft = np.where(ids[:, None] == 1, np.where(odd[:, None], [0.1, 0.1, 0.8], [0.7, 0.2, 0.1]), 1 / 3)
    prompts = [PromptAudit(text, [text], 6, True, "made up", power="a third") for text in data.captions]
    plain = built_audit((np.eye(2)[last.astype(int)], soft), ids, prompts, data.names, [last, soft[:, 2]])
    settings = {"data_fingerprint": data.data_fingerprint, "denoiser_fingerprint": denoiser_fingerprint(pipe)}
    replace(plain, settings=settings).save(folder / "audit")
    return folder, images


def test_a_module_learns_every_factor_and_each_is_asked_for_by_name(made, tmp_path, capsys):
    pipe, audit = make_tiny_pipeline(), Audit.load(made[0] / "audit")
    config = TrainConfig(steps=3, batch_size=4, preserve=0, mixed_precision="no")
    train(pipe, made[1], audit, tmp_path / "m", config=config, cache_dir=made[0] / "cache", progress=False)
    module = load_guidance(tmp_path / "m")
    assert (module.num_groups, module.factor_names) == ((2, 3), ("factor 1", "factor 2"))
    assert OWN in capsys.readouterr().err
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.count("| factor 1 | 6 |") == 2 * card.count("| factor 2 | 6 |") == 2
    mixes = ({"factor 2": [0, 0, 1]}, {1: [0.0, 0.0, 1.0], "factor 1": [1, 0]})
    drawn = []
    for number, mix in enumerate(mixes):
        draw = GenerateConfig(images_per_prompt=8, num_inference_steps=1)
        options = {"module": module, "config": draw, "environments": mix, "progress": False}
        drawn.append((generate(pipe, ["a"], tmp_path / f"{number}", **options) / "manifest.jsonl").read_text())
    assert [[text.count(f'"environment": [{e}, 2]') for e in (0, 1)] for text in drawn][1] == [8, 0]
    assert drawn[0].count('"environment": [0, 2]') == 4  # factor 1 is even
    for wrong in ({"factor 3": [1, 0]}, {2: [1, 0]}, {"factor 1": [1, 0], 0: [1, 0]}):
        with pytest.raises(ConfigError, match=r"names of the module's factors, each once, of 'factor 1', 'factor 2'"):
            attach(pipe, module, environments=wrong)


def test_people_see_every_factor(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    audit = Audit.load(made[0] / "audit")
    print_audit(audit)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line[:1] in "┏┃┡│└"]
    assert {len(line) for line in table} == {80}
    assert [sum(f"│ factor {m} │" in line for line in table) for m in (1, 2)] == [2, 1]
    assert any(line.startswith(OWN) for line in lines)
    assert "a third" not in " ".join(lines)  # the power, which is told where nothing was found
    odd = "a bird\n\x1b[31m" + 30 * " by the sea"  # of many lines, with codes of a terminal
    print_audit(replace(audit, prompts=[replace(prompt, found=False, prompt=odd) for prompt in audit.prompts]))
    shown = capsys.readouterr().out
    assert "a third" in shown
    assert "\x1b" not in shown
    assert shown.count("sea") < 3 * 10 + 3 * 10  # of ninety
    with undrawn():
        page, twin = report(tmp_path, audit=made[0] / "audit", data=made[1])
    for words in ("factor 2 · “a photo of a waterbird”", "by 2 hidden factors", OWN, "wrong captions"):
        assert words in page.words
    assert "| factor 2 · a photo of a waterbird |" in twin


@pytest.mark.parametrize(("copies", "at"), [(40, 14.0), (150, 3.0)])
def test_copies_of_one_image_decide_no_cut(copies, at):
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0, 1, 540), rng.normal(5, 1, 60), np.full(copies, at)])
    scores, once = [not_learned("margin", np.stack([values, values]))], np.arange(len(values)) <= 600
    cut = next(cut for cut in weigh(scores, once, AuditConfig(), rng) if cut.candidate.num_groups == 2)
    groups = cut.weights.argmax(axis=1)
    assert (groups[540:600] == 1).mean() > 0.9
    assert (groups[:540] == 0).mean() > 0.98


def test_copies_make_no_association_of_prompts_and_groups():
    groups = {0: np.repeat([1, 0], [12, 48]), 1: np.repeat([1, 0], [27, 33])}

    def said(copies):
        cuts, counted = {}, {}
        for prompt, of in groups.items():
            every, shares = np.tile(of, copies), (np.bincount(of) / len(of)).tolist()
            told = Candidate("component", 2, shares, 1.0, 4.0, 0.9, 30.0, "")
            cuts[prompt] = Cut(told, not_learned("component", every[None].astype(float)), np.eye(2)[every])
            counted[prompt] = np.arange(len(every)) < len(of)
        return no_bias(cuts[0], cuts, counted, 2, np.log(100 / 0.05), AuditConfig())

    assert said(1) == said(5) != ""
