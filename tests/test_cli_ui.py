"""How the command that opens the page starts, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from invdiff import cli
from invdiff.app.serve import ended_by_signals, own_files
from invdiff.cli.print import INTERRUPTED
from runs import make_audit
from test_serve import status

with own_files():
    gr = pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gradio's own imports and servers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with an audit and nothing else."""
    make_audit(tmp_path / "run" / "audit")
    return tmp_path / "run"


def test_an_empty_password_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[int] = []

    def visit(page: Any) -> None:
        answers.append(status(f"{page.local_url}config"))
        page.close(verbose=False)

    monkeypatch.setattr(gr.Blocks, "block_thread", visit)
    words = ["ui", str(folder), "--no-browser", "--port", "0"]
    empty = {"INVDIFF_UI_PASSWORD": "", "COLUMNS": "200"}
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    done = CliRunner().invoke(cli.app, words, env=empty, catch_exceptions=False)
    assert (done.exit_code, answers) == (0, [200]), done.output
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    done = CliRunner().invoke(cli.app, [*words, "--public"], env=empty)
    assert done.exit_code == 1
    assert "Expected a password beside --public" in done.output


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_a_page_that_is_told_to_end_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "invdiff", "ui", str(folder), "--no-browser", "--port", "0"]
    room = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=room, text=True) as running:
        try:
            assert running.stdout is not None
            assert "The page is at" in running.stdout.readline()
            assert list(tmp_path.glob("invdiff-ui-*"))
            running.terminate()
            assert running.wait(30) in (0, INTERRUPTED)
        finally:
            running.kill()
    assert list(tmp_path.glob("invdiff-ui-*")) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no terminals that hang up")
def test_a_closed_terminal_ends_it_but_not_below_nohup() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt), ended_by_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
