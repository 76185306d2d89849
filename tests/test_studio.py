"""Images that the page draws, which are those of `invdiff generate`, in turns and with stops; what controls ask."""

from __future__ import annotations

import shlex
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from conftest import CAPTIONS, make_guidance_module
from invdiff import cli
from invdiff.app.studio import Ask, Shot, Shown, Studio, command_for, read_ask
from invdiff.config import GenerateConfig
from invdiff.errors import ConfigError


def pixels(shots: list[Shot]) -> list[bytes]:
    return [shot.image.tobytes() for shot in shots]


def config(**settings: Any) -> GenerateConfig:
    return GenerateConfig(**{"images_per_prompt": 3, "num_inference_steps": 2, "batch_size": 2, **settings})


def asked(**settings: Any) -> Ask:
    return Ask(CAPTIONS[0], config(**settings), ((0.5, 0.5),))


def drawn(studio: Studio, ask: Ask, session: str = "") -> Shown:
    *_, last = studio.draw(ask, studio.next_turn(session))
    return last


@pytest.fixture
def studio(tiny_pipe: StableDiffusionPipeline) -> Studio:
    return Studio(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=[2]))


@pytest.mark.parametrize("prompt", ["a 'quoted' bird; rm -rf $HOME", "--output=elsewhere", ""])
def test_the_command_draws_the_same_images(
    tiny_pipe: StableDiffusionPipeline, tiny_pipe_dir: Path, tmp_path: Path, prompt: str
) -> None:
    module = make_guidance_module(tiny_pipe, num_groups=[2])
    module.save_pretrained(tmp_path / "module")
    studio = Studio(tiny_pipe, module, names=(str(tiny_pipe_dir), str(tmp_path / "module")))
    ask = Ask(prompt, config(scale=0.35, guidance_scale=4.5, seed=1234567), ((1 / 3, 2 / 3),))
    shown = drawn(studio, ask)
    guided = shlex.split(command_for(ask, studio))
    assert guided[:3] == ["invdiff", "generate", str(tiny_pipe_dir)]
    assert [float(share) for share in guided[guided.index("--environments") + 1].split(",")] == list(ask.mix[0])
    base = shlex.split(command_for(ask, Studio(tiny_pipe, names=studio.names)))
    for name, words in (("guided", guided), ("base", base)):
        words[words.index("--output") + 1] = str(tmp_path / name)
        words[words.index("--output") : words.index("--output")] = ["--batch-size", "2", "--quiet"]
        done = CliRunner().invoke(cli.app, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        files = [Image.open(tmp_path / name / "00000" / f"{k:06d}.png").tobytes() for k in range(3)]
        assert files == pixels(getattr(shown, name))
    assert pixels(shown.base) != pixels(shown.guided)


def test_the_command_states_all_that_differs_from_the_defaults(studio: Studio) -> None:
    ask = Ask("x", GenerateConfig(resolution=128), ())
    plain = Studio(studio.pipe)
    assert command_for(ask, plain).split()[3:] == ["--resolution", "128", "--output", "images", "--", "x"]
    several = command_for(replace(ask, mix=((0.5, 0.5), (0.2, 0.8))), studio)
    assert several.startswith("# The mix of several hidden factors")
    even = command_for(replace(ask, mix=((0.5, 0.5), (0.5, 0.5))), studio)
    assert even.startswith("invdiff generate MODEL --module MODULE")
    studio.pipe.to(torch.bfloat16)
    plain.needs_prompts = False
    assert command_for(ask, plain).split()[-4:] == ["--dtype", "bf16", "--output", "images"]


def test_scale_0_is_the_base_model_and_the_mix_decides_the_groups(studio: Studio) -> None:
    shown = drawn(studio, asked(scale=0.0))
    assert len(shown.base) == 3
    assert pixels(shown.base) == pixels(shown.guided)
    sets = [pixels(drawn(studio, replace(asked(), mix=(mix,))).guided) for mix in ((1.0, 0.0), (0.0, 1.0))]
    assert all(one != other for one, other in zip(*sets, strict=True))


def test_each_batch_is_shown_and_base_images_are_drawn_once(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    studio.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))

    def forwards(ask: Ask) -> int:
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


def test_stop_keeps_whole_batches_and_leaves_the_model_plain(studio: Studio) -> None:
    ask = asked(num_inference_steps=4)
    before = pixels(drawn(studio, ask).base)
    again = replace(ask, config=replace(ask.config, seed=3))
    steps = 0

    def stop_at_the_tenth(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 10:  # in the second batch of the base model
            studio.stop("me")

    handle = studio.pipe.unet.register_forward_pre_hook(stop_at_the_tenth)
    last = drawn(studio, again, "me")
    handle.remove()
    assert last.stopped
    assert (len(last.base), len(last.guided)) == (2, 2)
    assert steps in (10, 11)
    assert not studio.pipe.unet._forward_hooks
    assert not studio.pipe.unet._forward_pre_hooks
    studio._kept.clear()
    assert pixels(drawn(studio, ask).base) == before


def test_who_walks_away_leaves_the_model_plain(studio: Studio) -> None:
    whole = drawn(studio, asked())
    abandoned = studio.draw(asked(seed=1), studio.next_turn("gone"))
    next(abandoned)
    assert not studio.pipe.unet._forward_hooks
    assert pixels(drawn(studio, asked()).guided) == pixels(whole.guided)


def test_a_request_gives_way_to_a_newer_one_of_its_session_only(studio: Studio) -> None:
    running = {name: studio.draw(asked(seed=seed), studio.next_turn(name)) for seed, name in enumerate("abc")}
    for drawing in running.values():
        next(drawing)
    studio.stop("a")
    newer = studio.next_turn("b")
    assert [shown.stopped for shown in running["a"]] == [True]
    assert list(running["b"]) == []
    assert [shown.stopped for shown in running["c"]] == [False]
    assert [shown.stopped for shown in studio.draw(asked(), newer)] == [False, False]
    studio.stop("stranger")


def test_what_waits_is_stopped_too_and_the_next_request_is_not(studio: Studio) -> None:
    waiting = studio.next_turn("me")
    studio.stop("me")
    assert [shown.stopped for shown in studio.draw(asked(), waiting)] == [True]
    assert not drawn(studio, asked(), "me").stopped


def test_threads_take_turns_and_none_sees_the_other_s_module(studio: Studio) -> None:
    alone = drawn(studio, asked(num_inference_steps=6))
    studio._kept.clear()
    with ThreadPoolExecutor(3) as threads:
        others = [asked(num_inference_steps=6, seed=seed) for seed in (0, 1, 2)]
        shown = list(threads.map(drawn, [studio] * 3, others, ("a", "b", "c")))
    assert pixels(shown[0].base) == pixels(alone.base)
    assert pixels(shown[0].guided) == pixels(alone.guided)


def test_who_waits_for_a_batch_of_another_can_be_stopped(studio: Studio) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
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
        assert pixels(first.result().guided) == pixels(second.result().guided)
    handle.remove()
    assert waits


def test_sessions_are_forgotten_with_their_requests(studio: Studio) -> None:
    for session in ("a", "b"):
        drawn(studio, asked(), session)
    assert not studio._turns


def test_without_a_module_or_groups_there_is_no_mix(tiny_pipe: StableDiffusionPipeline) -> None:
    plain = Studio(tiny_pipe)
    shown = drawn(plain, Ask(CAPTIONS[0], config()))
    assert (len(shown.base), shown.guided, plain.num_groups) == (3, [], ())
    invariant = Studio(tiny_pipe, make_guidance_module(tiny_pipe, mode="invariant", num_groups=[2]))
    assert invariant.num_groups == ()
    assert len(drawn(invariant, Ask(CAPTIONS[0], config())).guided) == 3


VALUES = ["a prompt", 3, 5, 2.5, 7, 0.5, 20, 60]


def test_controls_are_read() -> None:
    expected = GenerateConfig(
        seed=3, images_per_prompt=5, guidance_scale=2.5, num_inference_steps=7, scale=0.5, batch_size=4
    )
    assert read_ask(VALUES, [2], batch_size=4) == Ask("a prompt", expected, ((0.25, 0.75),))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, None, "a finite number in every field"),
        (0, "x" * 2001, "at most 2000 whole characters, got 2001"),
        (0, "half \ud83d", "whole characters"),
        (1, None, "a finite number in every field"),
        (1, -1, "ranges"),
        (2, 65, "at most 64 images"),
        (2, 0, "images_per_prompt: expected at least 1"),
        (3, float("nan"), "a finite number in every field"),
        (4, 10**6, "ranges"),
        (5, -0.1, "scale: expected a"),
        (6, float("inf"), "a finite number in every field"),
        (6, -60, "at least one group"),
        (7, "60", "a finite number in every field"),
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
