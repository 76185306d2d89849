"""Pictures of audits and of comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit
from invdiff.errors import AuditError, DataError
from invdiff.report import grids
from invdiff.report.compare import compare
from invdiff.report.grids import save_audit_pictures, save_before_after
from invdiff.report.read import find_parts, read_run
from runs import HOSTILE, LAND, WATER, make_audit, undrawn

RED, BLUE = (200, 40, 40), (40, 40, 200)


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each strip holds."""
    counts: list[int] = []
    original = grids._strip

    def strip(images: list[Image.Image], *args: float, **options: int) -> object:
        counts.append(len(images))
        return original(images, *args, **options)

    monkeypatch.setattr(grids, "_strip", strip)
    return counts


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.width) == ("PNG", 1600)
        return np.asarray(image.convert("RGB"))


def test_an_audit_is_drawn_largest_prompt_first_with_its_images_by_name(tmp_path: Path, written: list[str]) -> None:
    data = make_audit(tmp_path)
    document = json.loads((tmp_path / "audit.json").read_text())
    document["prompts"][0]["num_images"] = 5
    (tmp_path / "audit.json").write_text(json.dumps(document))
    paths = save_audit_pictures(tmp_path, data)
    assert [path.name for path in paths] == ["groups.png", "prompt-00.png", "prompt-01.png"]
    assert all((pixels(path) == colour).all(axis=2).any() for path in paths for colour in (RED, BLUE))
    assert [line for line in written if line.startswith("“")] == [f"“{WATER}”", f"“{LAND}”"] * 2
    assert {"group 0 · 90%", "group 1 · 10%", "18 images", "2 images"} <= set(written)
    first = [path.read_bytes() for path in paths]
    shuffled = data.select(np.random.default_rng(0).permutation(len(data)))
    assert [path.read_bytes() for path in save_audit_pictures(tmp_path, shuffled)] == first


def test_strips_hold_typical_and_uncertain_images_once(tmp_path: Path, strips: list[int]) -> None:
    save_audit_pictures(tmp_path, make_audit(tmp_path, prompts=(LAND,), per_prompt=40, rare=5))
    assert strips == [8, 5, 12, 12, 5]


def test_names_are_drawn_and_images_left_out_are_not(tmp_path: Path, written: list[str], strips: list[int]) -> None:
    data = make_audit(tmp_path, prompts=(LAND,))
    name = "$\\water{ <b>" + "x" * 40
    edits = Edits(names=(("", name),)).without_images([0, 19]).with_cuts(0, 0, [99.0])
    apply(Audit.load(tmp_path), edits).save_edits(tmp_path)
    save_audit_pictures(tmp_path, data)
    assert strips == [8, 0, 12, 6]  # all are below the cut
    assert "group 0 · 100%" in written
    assert any(line.startswith("$\\water{ <b>xx") and line.endswith(" · 0%") for line in written)
    assert "none under this prompt" in written


def test_nothing_found_is_said_with_the_reasons(tmp_path: Path, written: list[str]) -> None:
    paths = save_audit_pictures(tmp_path, make_audit(tmp_path, found=False))
    assert [path.name for path in paths] == ["groups.png"]
    assert {"No hidden group was found", f"one hump, not {LAND}", f"one hump, not {WATER}"} <= set(written)


def test_at_most_eight_pictures_of_prompts_and_factors_are_drawn_and_old_ones_go(tmp_path: Path) -> None:
    data = make_audit(tmp_path, prompts=tuple(f"prompt {index}" for index in range(5)), per_prompt=4, factors=2)
    (tmp_path / "prompt-42.png").write_bytes(b"of an earlier audit")
    with undrawn():
        paths = save_audit_pictures(tmp_path, data)
    assert sorted(tmp_path.glob("*.png")) == paths
    assert len(paths) == 9


@pytest.mark.parametrize("found", [True, False])
def test_hostile_prompts_are_drawn_inside_the_margins(tmp_path: Path, found: bool) -> None:
    prompts = tuple(text.replace("\ud800", "") for text in (*HOSTILE[:7], "W" * 500))
    data = make_audit(tmp_path, prompts=prompts, per_prompt=3, rare=1, found=found)
    paths = save_audit_pictures(tmp_path, data)
    assert len(paths) == (9 if found else 1)
    assert all((pixels(path)[:, -60:] == 255).all() for path in paths)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    data = make_audit(tmp_path)
    with pytest.raises(AuditError, match=r"without 1 of 40, first images/0-0\.png"):
        save_audit_pictures(tmp_path, data.select(range(1, 40)))
    (tmp_path / "images/1-19.png").unlink()
    with pytest.raises(DataError, match=r"images/1-19\.png: the file does not exist"):
        save_audit_pictures(tmp_path, data)
    assert not list(tmp_path.glob("*.png"))


def test_before_and_after_stand_above_each_other(
    finished: Path, tmp_path: Path, written: list[str], strips: list[int]
) -> None:
    chosen = compare(read_run(find_parts(finished)))
    assert chosen is not None
    save_before_after(tmp_path / "a.png", chosen)
    lines = {f"“{LAND}”", f"“{WATER}”", "Base model", "With guidance", "land 90%", "water 10%", "land 55%"}
    assert lines <= set(written)
    assert strips == [8] * 4
    assert (pixels(tmp_path / "a.png") == (0, 0, 120)).all(axis=2).any()
