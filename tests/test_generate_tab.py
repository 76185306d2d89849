"""Tab Generate below the browser: what its events answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from conftest import CAPTIONS, make_guidance_module
from invdiff.evaluation.annotators.annotations import Annotations

pytest.importorskip("starlette", reason="needs the ui extra: pip install 'invdiff[ui]'")
from invdiff.app.serve import own_files

with own_files():
    gr = pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")
    from invdiff.app.generate import GenerateTab, shares_seen
    from invdiff.app.studio import Shot, Shown, Studio

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gradio's own imports

ME: Any = SimpleNamespace(session_hash="me")
VALUES = (CAPTIONS[0], 0, 6, 3.0, 2, 1.0, 25, 75)
"""Prompt, seed, images, guidance scale, steps, scale, and the mix."""


class Brightness:
    """An annotator of two attributes: light or dark, and one that it cannot tell of dark images."""

    name = feature_name = "<b>brightness"
    attributes: ClassVar = {"light": ("dark", "bright"), "mood": ("sad", "glad")}

    def predict(self, images: Any) -> Annotations:
        bright = np.array([np.asarray(image).mean() > 127 for image in images], dtype=np.float32)
        light = np.stack([1 - bright, bright], axis=1)
        return Annotations(self.attributes, {"light": light, "mood": light * bright[:, None]}, None)

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> None:
        return None


@pytest.fixture
def studio(tiny_pipe: StableDiffusionPipeline) -> Studio:
    return Studio(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=[2]))


@pytest.fixture
def tab(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GenerateTab:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with gr.Blocks():
        return GenerateTab(studio, suggestions=CAPTIONS, group_names=lambda: [["on <land>", "group 1"]])


async def all_of(shown: AsyncIterator[list[Any]]) -> list[list[Any]]:
    return [values async for values in shown]


def drawn(tab: GenerateTab, *values: Any) -> list[list[Any]]:
    return asyncio.run(all_of(tab.draw(ME, *values)))


def test_images_come_batch_by_batch_and_the_command_first(tab: GenerateTab) -> None:
    first, *rest = drawn(tab, *VALUES)
    assert "Waiting for the model" in first[0]
    assert first[4] == (
        "invdiff generate MODEL --module MODULE --environments 0.25,0.75 --images-per-prompt 6 --steps 2 "
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
    assert "No annotator was given" in rest[1][3]


def test_stop_is_stated_but_not_that_another_request_follows(tab: GenerateTab, studio: Studio) -> None:
    running = tab.batches(studio.next_turn("me"), *VALUES)
    next(running), next(running)
    assert "Stopped" in tab.stop(ME)
    (last,) = running
    assert "Stopped at 4 of 6 images" in last[0]
    running = tab.batches(studio.next_turn("me"), CAPTIONS[0], 7, *VALUES[2:])
    next(running), next(running)
    studio.next_turn("me")
    assert list(running) == [[gr.skip()] * 5]


def test_what_cannot_be_asked_for_is_an_error_on_the_page(tab: GenerateTab) -> None:
    (refused,) = drawn(tab, *VALUES[:-2], 0, 0)
    assert 'role="alert"' in refused[0]
    assert "a share above 0" in refused[0]


def test_sliders_draw_only_where_that_is_wanted(tab: GenerateTab) -> None:
    assert asyncio.run(all_of(tab.draw_if_live(ME, False, *VALUES))) == [[gr.skip()] * 5]
    assert len(asyncio.run(all_of(tab.draw_if_live(ME, True, *VALUES)))) == 3


def test_the_mix_is_shown_with_the_names_of_groups(tab: GenerateTab) -> None:
    first, second, target = tab.first()
    assert (first["label"], second["label"]) == ("Share of “on <land>”", "Share of “group 1”")
    assert target.count("50%") == 2
    assert "on &lt;land&gt;</bdi> <b>25%" in tab.target_bar(25, 75)
    for empty in ((0, 0), (None, 50)):
        assert "Give at least one group a share above 0" in tab.target_bar(*empty)


def test_bars_count_the_classes_that_the_annotator_names() -> None:
    black, white = (Image.new("RGB", (4, 4), colour) for colour in ("black", "white"))
    annotator = Brightness()

    def shots(*images: Image.Image) -> list[Shot]:
        seen = annotator.predict(images)
        labels = {name: seen.labels(name) for name in seen.attributes}
        return [Shot(image, 0, {name: labels[name][k] for name in labels}) for k, image in enumerate(images)]

    html = shares_seen(Shown(base=shots(black, black, white), guided=shots(white)), annotator)
    counts = [part.partition("<")[0] for part in html.split('<span class="figure">')[1:]]
    assert counts == ["2 of 3", "0 of 1", "1 of 3", "1 of 1", "0 of 1", "0 of 1", "1 of 1", "1 of 1"]
    assert "cannot tell those of 2 images" in html
    assert "&lt;b&gt;brightness" in html
