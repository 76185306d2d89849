"""Tab Generate: its images are those of `invdiff generate`, in turns and with stops, and what its events answer."""

import asyncio
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from conftest import CAPTIONS, make_guidance_module
from extras import gr
from invdiff.app.generate import GenerateTab, shares_seen
from invdiff.app.studio import Ask, Studio, command_for
from invdiff.config import GenerateConfig
from invdiff.evaluation.annotators.annotations import Annotations
from test_cli import succeed


def pixels(shots):
    return [shot.image.tobytes() for shot in shots]


def asked(prompt=CAPTIONS[0], mix=((0.5, 0.5),), **settings):
    defaults = {"images_per_prompt": 3, "num_inference_steps": 2, "batch_size": 2}
    return Ask(prompt, GenerateConfig(**defaults | settings), mix)


def drawn(studio, ask, session=""):
    *_, last = studio.draw(ask, studio.next_turn(session))
    return last


@pytest.fixture
def studio(tiny_pipe):
    return Studio(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=[2]))


@pytest.mark.parametrize("prompt", ["--output=a 'quoted' bird; rm -rf $HOME", ""])
def test_the_command_draws_the_same_images(tiny_pipe, tiny_pipe_dir, tmp_path, prompt):
    module = make_guidance_module(tiny_pipe, num_groups=[2])
    module.save_pretrained(tmp_path / "module")
    studio = Studio(tiny_pipe, module, names=(str(tiny_pipe_dir), str(tmp_path / "module")))
    ask = asked(prompt, ((1 / 3, 2 / 3),), scale=0.35, guidance_scale=4.5, seed=1234567)
    shown = drawn(studio, ask)
    guided = shlex.split(command_for(ask, studio))
    assert guided[:3] == ["invdiff", "generate", str(tiny_pipe_dir)]
    assert [float(share) for share in guided[guided.index("--environments") + 1].split(",")] == list(ask.mix[0])
    base = shlex.split(command_for(ask, Studio(tiny_pipe, names=studio.names)))
    for name, words in (("guided", guided), ("base", base)):
        words[words.index("--output") + 1] = str(tmp_path / name)
        words[words.index("--output") : words.index("--output")] = ["--batch-size", "2", "--quiet"]
        succeed(*words[1:])
        files = [Image.open(tmp_path / name / "00000" / f"{k:06d}.png").tobytes() for k in range(3)]
        assert files == pixels(getattr(shown, name))
    assert pixels(shown.base) != pixels(shown.guided)


def test_the_command_states_all_that_differs_from_the_defaults(studio):
    ask = Ask("x", GenerateConfig(resolution=128, batch_size=4), ())
    assert command_for(ask, Studio(studio.pipe)).split()[3:] == ["x", "--resolution", "128", "--output", "images"]
    two = Studio(studio.pipe, make_guidance_module(studio.pipe, num_groups=(2, 2)), names=studio.names)
    several = command_for(ask._replace(mix=((0.5, 0.5), (0.2, 0.8))), two)
    assert "--module MODULE --environments 'factor 2=0.2,0.8' --resolution" in several
    assert "--environments" not in command_for(ask._replace(mix=((0.5, 0.5), (0.5, 0.5))), two)
    adapted = Studio(studio.pipe, options=["--lora", "style:0.8"])
    adapted.needs_prompts = False
    assert command_for(ask, adapted).split()[-4:] == ["--lora", "style:0.8", "--output", "images"]


def test_each_batch_is_shown_and_base_images_are_drawn_once(studio, monkeypatch):
    calls = []
    studio.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))

    def forwards(ask):
        before = len(calls)
        counts = [(len(shown.base), len(shown.guided)) for shown in studio.draw(ask, studio.next_turn())]
        assert counts[-1] == (3, 3)
        return len(calls) - before

    monkeypatch.setattr("invdiff.app.studio.MOST_KEPT", 6)
    both = forwards(asked())
    assert forwards(asked(scale=0.3)) == both / 2
    assert forwards(asked(guidance_scale=5.0)) == both
    assert forwards(asked(seed=1)) == both  # the first base images give way
    assert forwards(asked(guidance_scale=5.0)) == both / 2
    assert forwards(asked()) == both


def test_stop_keeps_whole_batches_and_leaves_the_model_plain(studio):
    ask = asked(num_inference_steps=4)
    before = pixels(drawn(studio, ask).base)
    steps = []

    def stop_at_the_tenth(*_):
        steps.append(1)
        if len(steps) == 10:  # in the second batch of the base model
            studio.stop("me")

    handle = studio.pipe.unet.register_forward_pre_hook(stop_at_the_tenth)
    last = drawn(studio, asked(num_inference_steps=4, seed=3), "me")
    handle.remove()
    assert (last.stopped, len(last.base), len(last.guided)) == (True, 2, 2)
    assert len(steps) in (10, 11)
    assert not studio.pipe.unet._forward_hooks
    assert not studio.pipe.unet._forward_pre_hooks
    next(studio.draw(asked(seed=1), studio.next_turn("gone")))  # a visitor who walks away
    assert not studio.pipe.unet._forward_hooks
    studio._kept.clear()
    assert pixels(drawn(studio, ask).base) == before


def test_a_request_gives_way_to_a_newer_one_of_its_session_only(studio):
    running = {name: studio.draw(asked(seed=seed), studio.next_turn(name)) for seed, name in enumerate("abc")}
    for drawing in running.values():
        next(drawing)
    waiting = studio.next_turn("d")
    studio.stop("a")
    studio.stop("d")
    newer = studio.next_turn("b")
    assert [shown.stopped for shown in running["a"]] == [True]
    assert list(running["b"]) == []
    assert [shown.stopped for shown in running["c"]] == [False]
    assert [shown.stopped for shown in studio.draw(asked(), waiting)] == [True]
    assert [shown.stopped for shown in studio.draw(asked(), newer)] == [False, False]
    assert not drawn(studio, asked(), "d").stopped
    studio.stop("stranger")
    running.clear()
    del newer, waiting
    assert not studio._turns  # sessions are forgotten with their requests


def test_threads_take_turns_and_who_waits_can_be_stopped(studio):
    alone = drawn(studio, asked())
    studio._kept.clear()
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_):
        if studio.pipe.unet._forward_hooks:  # the module's
            inside.set()
            go_on.wait(20)

    handle = studio.pipe.unet.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(drawn, studio, asked(), "first")
        assert inside.wait(20)
        second = threads.submit(drawn, studio, asked(), "second")
        third = threads.submit(drawn, studio, asked(), "third")
        wait([second], timeout=0.5)
        studio.stop("third")
        assert third.result(5).stopped
        waits = not second.done()
        go_on.set()
        for shown in (first.result(), second.result()):
            assert (pixels(shown.base), pixels(shown.guided)) == (pixels(alone.base), pixels(alone.guided))
    handle.remove()
    assert waits


def test_without_a_module_or_groups_there_is_no_mix(tiny_pipe):
    plain = Studio(tiny_pipe)
    shown = drawn(plain, asked(mix=()))
    assert (len(shown.base), shown.guided, plain.num_groups) == (3, [], ())
    invariant = Studio(tiny_pipe, make_guidance_module(tiny_pipe, mode="invariant", num_groups=[2]))
    assert (len(drawn(invariant, asked(mix=())).guided), invariant.num_groups) == (3, ())


ME = SimpleNamespace(session_hash="me")
ASKED = (CAPTIONS[0], 3, 6, 4.5, 2, 0.5, 25, 75)  # prompt, seed, images, guidance scale, steps, scale, and the mix


@pytest.fixture
def tab(studio, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with gr.Blocks() as page:
        tab = GenerateTab(studio, CAPTIONS, lambda: [["on <land>", "group 1"]])
    tab.page = page
    return tab


def events(tab, *values, live=True, sent=0.0):
    async def all_of(shown):
        return [values async for values in shown]

    return asyncio.run(all_of(tab.draw(ME, live, sent, *values)))


def test_images_come_batch_by_batch_and_the_command_first(tab):
    first, *rest = events(tab, *ASKED)
    assert "Waiting for the model" in first[0]
    assert first[4] == (
        f"invdiff generate MODEL '{CAPTIONS[0]}' --module MODULE --environments 0.25,0.75 --images-per-prompt 6 "
        "--guidance-scale 4.5 --scale 0.5 --steps 2 --seed 3 --output images"
    )
    assert [(len(base), len(guided)) for _, base, guided, *_ in rest] == [(4, 4), (6, 6)]
    assert ["4 of 6 images in" in rest[0][0], "6 of 6 images in" in rest[1][0]] == [True, True]
    files = dict(rest[1][1] + rest[1][2])
    assert len(files) == 12
    for path, words in files.items():
        with Image.open(path) as image:
            assert (words[:5], image.size) == ("seed ", (32, 32))
    assert "No annotator was given" in rest[1][3]


def test_a_request_that_comes_after_one_that_was_sent_later_draws_nothing(tab, studio):
    newest = studio.next_turn(ME.session_hash, 2.0)
    assert events(tab, *ASKED, sent=1.0) == [[gr.skip()] * 5]
    assert not newest.over
    assert len(events(tab, *ASKED, sent=3.0)) > 1
    assert newest.over


def test_stop_is_stated_but_not_that_another_request_follows(tab, studio):
    running = tab.batches(studio.next_turn(ME.session_hash), *ASKED)
    next(running), next(running)
    assert "Stopped" in tab.stop(ME)
    (last,) = running
    assert "Stopped at 4 of 6 images" in last[0]
    running = tab.batches(studio.next_turn(ME.session_hash), CAPTIONS[0], 7, *ASKED[2:])
    next(running), next(running)
    studio.next_turn(ME.session_hash)
    assert list(running) == [[gr.skip()] * 5]


def test_what_cannot_be_asked_for_is_an_error_on_the_page(tab):
    filled, seed = "at most 2000 characters and a number", "Expected a whole seed from 0 to 2147483647, got {}"
    changes = [(0, value, filled) for value in (None, "x" * 2001, "half \ud83d")]
    changes += [(1, None, filled), (3, float("nan"), filled), (7, "60", filled)]
    changes += [(1, value, seed.format(value)) for value in (-1, 2**31, 1.5)]
    for place, value, message in (*changes, (5, -0.1, "scale: expected at least 0"), (6, -75, "a share above 0")):
        (refused,) = events(tab, *ASKED[:place], value, *ASKED[place + 1 :])
        assert 'role="alert"' in refused[0]
        assert message in refused[0]


def test_sliders_draw_only_where_that_is_wanted_and_within_their_ranges(tab):
    assert events(tab, *ASKED, live=False) == [[gr.skip()] * 5]
    parts = {part.elem_id: part for part in tab.page.blocks.values()}
    for name, most in {"images": 64, "steps": 100, "scale": 2, "cfg": 15, "mix-0-0": 100}.items():
        assert parts[name].preprocess(most) == most
        for beyond in (most + 1, -1):
            with pytest.raises(gr.Error):  # whoever asks, by the page or not
                parts[name].preprocess(beyond)
    assert parts["seed"].preprocess(1.5) == 1.5  # refused in words


def test_the_mix_is_shown_with_the_names_of_groups(tab):
    first, second, target = tab.first()
    assert (first["label"], second["label"]) == ("Share of “on <land>”", "Share of “group 1”")
    assert target.count("50%") == 2
    assert "on &lt;land&gt;</bdi> <b>25%" in tab.target_bar(25, 75)
    assert "Give at least one group a share above 0" in tab.target_bar(0, 0)


def test_bars_count_the_classes_that_the_annotator_names(studio):
    attributes = {"light": ("dark", "bright"), "mood": ("sad", "glad")}

    def predict(images):  # every other image is bright; nobody can tell the mood of dark ones
        bright = np.arange(len(images), dtype=np.float32)[:, None] % 2
        light = np.hstack([1 - bright, bright])
        return Annotations(attributes, {"light": light, "mood": light * bright}, None)

    studio.annotator = SimpleNamespace(name="<b>light", attributes=attributes, predict=predict)
    html = shares_seen(drawn(studio, asked()), studio.annotator)
    counts = [part.partition("<")[0] for part in html.split('<span class="figure">')[1:]]
    assert counts == [*["2 of 3"] * 2, *["1 of 3"] * 2, *["0 of 1"] * 2, *["1 of 1"] * 2]
    assert "cannot tell those of 4 images" in html
    assert "&lt;b&gt;light" in html
