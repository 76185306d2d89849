"""What the documents say is what was measured, and what they tell people to type exists."""

import functools
import re
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from invdiff.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_figures_are_those_of_the_results_and_every_table_that_can_be_written_is_on_a_page(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["update_figures.py", "--check"])
    script = runpy.run_path(str(ROOT / "scripts" / "update_figures.py"))
    assert script["main"]() == 0, capsys.readouterr().out
    written = {name for page in PAGES for name in re.findall(r"<!-- figures: (\S+) -->", page.read_text("utf-8"))}
    assert written == {*script["BLOCKS"]}


@functools.cache
def help_of(*command):
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, command
    return shown.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_commands_exist(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^invdiff ([a-z]+)(?: (train|measure))?(.*)$", text, flags=re.MULTILINE)
    for command, sub, rest in commands:
        shown = help_of(command, sub) if command == "annotator" else help_of(command)
        for option in re.findall(r"--[a-z-]+", rest.split("#")[0]):
            assert option in shown, f"{command} {option}"
