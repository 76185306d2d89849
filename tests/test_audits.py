"""The benchmark of the audit: truth, judgement, and figures that are kept."""

import audits
import judging
import numpy as np

from invdiff.auditing.result import PromptAudit
from invdiff.data.birds import BirdsWorld
from invdiff.files import read_json
from runs import built_audit


def test_the_minority_is_what_is_rarer_with_a_subject_than_with_the_others():
    values = ["land"] * 9 + ["water"] + ["water"] * 4 + ["land"]
    subjects = ["landbird"] * 10 + ["waterbird"] * 5
    assert np.flatnonzero(judging.minority(values, subjects)).tolist() == [9, 14]
    assert np.flatnonzero(judging.minority(values[:10], subjects[:10])).tolist() == [9]  # one subject: rarer than even
    races = list("WWWBBEI" + "WBEEIII")
    assert np.flatnonzero(judging.minority(races, ["man"] * 7 + ["woman"] * 7)).tolist() == [5, 6, 7, 8]


def audit_of(data):
    """An audit that has found the background, and is sure."""
    subjects = data.attributes["subject"]
    prompts = [PromptAudit(name, [name], subjects.count(name), True, "split") for name in ("landbird", "waterbird")]
    rare = judging.minority(data.attributes["background"], subjects).astype(int)
    prompt_ids = [int(name == "waterbird") for name in subjects]
    return built_audit((np.eye(2)[rare],), prompt_ids, prompts, data.names, [rare])


def test_a_cell_is_audited_once_without_attributes_and_tabled(tmp_path, monkeypatch, tiny_pipe_dir):
    world, seen = BirdsWorld(200, seed=3, severity=0.7), []

    def audit(pipe, data, *, ask, cache_dir):
        assert not ask
        cache_dir.mkdir(parents=True)
        seen.append(data)
        return audit_of(world.captioned())

    monkeypatch.setattr(audits, "audit", audit)
    monkeypatch.setattr(audits.kept, "RESULTS", tmp_path / "results")
    cell = audits.Cell("0.7-seed-3", world.write, tiny_pipe_dir, ("background",))
    for _ in range(2):
        audits.run("waterbirds", cell, tmp_path / "work")
    (data,) = seen
    assert (data.attributes, data.fingerprint) == ({}, world.captioned().fingerprint)
    figures = read_json(tmp_path / "results/audits/waterbirds-0.7-seed-3.json")["figures"]
    assert figures["hidden"]["background"][0]["auroc"] == 1.0
    assert not list((tmp_path / "work" / "cells").iterdir())
    (row,) = [line for line in audits.table().splitlines() if line.startswith("| 0.7 ")]
    assert "| background | 1 | 1 | 2 of 2 | 1.000 |" in row
