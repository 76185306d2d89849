"""Pictures of audits and of comparisons."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from safetensors.numpy import save_file

import invdiff.report
from invdiff.auditing.edits import apply
from invdiff.auditing.result import Audit
from invdiff.data.captioned import CaptionedImages, load_captioned_images
from invdiff.errors import AuditError, ConfigError, DataError, EvaluationError
from invdiff.evaluation.images import Row, read_images
from invdiff.report import style
from invdiff.report.audit_pictures import draw_histogram, save_audit_pictures
from invdiff.report.audit_reading import cuts, pages_of, rank_groups
from invdiff.report.comparison import Comparison, choose_images, same_seeds
from invdiff.report.comparison_pictures import save_before_after
from invdiff.report.sources import Generated
from invdiff.report.style import percent, plain, shorten, text_width, wrap

LAND, WATER = "a photo of a landbird", "a photo of a waterbird"
HOSTILE = (
    "$\\nonsense{1}{$ costs",
    "<b>a</b> & {x} %s \\n \\textbf{a}",
    "鳥の写真 🦜 \U000e0041 \ue000",
    "line\nbreak\ttab\x00\x07\u2028end",
    "\u202egnirts desrever\u202c" + "a\u0301\u0302\u0303\u0304\u0305" * 30,
    "\ud800 lone surrogate",
    "nospaces" * 500,
    "a very long caption of a waterbird " * 200,
    "טקסט بالعربية ไทย हिन्दी",
    " ",
)
SIZE = 24


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each strip holds."""
    counts: list[int] = []
    monkeypatch.setattr(style.Sheet, "images", lambda self, images, *_, **__: counts.append(len(images)))
    return counts


def make_audit(
    folder: Path,
    *,
    prompts: tuple[str, ...] = (LAND, WATER),
    found: bool = True,
    rare: int = 2,
    per_prompt: int = 20,
    factors: int = 1,
) -> CaptionedImages:
    """Write an audit whose last `rare` images of each prompt are group 1, and the images: group 0 is red."""
    (folder / "images").mkdir(parents=True)
    names, captions, labels, ids = [], [], [], []
    for index, prompt in enumerate(prompts):
        for place in range(per_prompt):
            label = int(place >= per_prompt - rare)
            name = f"images/{index}-{place}.png"
            Image.new("RGB", (SIZE, SIZE), ((200, 40, 40), (40, 40, 200))[label]).save(folder / name)
            names.append(name)
            captions.append(prompt if prompt.strip() else "blank")
            labels.append(label)
            ids.append(index)
    rng = np.random.default_rng(0)
    weights = np.eye(2, dtype=np.float32)[labels] if found else np.full((len(names), 2), 0.5, np.float32)
    tensors = {f"group_weights.{factor}": weights for factor in range(factors)}
    tensors["scores"] = (rng.normal(size=len(names)) + 8 * np.array(labels)).astype(np.float32)
    tensors["prompt_ids"] = np.array(ids)
    save_file(tensors, folder / "audit.safetensors")
    entries = [
        {
            "prompt": prompt,
            "captions": [prompt],
            "num_images": per_prompt,
            "found": found,
            "reason": "split by contrast" if found else f"one hump, not {prompt}",
            "evidence": f"contrast, {prompt}",
            "shares": [1 - rare / per_prompt, rare / per_prompt],
            "stability": 0.9,
            "separation": 0.8,
            "candidates": [],
        }
        for prompt in prompts
    ]
    document = {"num_groups": [2] * factors, "prompts": entries, "names": names}
    document |= {"forwards_per_image": 6.0, "settings": {}}
    (folder / "audit.json").write_text(json.dumps(document))
    rows = [{"file_name": name, "text": text} for name, text in zip(names, captions, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_captioned_images(folder)


def make_generated(
    folder: Path, *, prompts: tuple[str, ...] = (LAND, WATER), count: int = 3, scale: float = 3.0, seed: int = 0
) -> Path:
    folder.mkdir(exist_ok=True)
    rows = []
    for index, prompt in enumerate(prompts):
        for place in range(count):
            name = f"{index}-{place}-{scale}.png"
            Image.new("RGB", (SIZE, SIZE), (60 * place % 256, 90 * index % 256, 120)).save(folder / name)
            rows.append({"file_name": name, "prompt": prompt, "seed": seed + place, "guidance_scale": scale})
    with (folder / "manifest.jsonl").open("a") as manifest:
        manifest.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def colours(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def has(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((pixels == colour).all(axis=1).any())


@pytest.mark.parametrize("text", HOSTILE)
def test_any_caption_is_drawn_as_it_is_written(text: str, tmp_path: Path) -> None:
    sheet = style.Sheet(300, 80)
    sheet.text(10, 30, text, width=280)
    sheet.text(10, 60, text, width=280, bold=True)
    assert size(sheet.save(tmp_path / "text.png")) == (300, 80)


def test_markup_stays_text() -> None:
    assert plain("$x^2$ <b> \\alpha {a}") == "$x^2$ <b> \\alpha {a}"


def test_what_the_font_lacks_is_replaced() -> None:
    assert plain("鳥 bird\n\x00é") == "\ufffd bird é"


@pytest.mark.parametrize("text", HOSTILE)
def test_lines_fit_their_width(text: str) -> None:
    assert text_width(shorten(text, 200, 20), 20) <= 200
    lines = wrap(text, 200, 20, max_lines=3)
    assert len(lines) <= 3
    assert all(text_width(line, 20) <= 200 for line in lines)


def test_only_long_lines_end_in_an_ellipsis() -> None:
    assert shorten("a bird", 500, 20) == "a bird"
    assert shorten("a bird " * 100, 500, 20).endswith("…")


@pytest.mark.parametrize(
    ("share", "words"), [(0.0, "0%"), (0.001, "<1%"), (0.05, "5%"), (0.999, ">99%"), (1.0, "100%")]
)
def test_no_share_is_rounded_to_nothing(share: float, words: str) -> None:
    assert percent(share) == words


def test_groups_are_ranked_from_their_own_side() -> None:
    scores = np.array([-3.0, -1, 0, 4, 5, 9])
    low, high = rank_groups(np.eye(2)[[0, 0, 0, 1, 1, 1]], scores, np.arange(10, 16))
    assert low.typical == [10, 11, 12]
    assert low.uncertain == [12, 11, 10]
    assert high.typical == [15, 14, 13]
    assert high.uncertain == [13, 14, 15]


def test_sides_follow_the_scores_not_the_group_numbers() -> None:
    scores = np.array([9.0, 5, -3, -1])
    first, second = rank_groups(np.eye(2)[[0, 0, 1, 1]], scores, np.arange(4))
    assert first.typical == [0, 1]
    assert second.typical == [2, 3]


def test_a_group_between_two_others_is_typical_in_its_middle() -> None:
    scores = np.array([0.0, 10, 11, 13, 20])
    middle = rank_groups(np.eye(3)[[0, 1, 1, 1, 2]], scores, np.arange(5))[1]
    assert middle.typical[0] == 2
    assert middle.uncertain[0] == 3


def test_weights_come_before_scores() -> None:
    weights = np.array([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9]])
    group = rank_groups(weights, np.array([1.0, -5, 7]), np.arange(3))[0]
    assert group.typical == [0, 1]
    assert group.uncertain == [1, 0]


def test_cuts_are_midpoints_of_gaps() -> None:
    assert cuts(np.array([0.0, 1, 3, 8, 9]), np.array([1, 1, 1, 0, 0])) == [5.5]


def test_pages_are_of_the_images_kept_under_the_names_that_people_gave(tmp_path: Path) -> None:
    make_audit(tmp_path, factors=2)
    audit = Audit.load(tmp_path)
    edits = audit.edits.with_name(1, 1, "on water").without_images([18, 20, 39])
    land, land_again, water, _ = pages_of(apply(audit, edits))
    assert [land.index, land_again.index, water.index] == [0, 0, 1]
    assert [group.name for group in land.groups] == ["group 0", "group 1"]
    assert [group.name for group in land_again.groups] == ["group 0", "on water"]
    assert land.rows.tolist() == [*range(18), 19]
    assert water.rows.tolist() == [*range(21, 39)]
    assert [group.size for group in water.groups] == [17, 1]
    assert np.array_equal(water.scores, audit.scores[21:39])
    assert sorted(at for group in water.groups for at in group.typical) == water.rows.tolist()


def test_a_page_has_the_cuts_that_people_set(tmp_path: Path) -> None:
    make_audit(tmp_path)
    audit = Audit.load(tmp_path)
    land, water = pages_of(apply(audit, audit.edits.with_cuts(1, [0.25])))
    assert (land.by_hand, water.by_hand) == (False, True)
    assert water.cuts == [0.25]
    assert land.cuts == cuts(land.scores, land.labels)
    assert np.array_equal(water.labels, water.scores >= 0.25)
    axes = Figure().add_subplot()
    draw_histogram(axes, replace(water, cuts=[-99.0, 0.25, 99.0]))
    assert [line.get_xdata()[0] for line in axes.lines] == [0.25]  # what lies outside is not drawn


def test_names_are_drawn_and_images_left_out_are_not(tmp_path: Path, written: list[str], rows: list[int]) -> None:
    data = make_audit(tmp_path, prompts=(LAND,))
    audit = Audit.load(tmp_path)
    edits = audit.edits.with_name(0, 1, "$\\water{ <b>" + "x" * 40)
    apply(audit, edits.without_images([0, 19]).with_cuts(0, [99.0])).save_edits(tmp_path)
    save_audit_pictures(tmp_path, data)
    assert rows == [8, 0, 12, 6, 0]  # all are below the cut
    assert "group 0 · 100%" in written
    assert "$\\water{ <b>" + "x" * 40 + " · 0%" in written
    assert "score, as inferred" in written


def test_an_audit_is_drawn_largest_prompt_first(tmp_path: Path, written: list[str]) -> None:
    data = make_audit(tmp_path)
    document = json.loads((tmp_path / "audit.json").read_text())
    document["prompts"][0]["num_images"] = 5
    (tmp_path / "audit.json").write_text(json.dumps(document))
    paths = save_audit_pictures(tmp_path, data)
    assert [path.name for path in paths] == ["groups.png", "prompt-00.png", "prompt-01.png"]
    assert [size(path)[0] for path in paths] == [1600, 1800, 1800]
    assert [line for line in written if line.startswith("“")] == [f"“{WATER}”", f"“{LAND}”"] * 2
    assert {"group 0 · 90%", "group 1 · 10%"} <= set(written)


def test_both_groups_are_seen(tmp_path: Path) -> None:
    for path in save_audit_pictures(tmp_path, make_audit(tmp_path)):
        pixels = colours(path)
        assert has(pixels, (200, 40, 40))
        assert has(pixels, (40, 40, 200))


def test_images_are_found_by_name(tmp_path: Path) -> None:
    data = make_audit(tmp_path)
    first = [path.read_bytes() for path in save_audit_pictures(tmp_path, data)]
    shuffled = data.select(np.random.default_rng(0).permutation(len(data)))
    assert [path.read_bytes() for path in save_audit_pictures(tmp_path, shuffled)] == first


def test_no_row_has_more_images_than_asked_for(tmp_path: Path, rows: list[int]) -> None:
    save_audit_pictures(tmp_path, make_audit(tmp_path, prompts=(LAND,), per_prompt=30, rare=5), images_per_group=3)
    assert rows == [8, 5, 3, 3, 3, 2]


def test_nothing_found_is_said_with_the_reasons(tmp_path: Path, written: list[str]) -> None:
    paths = save_audit_pictures(tmp_path, make_audit(tmp_path, found=False))
    assert [path.name for path in paths] == ["groups.png"]
    assert {"No hidden group was found", f"one hump, not {LAND}", f"one hump, not {WATER}"} <= set(written)


def test_an_empty_group_is_said_to_be_empty(tmp_path: Path, written: list[str]) -> None:
    paths = save_audit_pictures(tmp_path, make_audit(tmp_path, rare=0))
    assert len(paths) == 3
    assert {"group 1 · 0%", "none under this prompt"} <= set(written)


def test_at_most_eight_prompts_are_drawn_and_old_pictures_go(tmp_path: Path) -> None:
    data = make_audit(tmp_path, prompts=tuple(f"prompt {index}" for index in range(9)), per_prompt=4, rare=1)
    (tmp_path / "prompt-42.png").write_bytes(b"of an earlier audit")
    paths = save_audit_pictures(tmp_path, data, images_per_group=2)
    assert sorted(tmp_path.glob("*.png")) == paths
    assert len(paths) == 9


def test_each_factor_has_its_picture(tmp_path: Path, written: list[str]) -> None:
    paths = save_audit_pictures(tmp_path, make_audit(tmp_path, prompts=(LAND,), factors=2))
    assert len(paths) == 3
    assert "factor 1 · group 1 · 10%" in written


def test_hostile_prompts_are_drawn(tmp_path: Path) -> None:
    prompts = tuple(text.replace("\ud800", "") for text in HOSTILE[:7])
    data = make_audit(tmp_path / "found", prompts=prompts, per_prompt=3, rare=1)
    assert len(save_audit_pictures(tmp_path / "found", data, images_per_group=1)) == 8
    data = make_audit(tmp_path / "not", prompts=prompts, per_prompt=3, rare=1, found=False)
    assert len(save_audit_pictures(tmp_path / "not", data)) == 1


def test_data_without_an_audited_image_is_refused(tmp_path: Path) -> None:
    data = make_audit(tmp_path)
    with pytest.raises(AuditError, match=r"without 1 of 40, first images/0-0\.png"):
        save_audit_pictures(tmp_path, data.select(range(1, 40)))


def test_an_image_that_has_gone_is_named(tmp_path: Path) -> None:
    data = make_audit(tmp_path)
    (tmp_path / "images/1-19.png").unlink()
    with pytest.raises(DataError, match=r"images/1-19\.png: the file does not exist"):
        save_audit_pictures(tmp_path, data)


def test_a_folder_without_an_audit_is_refused(tmp_path: Path) -> None:
    data = make_audit(tmp_path)
    with pytest.raises(ConfigError, match="images_per_group"):
        save_audit_pictures(tmp_path, data, images_per_group=0)
    (tmp_path / "audit.safetensors").write_bytes(b"nonsense")
    with pytest.raises(AuditError, match="Run `invdiff audit` again"):
        save_audit_pictures(tmp_path, data)
    with pytest.raises(AuditError, match=r"found no audit\.json"):
        save_audit_pictures(tmp_path / "images", data)


# Before and after

SHARES = {
    "base": {LAND: {"land": 0.96, "water": 0.04}, WATER: {"land": 0.0, "water": 1.0}},
    "guided": {LAND: {"land": 0.51, "water": 0.49}, WATER: {"land": 0.5, "water": 0.5}},
}


def compared(
    base: Path, guided: Path, names: tuple[str, str] = ("base", "guided")
) -> tuple[dict[str, list[tuple[Row, Row]]], Comparison]:
    """Two folders' images of the same prompts and seeds, and what is compared."""
    images = {
        name: Generated(read_images(folder), [name], [{}]) for name, folder in zip(names, (base, guided), strict=True)
    }
    chosen = choose_images(images)
    assert chosen is not None
    return same_seeds(images, chosen), chosen


def test_before_and_after_stand_side_by_side(tmp_path: Path, written: list[str]) -> None:
    pairs, chosen = compared(make_generated(tmp_path / "base"), make_generated(tmp_path / "guided"))
    path = save_before_after(tmp_path / "out" / "hero.png", pairs, chosen, shares=SHARES, title="$Title$")
    assert size(path)[0] == 1600
    assert {"$Title$", f"“{LAND}”", f"“{WATER}”", "land 96%", "water 4%", "land 51%"} <= set(written)
    assert written.count("Base model") == written.count("With guidance") == 2
    assert any("what guidance makes of the same starting noise" in text for text in written)


def test_models_of_other_names_are_called_by_them(tmp_path: Path, written: list[str]) -> None:
    base, guided = make_generated(tmp_path / "a"), make_generated(tmp_path / "b")
    save_before_after(tmp_path / "x.png", *compared(base, guided, ("theirs", "ours")))
    assert written.count("theirs") == written.count("ours") == 2
    assert not any("what guidance makes" in text for text in written)


def test_only_images_of_the_same_seeds_are_compared(tmp_path: Path, rows: list[int]) -> None:
    base, guided = make_generated(tmp_path / "a", count=5), make_generated(tmp_path / "b", count=5, seed=2)
    save_before_after(tmp_path / "x.png", *compared(base, guided))
    save_before_after(tmp_path / "x.png", *compared(base, guided), columns=2, prompts=[WATER])
    assert rows == [3, 3, 3, 3, 2, 2]
    with pytest.raises(EvaluationError, match="the same prompts and seeds"):
        save_before_after(tmp_path / "x.png", *compared(base, make_generated(tmp_path / "c", seed=99)))


def test_hostile_prompts_are_compared(tmp_path: Path) -> None:
    prompts = tuple(text.encode("utf-8", "replace").decode() for text in HOSTILE[:9])
    base = make_generated(tmp_path / "a", prompts=prompts, count=2)
    guided = make_generated(tmp_path / "b", prompts=prompts, count=2)
    shares = {prompt: {text: 1 / len(HOSTILE) for text in HOSTILE} for prompt in prompts}
    names = ("<b>$\\nonsense{", "x" * 10_000)
    both = dict.fromkeys(names, shares)
    path = save_before_after(tmp_path / "x.png", *compared(base, guided, names), prompts=prompts, shares=both)
    assert size(path)[0] == 1600


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    base, guided, path = make_generated(tmp_path / "a"), make_generated(tmp_path / "b"), tmp_path / "x.png"
    pairs, chosen = compared(base, guided)
    with pytest.raises(EvaluationError, match="Expected images of 'a cat'"):
        save_before_after(path, pairs, chosen, prompts=["a cat"])
    with pytest.raises(EvaluationError, match="Expected the 'guided' shares"):
        save_before_after(path, pairs, chosen, shares={"base": SHARES["base"]})
    with pytest.raises(ConfigError, match="columns"):
        save_before_after(path, pairs, chosen, columns=0)
    with pytest.raises(ConfigError, match="at least one prompt"):
        save_before_after(path, pairs, chosen, prompts=[])
    (base / "0-1-3.0.png").unlink()
    with pytest.raises(EvaluationError, match=r"readable image at .*0-1-3\.0\.png"):
        save_before_after(path, pairs, chosen)
    assert not path.exists()


def test_report_imports_neither_torch_nor_pyplot() -> None:
    for file in Path(invdiff.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"torch", "matplotlib.pyplot"} & set(names)
