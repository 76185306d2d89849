"""Tab Generate below the browser: what its events answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from conftest import CAPTIONS, make_guidance_module
from invdiff.app.asking import Commands
from invdiff.app.pictures import Pictures
from invdiff.app.serve import own_files
from invdiff.app.studio import Studio

with own_files():
    gr = pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")
    from invdiff.app.generate_tab import GenerateTab

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gradio's own imports

ME: Any = SimpleNamespace(session_hash="me")
VALUES = (CAPTIONS[0], 0, 6, 3.0, 2, 1.0, 25, 75)
"""Prompt, seed, images, guidance scale, steps, scale, and the mix."""


@pytest.fixture
def tab(tiny_pipe: StableDiffusionPipeline, tmp_path: Path) -> GenerateTab:
    studio = Studio(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=[2]))
    with gr.Blocks():
        return GenerateTab(
            studio,
            Pictures(tmp_path),
            suggestions=CAPTIONS,
            group_names=lambda: [["on <land>", "group 1"]],
            commands=Commands("model", "module"),
        )


def is_skipped(value: Any) -> bool:
    return value == gr.skip()


def ticket(tab: GenerateTab) -> int:
    number, status = tab._take_ticket(ME)
    assert "Waiting for the model" in status
    return int(number)


def test_images_come_batch_by_batch_and_the_command_first(tab: GenerateTab) -> None:
    first, *rest = tab._run(ME, ticket(tab), *VALUES)
    assert first[4] == (
        "invdiff generate model --module module --environments 0.25,0.75 --images-per-prompt 6 --steps 2 "
        f"--output images -- '{CAPTIONS[0]}'"
    )
    assert [(len(base), len(guided)) for _, base, guided, *_ in rest] == [(4, 4), (6, 6)]
    assert "4 of 6 images in" in rest[0][0]
    assert "6 of 6 images in" in rest[1][0]
    base, guided = ([path for path, _ in gallery] for gallery in rest[1][1:3])
    assert len({*base, *guided}) == 12
    path, words = rest[1][1][0]
    with Image.open(path) as image:
        assert image.size == (32, 32)
    assert words.startswith("seed ")


def test_a_ticket_is_drawn_once_and_none_after_stop(tab: GenerateTab) -> None:
    number = ticket(tab)
    list(tab._run(ME, number, *VALUES))
    (again,) = tab._run(ME, number, *VALUES)
    assert all(map(is_skipped, again))
    waiting = ticket(tab)
    assert "Stopped" in tab._halt(ME)
    (nothing,) = tab._run(ME, waiting, *VALUES)
    assert all(map(is_skipped, nothing))


def test_stop_is_told_but_not_that_another_wish_follows(tab: GenerateTab) -> None:
    running = tab._run(ME, ticket(tab), *VALUES)
    next(running), next(running)
    tab._halt(ME)
    (last,) = running
    assert "Stopped at 4 of 6 images" in last[0]
    running = tab._run(ME, ticket(tab), *VALUES[:1], 7, *VALUES[2:])
    next(running), next(running)
    ticket(tab)
    (last,) = running
    assert all(map(is_skipped, last))


def test_what_cannot_be_asked_for_is_told(tab: GenerateTab) -> None:
    (refused,) = tab._run(ME, ticket(tab), *VALUES[:-2], 0, 0)
    assert 'role="alert"' in refused[0]
    assert "a share above 0" in refused[0]
    assert all(map(is_skipped, refused[1:]))


def test_sliders_draw_only_where_that_is_wished(tab: GenerateTab) -> None:
    number, status = tab._take_live_ticket(ME, False)
    assert number == -1
    assert is_skipped(status)
    (nothing,) = tab._run(ME, -1, *VALUES)
    assert all(map(is_skipped, nothing))
    assert tab._take_live_ticket(ME, True)[0] == 1


def test_the_mix_is_shown_with_the_names_of_groups(tab: GenerateTab) -> None:
    first, second, target = tab.first()
    assert (first["label"], second["label"]) == ("Share of “on <land>”", "Share of “group 1”")
    assert target.count("50%") == 2
    bar = tab._show_target(25, 75)
    assert "on &lt;land&gt;</bdi> <b>25%" in bar
    for empty in ((0, 0), (None, 50)):
        assert "Give at least one group a share above 0" in tab._show_target(*empty)
