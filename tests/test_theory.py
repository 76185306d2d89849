"""The method in a plane of Gaussians, where every score is known."""

import pytest
import theory
from theory import amplified, penalties, scores, strengths


def test_guidance_learns_the_balanced_score_as_far_as_groups_are_pure():
    found = scores(images_per_prompt=60_000)
    assert all(row["from predicted"] < 0.02 for row in found.values())
    assert found["true"]["from balanced"] < 0.02
    rough, pure = found["inferred, as they are"], found["purified"]
    assert rough["said, prompt 0"] == pytest.approx(rough["wrong, prompt 0"], abs=0.01)
    assert pure["from balanced"] < 0.02 < 0.05 < rough["from balanced"]
    assert rough["wrong, prompt 0"] > 0.15 > 0.01 > max(pure["wrong, prompt 0"], pure["wrong, prompt 1"])


@pytest.mark.parametrize(
    ("deviations", "prompt", "raw", "frozen", "guided"),
    [
        ((0.3, 0.3), 0, (0.2413, 0.0), (0.0288, 0.1033), (0.2413, 0.0)),
        ((0.3, 0.8), 0, (0.2910, 0.0102), (0.0534, 0.0430), (0.2172, 0.0008)),  # the rare group is harder
        ((0.3, 0.8), 1, (0.0911, 0.0102), (0.0135, 0.0823), (0.1409, 0.0008)),
    ],
)
def test_only_the_excess_over_a_guided_null_row_is_a_sound_penalty(deviations, prompt, raw, frozen, guided):
    found = penalties(deviations, prompt)
    for name, expected in (("raw", raw), ("frozen", frozen), ("guided", guided)):
        assert found[name] == pytest.approx(expected, abs=2e-4)


def test_cfg_amplifies_what_tells_prompts_apart_within_a_group(monkeypatch):
    monkeypatch.setattr(theory, "SCALES", (1.0, 3.0, 7.5))
    on, matched, off = (amplified(null) for null in ("on", "matched", "off"))
    assert on["drawn"][0] < on["drawn"][1] < on["formula"][1]
    assert on["density"][-1] < on["drawn"][-1] < on["formula"][-1]
    assert matched["drawn"] == pytest.approx([theory.WRONG] * 3, abs=0.02)
    assert off["drawn"] == pytest.approx(off["formula"], abs=0.02)
    apart = amplified("on", subject=0.0)
    assert apart["density"] == pytest.approx(apart["formula"], abs=1e-3)  # exact where the subject does not matter


def test_delta_interpolates_densities_geometrically():
    found = strengths()
    assert found["drawn"][:5] == pytest.approx(found["formula"][:5], abs=0.06)
