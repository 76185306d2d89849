"""The page below the browser: what it opens, shows and changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from conftest import make_guidance_module
from invdiff import cli
from invdiff.assets import BIRDS_MODEL
from invdiff.errors import ConfigError
from invdiff.files import atomic_folder
from invdiff.report.read import find_parts
from runs import LAND, WATER, make_audit, make_run

pytest.importorskip("starlette", reason="needs the ui extra: pip install 'invdiff[ui]'")
from invdiff.app.serve import own_files

with own_files():
    gr = pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")
    from invdiff.app.audit_state import AuditBook
    from invdiff.app.page import build_page, compare, looks
    from invdiff.app.studio import Studio
    from invdiff.app.workspace import BUNDLED, open_workspace
    from test_serve import status

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gradio's own imports and servers


# What it opens.


def test_without_an_argument_the_bundled_demo_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVDIFF_CACHE", str(tmp_path))
    workspace = open_workspace()
    assert list(workspace.runs) == list(workspace.audits) == list(workspace.results) == [BUNDLED]
    assert workspace.model == str(BIRDS_MODEL)
    assert workspace.annotator
    book = AuditBook(workspace.runs[BUNDLED])
    assert {p.prompt for p in book.audit.prompts if p.found} == {"a photo of a waterbird", "a photo of a landbird"}
    assert book.image(0).size == (64, 64)
    book.edit(lambda edits: edits.with_name(0, 0, "on land"))
    assert AuditBook(open_workspace().runs[BUNDLED]).group_names == [["on land", "group 1"]]
    assert book.folder.is_relative_to(tmp_path)


def test_a_copy_that_was_broken_off_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "copy") as temporary:  # noqa: PT012
        (temporary / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_copy_made_by_another_process_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "copy") as temporary:
        (temporary / "mine").write_text("")
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "theirs").write_text("")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_runs_are_told_apart_by_their_paths_where_names_are_alike(tmp_path: Path) -> None:
    for folder in ("a/run", "b/run", "c/other"):
        make_audit(tmp_path / folder / "audit")
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c" / "other"]
    names = list(open_workspace(folders).runs)
    assert names[2] == "other"
    assert names[0].startswith("1: ")
    assert names[0].endswith("a/run")
    with pytest.raises(ConfigError, match="different folders"):
        open_workspace([folders[0], folders[0] / ".." / "run"])


def test_what_cannot_be_opened_is_an_error(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match="found none"):
        open_workspace([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"found none of them\. Give a folder that `invdiff demo` wrote"):
        open_workspace([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="a model or a run beside a module"):
        open_workspace(module="somewhere")
    with pytest.raises(ConfigError, match="a model or a run beside data"):
        open_workspace(data=tmp_path)


def test_a_module_says_which_model_it_needs(tiny_pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    module = make_guidance_module(tiny_pipe)
    make_audit(tmp_path / "run" / "audit")
    for base, record, wanted in (
        ("my-birds", None, None),
        ("my-birds", {"base": {"hub_id": "org/birds"}}, "org/birds"),
        ("birds", {"base": {"hub_id": None}}, str(BIRDS_MODEL)),
    ):
        module.register_to_config(base_model=base, record=record)
        module.save_pretrained(tmp_path / "run" / "module")
        if wanted is None:
            with pytest.raises(ConfigError, match=r"was called 'my-birds', got none\. Name its folder with --model"):
                open_workspace([tmp_path / "run"])
            assert open_workspace([tmp_path / "run"], model="elsewhere").model == "elsewhere"
        else:
            assert open_workspace([tmp_path / "run"]).model == wanted
    assert open_workspace([tmp_path / "run"], module="org/other", model="m").module == "org/other"


def test_a_run_without_a_module_opens_without_a_model(tmp_path: Path) -> None:
    make_audit(tmp_path / "run" / "audit")
    workspace = open_workspace([tmp_path / "run"])
    assert (workspace.model, workspace.module, workspace.annotator) == ("", None, "")
    assert build_page(workspace, None) is not None


# The command.


def test_the_command_opens_a_page_and_says_where(
    run: Path, tiny_pipe: StableDiffusionPipeline, tiny_pipe_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_guidance_module(tiny_pipe, num_groups=[2]).save_pretrained(run / "module")
    answers: list[int] = []

    def visit(page: Any) -> None:
        answers.append(status(page.local_url))
        page.close(verbose=False)

    monkeypatch.setattr(gr.Blocks, "block_thread", visit)
    words = ["ui", str(run), "--model", str(tiny_pipe_dir), "--no-browser", "--port", "0"]
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert answers == [200]
    assert "The page is at http://127.0.0.1:" in done.output
    assert str(run / "audit") in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--public and a password"),
        (["--host", "0.0.0.0", "--public"], "INVDIFF_UI_PASSWORD"),
        (["--caption-column", "x"], "Expected --data beside --caption-column"),
        (["--annotator", "labels", "--model", "MODEL"], "an annotator that looks at images"),
    ],
)
def test_the_command_says_what_it_lacks(words: list[str], message: str, tiny_pipe_dir: Path) -> None:
    words = [str(tiny_pipe_dir) if word == "MODEL" else word for word in words]
    done = CliRunner().invoke(cli.app, ["ui", "--no-browser", "--port", "0", *words], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert message in done.output


def test_a_module_of_another_model_is_refused_at_once(run: Path, tiny_pipe: StableDiffusionPipeline) -> None:
    make_guidance_module(tiny_pipe).save_pretrained(run / "module")
    words = ["ui", str(run), "--model", str(BIRDS_MODEL), "--no-browser", "--port", "0"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 1
    assert "trained for another model" in done.output


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else found(name, *a))
    done = CliRunner().invoke(cli.app, ["ui", "--no-browser"])
    assert done.exit_code == 1
    assert "pip install 'invdiff[ui]'" in done.output


# What it is built of.


def parts_of(page: Any) -> dict[str, Any]:
    """The components of a page by their ids."""
    return {str(part.elem_id): part for part in page.blocks.values() if part.elem_id}


def test_results_are_compared_and_reports_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shown"))
    make_run(tmp_path / "second")
    html = compare({"run": find_parts(run)})
    for figure in ("Bias of “background”", ">0.80 (", ">0.10 (", ">3<", ">20<"):  # 18 and 11 of 20 on land
        assert figure in html
    workspace = open_workspace([run, tmp_path / "second"], model="unused")
    page = build_page(workspace, None)
    for name in ("run: Bias", "second: Bias"):
        assert name in parts_of(page)["compare"].value
    (write,) = [fn for fn in page.fns.values() if fn.name == "write_reports"]
    done, download = write.fn()
    for folder in (run, tmp_path / "second"):
        assert str(folder / "report.html") in done
    assert [Path(path).read_bytes() for path in download["value"]] == [
        (folder / "report.html").read_bytes() for folder in (run, tmp_path / "second")
    ]


def test_the_module_s_audit_names_its_groups_and_states_its_resolution(
    run: Path, tiny_pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    make_audit(tmp_path / "other" / "audit")
    workspace = open_workspace([tmp_path / "other", run], model="unused")
    for folder, name in ((tmp_path / "other", "theirs"), (run, "<b>ours")):
        book = AuditBook(find_parts(folder))
        book.edit(lambda edits, name=name: edits.with_name(0, 1, name))
    studio = Studio(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=[2]))
    for module, name in ((run / "module", "<b>ours"), ("elsewhere", "theirs")):
        page = build_page(replace(workspace, module=module), studio)
        assert parts_of(page)["mix-0-1"].label == f"Share of “{name}”"
    three = Studio(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=[3, 2]))
    labels = [part.label for name, part in parts_of(build_page(workspace, three)).items() if name.startswith("mix-")]
    assert labels[2:4] == ["Share of “group 2” (factor 0)", "Share of “group 0” (factor 1)"]


def test_prompts_that_hide_groups_are_suggested_first(
    run: Path, tiny_pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    make_audit(tmp_path / "nothing" / "audit", prompts=("few", " "), found=False)
    for folders, prompt in (([tmp_path / "nothing", run], LAND), ([tmp_path / "nothing"], "few")):
        page = build_page(open_workspace(folders, model="unused"), Studio(tiny_pipe))
        assert parts_of(page)["prompt"].value == prompt
        labels = [part.value for part in page.blocks.values() if isinstance(part, gr.Button)]
        assert (WATER in labels) is (prompt == LAND)


def test_looks_load_nothing_from_elsewhere() -> None:
    assert "http" not in looks()["css"]
    assert "@import" not in looks()["css"]
