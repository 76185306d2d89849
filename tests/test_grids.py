"""Pictures of audits and of comparisons."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import invdiff.report
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit
from invdiff.errors import AuditError, DataError
from invdiff.report import grids
from invdiff.report.grids import save_audit_pictures, save_before_after
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
        assert image.format == "PNG"
        assert image.width == 1600
        return np.asarray(image.convert("RGB"))


def has(path: Path, colour: tuple[int, int, int]) -> bool:
    return bool((pixels(path) == colour).all(axis=2).any())


def test_an_audit_is_drawn_largest_prompt_first_with_both_groups(tmp_path: Path, written: list[str]) -> None:
    data = make_audit(tmp_path)
    document = json.loads((tmp_path / "audit.json").read_text())
    document["prompts"][0]["num_images"] = 5
    (tmp_path / "audit.json").write_text(json.dumps(document))
    paths = save_audit_pictures(tmp_path, data)
    assert [path.name for path in paths] == ["groups.png", "prompt-00.png", "prompt-01.png"]
    assert all(has(path, colour) for path in paths for colour in (RED, BLUE))
    assert [line for line in written if line.startswith("“")] == [f"“{WATER}”", f"“{LAND}”"] * 2
    assert {"group 0 · 90%", "group 1 · 10%", "18 images", "2 images"} <= set(written)


def test_images_are_found_by_name_and_the_same_audit_is_the_same_file(tmp_path: Path) -> None:
    data = make_audit(tmp_path, prompts=(LAND,))
    first = [path.read_bytes() for path in save_audit_pictures(tmp_path, data)]
    shuffled = data.select(np.random.default_rng(0).permutation(len(data)))
    assert [path.read_bytes() for path in save_audit_pictures(tmp_path, shuffled)] == first


def test_strips_hold_typical_and_uncertain_images_once(tmp_path: Path, strips: list[int]) -> None:
    save_audit_pictures(tmp_path, make_audit(tmp_path, prompts=(LAND,), per_prompt=40, rare=5))
    assert strips == [8, 5, 12, 12, 5]


def test_names_are_drawn_and_images_left_out_are_not(tmp_path: Path, written: list[str], strips: list[int]) -> None:
    data = make_audit(tmp_path, prompts=(LAND,))
    name = "$\\water{ <b>" + "x" * 40
    edits = Edits(names=(("", name),)).without_images([0, 19]).with_cuts(0, [99.0])
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


def test_at_most_eight_prompts_are_drawn_and_old_pictures_go(tmp_path: Path) -> None:
    data = make_audit(tmp_path, prompts=tuple(f"prompt {index}" for index in range(9)), per_prompt=4, rare=1)
    (tmp_path / "prompt-42.png").write_bytes(b"of an earlier audit")
    with undrawn():
        paths = save_audit_pictures(tmp_path, data)
    assert sorted(tmp_path.glob("*.png")) == paths
    assert len(paths) == 9


def test_each_factor_has_its_picture(tmp_path: Path, written: list[str]) -> None:
    paths = save_audit_pictures(tmp_path, make_audit(tmp_path, prompts=(LAND,), factors=2))
    assert len(paths) == 3
    assert "factor 1 · group 1 · 10%" in written


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
    with pytest.raises(AuditError, match=r"found no audit\.json"):
        save_audit_pictures(tmp_path / "images", data)
    assert not list(tmp_path.glob("*.png"))


def test_before_and_after_stand_side_by_side(tmp_path: Path, written: list[str], strips: list[int]) -> None:
    pairs = {prompt: [(Image.new("RGB", (9, 9), RED), Image.new("RGB", (9, 9), BLUE))] * 8 for prompt in (LAND, WATER)}
    shares = {LAND: [{"land": 0.96, "water": 0.04}, {"land": 0.51, "x" * 900: 0.49}]}
    path = tmp_path / "a.png"
    save_before_after(path, pairs, ("Base model", HOSTILE[0]), subtitle="$s$", shares=shares)
    assert {"$s$", f"“{LAND}”", f"“{WATER}”", "land 96%", "water 4%", "land 51%", HOSTILE[0]} <= set(written)
    assert strips == [8] * 4
    assert has(path, RED)
    assert has(path, BLUE)


def test_report_imports_neither_torch_nor_pyplot() -> None:
    for file in Path(invdiff.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"torch", "matplotlib.pyplot"} & set(names)
