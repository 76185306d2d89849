"""Reports are passed on: what their commands name tells nothing of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from invdiff.report.part_names import shown_path, without_paths


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("photos", "photos"),
        (Path("out/demo/audit"), "out/demo/audit"),
        ("../photos", "../photos"),
        ("org/birds", "org/birds"),
        ("/home/alice/photos", "photos"),
        (Path("/home/alice/photos"), "photos"),
        ("/home/alice/photos/", "photos"),
        ("~/photos", "photos"),
        ("~alice/photos", "photos"),
        (r"C:\Users\alice\photos", "photos"),
        (r"\\server\alice\photos", "photos"),
        ("/", "."),
    ],
)
def test_no_path_of_the_machine_is_shown(path: str | Path, shown: str) -> None:
    assert shown_path(path) == shown


def test_inside_the_run_a_path_is_shown_from_there(tmp_path: Path) -> None:
    assert shown_path(tmp_path / "run" / "images" / "base", tmp_path / "run") == "images/base"
    assert shown_path(tmp_path / "run", tmp_path / "run") == "."
    assert shown_path(tmp_path / "elsewhere" / "base", tmp_path / "run") == "base"


def test_settings_lose_paths_but_no_prompt() -> None:
    settings = {"vision_encoder": "/home/alice/dino", "prompts": ["/imagine a bird"], "seed": 3, "audit": None}
    assert without_paths(settings) == settings | {"vision_encoder": "dino"}
