"""The benchmark of the audit: truth, judgement, and figures that are kept."""

import audits
import judging
import numpy as np
import pytest

from invdiff.auditing.result import Audit, Factor, PromptAudit, PromptSplit
from invdiff.data.birds import BirdsWorld
from invdiff.data.captioned import load_captioned_images
from invdiff.files import read_json


def test_the_minority_is_what_is_rarer_with_a_subject_than_with_the_others():
    values = ["land"] * 9 + ["water"] + ["water"] * 4 + ["land"]
    subjects = ["landbird"] * 10 + ["waterbird"] * 5
    assert np.flatnonzero(judging.minority(values, subjects)).tolist() == [9, 14]
    assert np.flatnonzero(judging.minority(values[:10], subjects[:10])).tolist() == [9]  # one subject: rarer than even
    races = list("WWWBBEI" + "WBEEIII")
    assert np.flatnonzero(judging.minority(races, ["man"] * 7 + ["woman"] * 7)).tolist() == [5, 6, 7, 8]


@pytest.fixture
def birds(tmp_path):
    """A drawn world of 200 images."""
    return load_captioned_images(BirdsWorld(200, seed=3, severity=0.7).write(tmp_path / "birds"))


def audit_of(data, *attributes):
    """An audit that has found these attributes, each as a factor, and is sure."""
    subjects, factors, weights, scores = data.attributes["subject"], [], [], []
    prompts = [PromptAudit(name, [name], subjects.count(name), True, "split") for name in ("landbird", "waterbird")]
    prompt_ids = np.array([name == "waterbird" for name in subjects]).astype(int)
    for number, attribute in enumerate(attributes):
        rare = judging.minority(data.attributes[attribute], subjects).astype(np.float32)
        shares = [rare[prompt_ids == prompt].mean() for prompt in (0, 1)]
        splits = [PromptSplit(k, "", [1 - s, s], [(0, 1)] * 2, 4.0, 1.0, 0.9, 9.0) for k, s in enumerate(shares)]
        factors.append(Factor(f"factor {number + 1}", splits))
        weights.append(np.stack([1 - rare, rare], axis=1))
        scores.append(rare)
    return Audit(tuple(weights), np.stack(scores), prompt_ids, prompts, factors, data.names, 6.0, {})


def test_a_cell_is_audited_once_without_attributes_and_stands_in_the_table(
    birds, tmp_path, monkeypatch, tiny_pipe_dir
):
    seen = []

    def audit(pipe, data, *, ask, cache_dir):
        assert not ask
        cache_dir.mkdir(parents=True)
        seen.append(data)
        return audit_of(birds, "background")

    monkeypatch.setattr(audits, "audit", audit)
    monkeypatch.setattr(audits.kept, "RESULTS", tmp_path / "results")
    cell = audits.Cell("0.7-seed-3", BirdsWorld(200, seed=3, severity=0.7).write, tiny_pipe_dir, ("background",))
    for _ in range(2):
        audits.run("waterbirds", cell, tmp_path / "work")
    (data,) = seen
    assert data.attributes == {}
    assert data.fingerprint == birds.fingerprint
    figures = read_json(tmp_path / "results/audits/waterbirds-0.7-seed-3.json")["figures"]
    assert figures["hidden"]["background"][0]["auroc"] == 1.0
    assert not list((tmp_path / "work" / "cells").iterdir())
    (row,) = [line for line in audits.table().splitlines() if line.startswith("| 0.7 ")]
    assert "| background | 1 | 1 | 2 of 2 | 1.000 |" in row
