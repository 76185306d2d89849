"""The command that opens the page: what it opens and is built of, how it starts and how it ends."""

import importlib.util
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from conftest import make_guidance_module
from extras import gr
from invdiff import Audit
from invdiff.app.audit import AuditBook
from invdiff.app.page import BUNDLED, build_page, looks, open_workspace
from invdiff.app.serve import ended_by_signals
from invdiff.app.studio import Studio
from invdiff.assets import BIRDS_MODEL
from invdiff.cli.print import INTERRUPTED
from invdiff.errors import ConfigError
from invdiff.files import atomic_folder
from invdiff.report.read import find_parts
from runs import LAND, WATER, make_audit
from test_cli import fail
from test_cli import run as invoke
from test_serve import status

pytestmark = pytest.mark.usefixtures("plain")
SERVE = ("ui", "--no-browser")


def test_without_an_argument_the_bundled_demo_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("INVDIFF_CACHE", str(tmp_path))
    workspace = open_workspace()
    assert list(workspace.runs) == list(workspace.audits) == [BUNDLED]
    assert workspace.runs[BUNDLED].results
    assert workspace.model == str(BIRDS_MODEL)
    assert workspace.annotator
    book = AuditBook(workspace.runs[BUNDLED])
    assert {p.prompt for p in book.audit.prompts if p.found} == {"a photo of a waterbird", "a photo of a landbird"}
    assert book.image(0).size == (64, 64)
    book.edit(lambda edits: edits.with_name(0, 0, "on land"))
    assert AuditBook(open_workspace().runs[BUNDLED]).group_names == [["on land", "group 1"]]
    assert book.folder.is_relative_to(tmp_path)


def test_a_copy_that_was_broken_off_leaves_no_folder_and_another_process_s_stays(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "copy") as temporary:  # noqa: PT012
        (temporary / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "copy") as temporary:
        (temporary / "mine").write_text("")
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "theirs").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["copy", "copy/theirs"]


def test_runs_are_told_apart_by_their_paths_where_names_are_alike(tmp_path):
    folders = [make_audit(tmp_path / folder / "audit").folder.parent for folder in ("a/run", "b/run", "c/other")]
    names = list(open_workspace(folders).runs)
    assert (names[0][:3], names[0][-5:], names[2]) == ("1: ", "a/run", "other")
    with pytest.raises(ConfigError, match="different folders"):
        open_workspace([folders[0], folders[0] / ".." / "run"])


def test_what_cannot_be_opened_is_an_error(tmp_path):
    for runs, given, message in (
        ([tmp_path / "nowhere"], {}, "found none"),
        ([tmp_path], {}, r"found none\. Give"),
        ([], {"module": "somewhere"}, "a model or a run beside a module"),
        ([], {"data": tmp_path}, "a model or a run beside data"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_workspace(runs, **given)


def test_a_module_says_which_model_it_needs(tiny_pipe, run):
    module = make_guidance_module(tiny_pipe)
    for base, record, wanted in (
        ("my-birds", {"base": {"hub_id": "org/birds"}}, "org/birds"),
        ("birds", {"base": {"hub_id": None}}, str(BIRDS_MODEL)),
        ("my-birds", None, None),
    ):
        module.register_to_config(base_model=base, record=record)
        module.save_pretrained(run / "module")
        if wanted:
            assert open_workspace([run]).model == wanted
    with pytest.raises(ConfigError, match=r"was called 'my-birds', got none\. Name its folder with --model"):
        open_workspace([run])
    assert open_workspace([run], model="elsewhere").model == "elsewhere"
    assert open_workspace([run], module="org/other", model="m").module == "org/other"


def test_the_command_opens_a_page_says_where_and_an_empty_password_is_none(run, tiny_pipe, tiny_pipe_dir, monkeypatch):
    make_guidance_module(tiny_pipe, num_groups=[2]).save_pretrained(run / "module")
    answers = []
    visit = lambda page: answers.append(status(f"{page.local_url}config")) or page.close(verbose=False)  # noqa: E731
    monkeypatch.setattr(gr.Blocks, "block_thread", visit)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    words, empty = [*SERVE, str(run), "--model", str(tiny_pipe_dir)], {"INVDIFF_UI_PASSWORD": "", "COLUMNS": "200"}
    done = invoke(*words, env=empty)
    assert (done.exit_code, answers) == (0, [200]), done.output
    assert "The page is at http://127.0.0.1:" in done.output
    assert str(run / "audit") in done.output
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "Expected a password beside --public" in fail(*words, "--public", env=empty)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--public and a password"),
        (["--caption-column", "x"], "Expected --data beside --caption-column"),
        (["--annotator", "labels", "--model", "MODEL"], "an annotator that looks at images"),
        (["RUN", "--model", str(BIRDS_MODEL)], "trained for another model"),
    ],
)
def test_the_command_says_what_it_lacks(words, message, run, tiny_pipe, tiny_pipe_dir):
    make_guidance_module(tiny_pipe).save_pretrained(run / "module")
    places = {"MODEL": tiny_pipe_dir, "RUN": run}
    assert message in invoke(*SERVE, *(places.get(word, word) for word in words), env={"COLUMNS": "200"}).stderr


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else found(name, *a))
    assert "pip install 'invdiff[ui]'" in fail(*SERVE)


def parts_of(page):
    return {str(part.elem_id): part for part in page.blocks.values() if part.elem_id}


def test_results_are_compared_and_reports_written_and_looks_load_nothing_from_elsewhere(run, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shown"))
    shutil.copytree(run, tmp_path / "second")
    page = build_page(open_workspace([run, tmp_path / "second"], model="unused"), None)
    html = parts_of(page)["compare"].value
    assert not any(word in looks()["css"] for word in ("http", "@import"))
    for figure in ("run: Bias of “background”", "second: Bias", ">0.80 (", ">0.10 (", ">3<", ">20<"):
        assert figure in html  # 18 and 11 of 20 on land
    (write,) = [fn for fn in page.fns.values() if fn.name == "write_reports"]
    (waiting, _), (done, download) = write.fn()
    assert "Writing" in waiting
    for folder, path in zip((run, tmp_path / "second"), download["value"], strict=True):
        assert str(folder / "report.html") in done
        assert Path(path).read_bytes() == (folder / "report.html").read_bytes()
        assert Path(path).is_relative_to(tmp_path / "shown")


def test_the_module_s_audit_names_its_groups(run, tiny_pipe, tmp_path):
    make_audit(tmp_path / "other" / "audit", rare=5)
    workspace = open_workspace([tmp_path / "other", run], model="unused")
    for folder, name in ((tmp_path / "other", "theirs"), (run, "<b>ours")):
        AuditBook(find_parts(folder)).edit(lambda edits, name=name: edits.with_name(0, 1, name))
    ours, theirs = (Audit.load(folder / "audit").fingerprint for folder in (run, tmp_path / "other"))

    def labels(record, **options):
        guidance = make_guidance_module(tiny_pipe, **options)
        guidance.register_to_config(record=record)
        parts = parts_of(build_page(workspace, Studio(tiny_pipe, guidance)))
        return [part.label.removeprefix("Share of ") for name, part in parts.items() if name.startswith("mix-")]

    assert labels(None, num_groups=[2]) == ["“group 0”", "“group 1”"]
    assert labels({"audit": ours}, num_groups=[2]) == ["“group 0”", "“<b>ours”"]
    assert labels({"audit": theirs, "group_names": [["a", "b"]]}, num_groups=[2]) == ["“group 0”", "“theirs”"]
    later = {"audit": theirs, "group_names": [["a", ""], ["c", "d"]]}  # more than were audited, of a later round
    of_two = ["“a” (factor 1)", "“group 1” (factor 1)", "“c” (factor 2)", "“d” (factor 2)"]
    assert labels(later, num_groups=[2, 2]) == of_two
    assert labels(later, mode="invariant") == []
    assert labels(None, num_groups=[3, 2])[2:4] == ["“group 2” (factor 1)", "“group 0” (factor 2)"]


def test_prompts_that_hide_groups_are_suggested_first(run, tiny_pipe, tmp_path):
    make_audit(tmp_path / "nothing" / "audit", prompts=("few", " "), found=False)
    for folders, prompt in (([tmp_path / "nothing", run], LAND), ([tmp_path / "nothing"], "few")):
        page = build_page(open_workspace(folders, model="unused"), Studio(tiny_pipe))
        assert parts_of(page)["prompt"].value == prompt
        labels = [part.value for part in page.blocks.values() if isinstance(part, gr.Button)]
        assert (WATER in labels) is (prompt == LAND)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_a_page_that_is_told_to_end_leaves_nothing_behind(tmp_path, monkeypatch):
    served = []

    def told_to_end(page):
        page.close(verbose=False)
        served.extend(tmp_path.glob("temporary/invdiff-ui-*"))
        signal.raise_signal(signal.SIGTERM)

    make_audit(tmp_path / "run" / "audit")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(gr.Blocks, "block_thread", told_to_end)
    result = invoke(*SERVE, tmp_path / "run", "-q")
    assert result.exit_code in (0, INTERRUPTED)
    assert "loading" not in result.stderr
    assert served
    assert list(tmp_path.glob("temporary/*")) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no terminals that hang up")
def test_a_closed_terminal_ends_it_but_not_below_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt), ended_by_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
