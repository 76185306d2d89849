"""Pictures of audits and of comparisons."""

import numpy as np
import pytest
from PIL import Image

from invdiff.report.compare import compare
from invdiff.report.grids import save_audit_picture, save_before_after
from invdiff.report.read import find_parts, read_run
from runs import HOSTILE, LAND, WATER, make_audit

RED, BLUE = (200, 40, 40), (40, 40, 200)


def pixels(path):
    with Image.open(path) as image:
        assert (image.format, image.width) == ("PNG", 1600)
        return np.asarray(image.convert("RGB"))


def test_an_audit_is_drawn_with_its_images_by_name(tmp_path, drawn):
    data = make_audit(tmp_path, per_prompt=40, rare=5)
    path = save_audit_picture(tmp_path, data)
    assert path == tmp_path / "groups.png"
    assert all((pixels(path) == colour).all(axis=2).any() for colour in (RED, BLUE))
    of_prompt = ["group 0 · 88% · 35 images", "most typical", 8, "least certain", 8]
    of_prompt += ["group 1 · 12% · 5 images", "most typical", 5]
    for prompt in (LAND, WATER):
        start = drawn.index(f"“{prompt}”") - len(of_prompt)
        assert drawn[start : start + len(of_prompt)] == of_prompt
    first = path.read_bytes()
    shuffled = data.select(np.random.default_rng(0).permutation(len(data)))
    assert save_audit_picture(tmp_path, shuffled).read_bytes() == first


@pytest.mark.parametrize("found", [True, False])
def test_hostile_prompts_are_drawn_inside_the_margins(tmp_path, drawn, found):
    prompts = tuple(text.replace("\ud800", "") for text in (*HOSTILE[:9], "W" * 500))
    path = save_audit_picture(tmp_path, make_audit(tmp_path, prompts=prompts, per_prompt=3, rare=1, found=found))
    assert (pixels(path)[:, -60:] == 255).all()
    assert sum(str(part).startswith("group 1 · ") for part in drawn) == (8 if found else 0)  # and no more
    assert ("No hidden group was found" in drawn) == (not found)
    assert any(str(part).startswith("one hump, not WWW") for part in drawn) == (not found)


def test_before_and_after_stand_above_each_other(finished, tmp_path, drawn):
    chosen = compare(read_run(find_parts(finished)))
    assert chosen is not None
    save_before_after(tmp_path / "a.png", chosen)
    land = [f"“{LAND}”", "Base model · land 90% · water 10%", 8, "With guidance · land 55% · water 45%", 8]
    assert drawn[2:7] == land
    assert f"“{WATER}”" in drawn
    assert (pixels(tmp_path / "a.png") == (0, 0, 120)).all(axis=2).any()
