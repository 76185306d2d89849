"""The page below the browser: what it opens, draws, changes, and whom it lets in."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from conftest import CAPTIONS, make_guidance_module
from invdiff import cli
from invdiff.app.archive import AuditBook
from invdiff.app.serve import check_address, free_port, is_loopback, own_files
from invdiff.app.workspace import BUNDLED, Workspace, open_workspace
from invdiff.assets import BIRDS_MODEL
from invdiff.config import GenerateConfig
from invdiff.errors import AuditError, ConfigError, InvDiffError
from invdiff.evaluation.annotations import Annotations
from invdiff.files import atomic_folder
from invdiff.generation import generate
from invdiff.groups.curation import CURATION
from invdiff.report.sources import Parts, find_parts
from test_pictures import LAND, WATER, make_audit
from test_report import NASTY, SCRIPT, make_run

with own_files():
    gr = pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")
    from invdiff.app.audit_tab import AuditTab
    from invdiff.app.compare_tab import CompareTab, together
    from invdiff.app.generate_tab import Commands, command_for, mix_label, read_ask
    from invdiff.app.page import build_page, looks
    from invdiff.app.pieces import piece, refusal
    from invdiff.app.seen import shares_seen
    from invdiff.app.serve import launch
    from invdiff.app.studio import Ask, Shot, Shown, Studio

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gradio's own imports and servers


class Brightness:
    """An annotator of two attributes: light or dark, and one that it cannot tell of dark images."""

    name = feature_name = "brightness"
    attributes: ClassVar = {"light": ("dark", "bright"), "mood": ("sad", "glad")}

    def predict(self, images: Any) -> Annotations:
        bright = np.array([np.asarray(image).mean() > 127 for image in images], dtype=np.float32)
        light = np.stack([1 - bright, bright], axis=1)
        return Annotations(self.attributes, {"light": light, "mood": light * bright[:, None]}, None)

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> None:
        return None


def pixels(shots: list[Shot]) -> list[bytes]:
    return [shot.image.tobytes() for shot in shots]


def drawn(studio: Studio, ask: Ask, session: str = "") -> Shown:
    *_, last = studio.draw(ask, session)
    return last


def config(**settings: Any) -> GenerateConfig:
    return GenerateConfig(**{"images_per_prompt": 3, "num_inference_steps": 2, "batch_size": 2, **settings})


@pytest.fixture
def studio(tiny_pipe: StableDiffusionPipeline) -> Studio:
    return Studio(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=[2]), Brightness())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of its own: audit, data, images, results and module."""
    make_run(tmp_path / "run")
    return tmp_path / "run"


# Whom it lets in.


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.3.2.1", "::1"])
def test_this_machine_alone_may_always_open_it(host: str) -> None:
    check_address(host, public=False, password=None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7", "10.0.0.1"])
def test_the_network_needs_a_wish_and_a_password(host: str) -> None:
    with pytest.raises(ConfigError, match="--public and a password"):
        check_address(host, public=False, password="long enough")
    with pytest.raises(ConfigError, match="Expected a password beside --public"):
        check_address(host, public=True, password=None)
    check_address(host, public=True, password="long enough")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_short_password_is_refused_everywhere(host: str) -> None:
    with pytest.raises(ConfigError, match="at least 8 characters, got 7"):
        check_address(host, public=True, password="1234567")


def test_an_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="Expected a name or an address of this machine"):
        is_loopback("no.such.host")


def test_a_name_that_is_also_public_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(0, 0, 0, "", ("127.0.0.1", 0)), (0, 0, 0, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answers)
    assert not is_loopback("both.example")


def test_a_port_that_is_taken_is_an_error_and_another_is_found() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1.*--port"):
            free_port("127.0.0.1", port)
        assert free_port("127.0.0.1", 0) not in (0, port)


def test_settings_of_gradio_in_the_environment_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    before = dict(os.environ)
    with own_files() as folder:
        assert {name for name in os.environ if name.startswith("GRADIO_")} == {
            "GRADIO_ANALYTICS_ENABLED",
            "GRADIO_TEMP_DIR",
        }
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "kept").mkdir()
    assert not folder.exists()
    assert dict(os.environ) == before


@contextlib.contextmanager
def served(workspace: Workspace, studio: Studio | None, password: str | None = None) -> Iterator[tuple[str, Path]]:
    """A page that listens, and the folder of what it shows."""
    with own_files() as folder:
        page = build_page(workspace, studio)
        port = free_port("127.0.0.1", 0)
        try:
            yield launch(page, host="127.0.0.1", port=port, password=password, browser=False), folder
        finally:
            page.close(verbose=False)


def status(address: str, data: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data=data), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_files_are_served_of_its_own_folder_only(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", str(tmp_path))
    (tmp_path / "secret.txt").write_text("secret")
    with served(open_workspace([run / "audit"]), None) as (address, folder):
        (folder / "shown.txt").write_text("shown")
        assert status(address) == 200
        refused = [
            tmp_path / "secret.txt",
            run / "audit" / "audit.json",
            run / "results.json",
            Path("/etc/passwd"),
            Path("secret.txt"),
            folder / ".." / "secret.txt",
            Path(f"{folder}/../../etc/passwd"),
        ]
        for path in refused:
            for form in (str(path), urllib.parse.quote(str(path), safe="")):
                assert status(f"{address}gradio_api/file={form}") in (403, 404), path


def _read(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return bytes(answer.read())


def test_nothing_can_be_called_or_uploaded_from_outside_the_page(run: Path) -> None:
    with served(open_workspace([run / "audit"]), None) as (address, folder):
        info = json.loads(_read(f"{address}gradio_api/info"))
        assert info["named_endpoints"] == {}
        assert info["unnamed_endpoints"] == {}
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'
            + b"0" * 5000
            + b"\r\n--x--"
        )
        asked = urllib.request.Request(
            f"{address}gradio_api/upload", data=body, headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked, timeout=20)
        assert refused.value.code in (400, 413)
        assert not [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1024]


def test_a_password_is_asked_for(run: Path) -> None:
    with served(open_workspace([run / "audit"]), None, "correct horse") as (address, _):
        assert status(f"{address}config") == 401
        wrong = urllib.parse.urlencode({"username": "invdiff", "password": "wrong horse"}).encode()
        assert status(f"{address}login", wrong) == 400
        right = urllib.parse.urlencode({"username": "invdiff", "password": "correct horse"}).encode()
        assert status(f"{address}login", right) == 200
        assert status(f"{address}gradio_api/info") == 401


# What it opens.


def test_without_an_argument_the_bundled_demo_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVDIFF_CACHE", str(tmp_path))
    workspace = open_workspace()
    assert list(workspace.runs) == list(workspace.audits) == list(workspace.results) == [BUNDLED]
    assert workspace.model == str(BIRDS_MODEL)
    assert workspace.annotator
    book = AuditBook(workspace.runs[BUNDLED])
    assert [page.prompt["prompt"] for page in book.pages] == ["a photo of a waterbird", "a photo of a landbird"]
    assert book.image(0).size == (64, 64)
    book.rename(0, ["on land", "on water"])
    again = AuditBook(open_workspace().runs[BUNDLED])
    assert again.group_names() == [["on land", "on water"]]
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


# What it draws.


def test_images_are_those_of_generate(studio: Studio, tmp_path: Path) -> None:
    chosen = config(scale=0.7, seed=5)
    shown = drawn(studio, Ask(CAPTIONS[0], chosen, ((0.25, 0.75),)))
    folders = {"base": None, "guided": studio.module}
    for name, module in folders.items():
        mix: Any = [0.25, 0.75] if module is not None else "uniform"
        generate(
            studio.pipe,
            [CAPTIONS[0]],
            tmp_path / name,
            module=module,
            config=chosen,
            environments=mix,
            progress=False,
        )
        files = [Image.open(tmp_path / name / "00000" / f"{k:06d}.png").tobytes() for k in range(3)]
        assert pixels(getattr(shown, name)) == files
    assert pixels(shown.base) != pixels(shown.guided)


def test_scale_0_is_the_base_model(studio: Studio) -> None:
    shown = drawn(studio, Ask(CAPTIONS[0], config(scale=0.0), ((0.5, 0.5),)))
    assert len(shown.base) == 3
    assert pixels(shown.base) == pixels(shown.guided)


def test_the_mix_decides_the_groups(studio: Studio) -> None:
    sets = [pixels(drawn(studio, Ask(CAPTIONS[0], config(), (mix,))).guided) for mix in ((1.0, 0.0), (0.0, 1.0))]
    assert all(one != other for one, other in zip(*sets, strict=True))


def test_each_batch_is_shown_and_base_images_are_drawn_once(studio: Studio) -> None:
    calls: list[int] = []
    studio.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    ask = Ask(CAPTIONS[0], config(), ((0.5, 0.5),))
    counts = [(len(shown.base), len(shown.guided)) for shown in studio.draw(ask)]
    assert counts[-1] == (3, 3)
    first = len(calls)
    drawn(studio, replace(ask, config=config(scale=0.3)))
    assert len(calls) - first == first / 2
    drawn(studio, replace(ask, config=config(guidance_scale=5.0)))
    assert len(calls) - first == first / 2 + first


def test_stop_keeps_what_is_whole_and_leaves_the_model_plain(studio: Studio) -> None:
    ask = Ask(CAPTIONS[0], config(num_inference_steps=4), ((0.5, 0.5),))
    before = pixels(drawn(studio, ask).base)
    studio._kept.clear()
    steps = 0

    def stop_in_the_midst(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 10:  # in the second batch of the base model
            studio.stop("me")

    handle = studio.pipe.unet.register_forward_pre_hook(stop_in_the_midst)
    *_, last = studio.draw(ask, "me")
    handle.remove()
    assert last.stopped
    assert (len(last.base), len(last.guided)) == (2, 2)
    assert steps in (10, 11)
    assert not studio.pipe.unet._forward_hooks
    assert not studio.pipe.unet._forward_pre_hooks
    assert pixels(drawn(studio, ask).base) == before


def test_who_walks_away_leaves_the_model_plain(studio: Studio) -> None:
    ask = Ask(CAPTIONS[0], config(), ((0.5, 0.5),))
    whole = drawn(studio, ask)
    studio._kept.clear()
    abandoned = studio.draw(replace(ask, config=config(seed=1)), "gone")
    next(abandoned)
    assert not studio.pipe.unet._forward_hooks
    assert pixels(drawn(studio, ask).guided) == pixels(whole.guided)
    abandoned.close()


def test_sessions_stop_their_own_drawing_only(studio: Studio) -> None:
    ask = Ask(CAPTIONS[0], config(), ((0.5, 0.5),))
    one, two = studio.draw(ask, "one"), studio.draw(ask, "two")
    next(one), next(two)
    studio.stop("one")
    assert [shown.stopped for shown in one] == [True]
    assert [shown.stopped for shown in two] == [False]


def test_another_wish_makes_the_running_one_give_way(studio: Studio) -> None:
    ask = Ask(CAPTIONS[0], config(), ((0.5, 0.5),))
    running = studio.draw(ask, "me")
    next(running)
    studio.stop_unless(ask, "me")
    assert [shown.stopped for shown in running] == [False]
    running = studio.draw(ask, "me")
    next(running)
    studio.stop_unless(replace(ask, mix=((0.4, 0.6),)), "me")
    assert [shown.stopped for shown in running] == [True]


def test_a_page_without_module_or_annotator_draws_the_base_model(tiny_pipe: StableDiffusionPipeline) -> None:
    plain = Studio(tiny_pipe)
    shown = drawn(plain, Ask(CAPTIONS[0], config()))
    assert (len(shown.base), shown.guided, plain.num_groups) == (3, [], ())
    assert "No annotator was given" in shares_seen(shown, None)
    assert build_page(Workspace("model", None, "", {}), plain) is not None


def test_groups_have_no_say_with_an_invariant_module(tiny_pipe: StableDiffusionPipeline) -> None:
    studio = Studio(tiny_pipe, make_guidance_module(tiny_pipe, mode="invariant", num_groups=[2]))
    assert studio.num_groups == ()
    assert len(drawn(studio, Ask(CAPTIONS[0], config())).guided) == 3


def test_shares_are_counts_of_what_the_annotator_sees() -> None:
    black, white = (Image.new("RGB", (4, 4), colour) for colour in ("black", "white"))
    annotator = Brightness()

    def shots(*images: Image.Image) -> list[Shot]:
        seen = annotator.predict(images)
        labels = {name: seen.labels(name) for name in seen.attributes}
        return [Shot(image, 0, {n: labels[n][k] for n in labels}) for k, image in enumerate(images)]

    html = shares_seen(Shown(base=shots(black, black, white), guided=shots(white)), annotator)
    counts = [part.partition("<")[0] for part in html.split('<span class="figure">')[1:]]
    assert counts == ["2 of 3", "0 of 1", "1 of 3", "1 of 1", "0 of 1", "0 of 1", "1 of 1", "1 of 1"]
    assert "2 images could not be told" in html


VALUES = ["a prompt", 3, 5, 2.5, 7, 0.5, 20, 60]


def test_controls_are_read() -> None:
    ask = read_ask(VALUES, [2], batch_size=4)
    assert ask.prompt == "a prompt"
    assert ask.mix == ((0.25, 0.75),)
    assert ask.config == GenerateConfig(
        seed=3, images_per_prompt=5, guidance_scale=2.5, num_inference_steps=7, scale=0.5, batch_size=4
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, None, "a number in every field"),
        (0, "x" * 2001, "at most 2000 characters, got 2001"),
        (1, None, "a number in every field"),
        (1, -1, "ranges"),
        (2, 65, "1 to 64 images, got 65"),
        (2, 0, "1 to 64 images, got 0"),
        (3, float("nan"), "ranges"),
        (4, 10**6, "ranges"),
        (5, -0.1, "ranges"),
        (6, -60, "at least one group"),
        (7, "60", "a number in every field"),
    ],
)
def test_controls_out_of_range_are_errors(place: int, value: Any, message: str) -> None:
    values = list(VALUES)
    values[place] = value
    with pytest.raises(ConfigError, match=message):
        read_ask(values, [2], batch_size=4)


def test_a_mix_of_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="a share above 0 for at least one group"):
        read_ask([*VALUES[:6], 0, 0], [2], batch_size=4)


def test_the_command_draws_the_same_images(studio: Studio, tiny_pipe_dir: Path, tmp_path: Path) -> None:
    assert studio.module is not None
    studio.module.save_pretrained(tmp_path / "module")
    ask = Ask("a 'quoted' bird; rm -rf $HOME", config(scale=0.5, guidance_scale=4.0, seed=9), ((0.25, 0.75),))
    words = shlex.split(command_for(ask, Commands(str(tiny_pipe_dir), str(tmp_path / "module"))))
    assert words[:3] == ["invdiff", "generate", str(tiny_pipe_dir)]
    words[words.index("--output") + 1] = str(tmp_path / "images")
    done = CliRunner().invoke(cli.app, [*words[1:], "--batch-size", "2", "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    files = [Image.open(tmp_path / "images" / "00000" / f"{k:06d}.png").tobytes() for k in range(3)]
    assert files == pixels(drawn(studio, ask).guided)


# What it changes.


@pytest.fixture
def book(run: Path) -> AuditBook:
    return AuditBook(find_parts(run))


def reopened(book: AuditBook) -> AuditBook:
    return AuditBook(Parts(audit=book.folder))


def test_names_are_saved_beside_the_audit(book: AuditBook) -> None:
    book.rename(0, ["on land", ""])
    assert (book.folder / CURATION).is_file()
    assert reopened(book).group_names() == [["on land", "group 1"]]
    book.rename(0, ["b", "a"])
    book.rename(0, ["a", "b"])  # swapped, one at a time, would be the same name twice
    assert reopened(book).group_names() == [["a", "b"]]
    with pytest.raises(ConfigError, match="no other group has"):
        book.rename(0, ["same", "Same"])
    assert reopened(book).group_names() == [["a", "b"]]
    book.rename(0, ["", ""])
    assert not (book.folder / CURATION).exists()


def test_images_left_out_are_in_no_group_and_can_be_put_back(book: AuditBook) -> None:
    before = book.pages[0].groups[0].size
    position = book.pages[0].groups[0].typical[0]
    book.leave_out([position])
    assert book.pages[0].groups[0].size == before - 1
    assert [page.prompt["prompt"] for page in book.pages] == [LAND, WATER]  # in their places, though one is smaller
    assert reopened(book).curation.left_out == (position,)
    book.put_back([position])
    assert reopened(book).pages[0].groups[0].size == before


def test_a_whole_prompt_is_never_left_out(book: AuditBook) -> None:
    with pytest.raises(AuditError, match="at least one image"):
        book.leave_out(book.pages[0].rows.tolist())
    assert book.curation.left_out == ()
    assert not (book.folder / CURATION).exists()


def test_changes_of_others_are_kept(book: AuditBook) -> None:
    other = reopened(book)
    other.rename(0, ["theirs", ""])
    book.leave_out([0])
    kept = reopened(book)
    assert kept.group_names() == [["theirs", "group 1"]]
    assert kept.curation.left_out == (0,)


def test_a_moved_cut_moves_images_and_is_kept_only_when_asked(book: AuditBook) -> None:
    page = book.pages[0]
    own = page.scores[page.labels == page.groups[0].index]
    cut = float(np.sort(own)[-3])  # the three highest of the common group
    moved = book.preview(page, [cut])
    assert int((moved.labels != page.labels).sum()) == 3
    assert book.pages[0].groups[0].size == page.groups[0].size
    book.part_at(page, [cut])
    assert reopened(book).pages[0].groups[0].size == page.groups[0].size - 3
    book.part_at(page, None)
    assert reopened(book).pages[0].groups[0].size == page.groups[0].size


class _Tab:
    """An audit tab outside a browser; values by the component they go to."""

    def __init__(self, book: AuditBook) -> None:
        with gr.Blocks():
            mix = [[gr.Slider(label=mix_label(name)) for name in names] for names in book.group_names()]
            self.tab = AuditTab({"run": book}, named=book, mix=mix)
        self.mix = len(mix[0])

    def opened(self, values: list[Any]) -> dict[str, Any]:
        return {part.elem_id or type(part).__name__: v for part, v in zip(self.tab.loads, values, strict=True)}

    def done(self, values: list[Any]) -> tuple[str, list[Any], dict[str, Any]]:
        return values[0], values[1 : 1 + self.mix], self.opened(values[1 + self.mix :])


def test_a_prompt_is_shown_with_its_groups(book: AuditBook) -> None:
    tab = _Tab(book)
    shown = tab.opened(tab.tab.first())
    assert "90%" in shown["group-0"]
    assert "18 images" in shown["group-0"]
    assert "2 images" in shown["group-1"]
    assert len(shown["typical-0"]) == 12
    assert len(shown["typical-1"]) == 2
    assert shown["audit-cut-0"]["visible"]
    assert shown["State"]["typical 1"] == book.pages[0].groups[1].typical
    assert "data:image/png" in shown["audit-plot"]


def test_moved_images_are_marked_and_counted(book: AuditBook) -> None:
    tab = _Tab(book)
    page = book.pages[0]
    cut = float(np.sort(page.scores[page.labels == page.groups[0].index])[-3])
    shown = dict(zip([p.elem_id for p in tab.tab.outputs], tab.tab._show("run", 0, 12, cut), strict=True))
    assert "3 images from “group 0” to “group 1”" in shown["audit-moved"]
    assert sum(caption == "moved" for _, caption in shown["nearest-1"]) == 3
    assert not any(caption == "moved" for _, caption in shown["nearest-0"])
    assert "25%" in shown["group-1"]
    same = tab.tab._show("run", 0, 12, page.cuts[0])
    assert same[2] == ""


def test_saved_names_reach_the_mix_sliders(book: AuditBook) -> None:
    tab = _Tab(book)
    words, mix, shown = tab.done(tab.tab._save_names("run", 0, 12, "on land", "on <b>water</b>"))
    assert "Names saved" in words
    assert [update["label"] for update in mix] == ["Share of “on land”", "Share of “on <b>water</b>”"]
    assert "on land" in shown["group-0"]
    assert "on &lt;b&gt;water&lt;/b&gt;" in shown["group-1"]
    refused = tab.tab._save_names("run", 0, 12, "x" * 61, "")
    assert 'role="alert"' in refused[0]
    assert "at most 60 characters" in refused[0]
    assert reopened(book).group_names() == [["on land", "on <b>water</b>"]]


def test_an_image_is_chosen_left_out_and_put_back(book: AuditBook) -> None:
    tab = _Tab(book)
    positions = tab.opened(tab.tab.first())["State"]
    event = type("Event", (), {"index": 1})()
    at, details = tab.tab._picker("typical 1")(event, "run", positions)
    assert at == book.pages[0].groups[1].typical[1]
    assert book.names[at] in details
    words, _, shown = tab.done(tab.tab._leave_out("run", 0, 12, at))
    assert "counts nowhere now" in words
    assert len(shown["left-out"]) == 1
    assert "1 image<" in shown["group-1"]
    words, _, shown = tab.done(tab.tab._put_back("run", 0, 12, at))
    assert "counts again" in words
    assert shown["left-out"] == []
    assert "Expected an image to be chosen first" in tab.tab._leave_out("run", 0, 12, None)[0]
    assert "one that was not" in tab.tab._put_back("run", 0, 12, at)[0]


def test_thresholds_are_kept_and_reset(book: AuditBook) -> None:
    tab = _Tab(book)
    page = book.pages[0]
    cut = float(np.sort(page.scores[page.labels == page.groups[0].index])[-3])
    words, _, shown = tab.done(tab.tab._keep_cuts("run", 0, 12, cut))
    assert "1 prompt parted by hand" in words
    assert "15 images" in shown["group-0"]
    assert shown["audit-cut-0"]["value"] == pytest.approx(cut, abs=1e-3)
    words, _, shown = tab.done(tab.tab._reset_cuts("run", 0, 12))
    assert "no changes" in words
    assert "18 images" in shown["group-0"]


def test_an_audit_that_found_nothing_says_so(tmp_path: Path) -> None:
    make_audit(tmp_path / "audit", found=False)
    tab = _Tab(AuditBook(Parts(audit=tmp_path / "audit")))
    shown = tab.opened(tab.tab.first())
    assert "No hidden group was found" in shown["audit-facts"]
    assert LAND in shown["audit-tables"]
    assert not shown["audit-cut-0"]["visible"]


def test_groups_that_scores_do_not_part_have_no_threshold(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    make_audit(tmp_path / "audit")
    tensors = load_file(tmp_path / "audit" / "audit.safetensors")
    tensors["scores"] = np.random.default_rng(0).permutation(tensors["scores"])
    save_file(tensors, tmp_path / "audit" / "audit.safetensors")
    book = AuditBook(Parts(audit=tmp_path / "audit"))
    tab = _Tab(book)
    assert not tab.opened(tab.tab.first())["audit-cut-0"]["visible"]
    assert "parted by their scores" in tab.tab._keep_cuts("run", 0, 12, 0.0)[0]


def test_hostile_text_is_text_in_every_piece(tmp_path: Path) -> None:
    prompts = tuple(text for text in NASTY if text.strip())[:6]
    data = make_audit(tmp_path / "audit", prompts=prompts)
    assert data is not None
    document = json.loads((tmp_path / "audit" / "audit.json").read_text())
    document["names"] = [f"{NASTY[k % len(NASTY)]}{k}" for k in range(len(document["names"]))]
    for prompt in document["prompts"]:
        prompt |= {"reason": SCRIPT, "evidence": SCRIPT}
    document["prompts"][0]["found"] = False
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(document))
    book = AuditBook(Parts(audit=tmp_path / "audit"))
    book.rename(0, ["<script>alert(1)</script>", "\u202e\"'><img src=x>"])
    tab = _Tab(book)
    shown = [tab.tab._open("run", place, 12) for place in range(len(book.pages))]
    shown.append([tab.tab._details(book, at) for at in range(len(book.names))])
    shown.append([refusal(text) for text in NASTY])
    for html in (value for values in shown for value in values if isinstance(value, str)):
        assert "<script" not in html
        assert "<img src=x" not in html
        assert "\u202e" not in html


def test_results_are_shown_and_the_report_is_written(run: Path) -> None:
    with gr.Blocks():
        tab = CompareTab({"run": find_parts(run)})
    (html,) = tab.first()
    assert "0.80" in html  # 18 of 20 on land: Bias |0.9 - 0.1|
    assert "0.10" in html  # 11 of 20
    assert html.count("<img") > 4
    assert "Every guidance scale" in html
    done = tab._write(["run"])
    assert str(run / "report.html") in done
    assert (run / "report.html").is_file()
    assert "Tick one" in tab.show([])
    assert "Tick one" in tab._write([])


def test_several_results_are_shown_together(run: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "second")
    runs = {"one": find_parts(run), "two": find_parts(tmp_path / "second")}
    with gr.Blocks():
        tab = CompareTab(runs)
    html = tab.show(["one", "two"])
    for name in ("one: base", "one: guided", "two: base", "two: guided"):
        assert name in html
    measured = {name: tab._measured(name) for name in runs}
    other = replace(measured["two"], results=replace(measured["two"].results, attribute="gender"))
    with pytest.raises(ConfigError, match="the same attribute to compare, got 'background' and, in 'two', 'gender'"):
        together({"one": measured["one"], "two": other})


def test_looks_load_nothing_from_elsewhere() -> None:
    assert "http" not in looks()["css"]
    assert "@import" not in looks()["css"]


def test_pieces_mark_errors_for_screen_readers() -> None:
    assert 'role="alert"' in refusal(InvDiffError("no"))
    assert 'role="status"' in piece("notice", "yes")


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
