"""What the page draws: the images of `invdiff generate`, with tickets, stops and turns, and its controls."""

from __future__ import annotations

import shlex
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from conftest import CAPTIONS, make_guidance_module
from invdiff import cli
from invdiff.app.asking import Commands, command_for, read_ask
from invdiff.app.seen import shares_seen
from invdiff.app.studio import Ask, Shot, Shown, Studio
from invdiff.config import GenerateConfig
from invdiff.errors import ConfigError
from invdiff.evaluation.annotators.annotations import Annotations
from invdiff.sampling import generate


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
    first = studio.take_ticket("me")
    running = studio.draw(ask, "me", first)
    next(running)
    second = studio.take_ticket("me")
    assert [shown.stopped for shown in running] == [True]
    assert not studio.was_stopped("me", first)
    assert drawn(studio, ask, "me").stopped is False
    assert second == first + 1


def test_what_waits_is_stopped_too_and_the_next_wish_is_not(studio: Studio) -> None:
    waiting = studio.take_ticket("me")
    studio.stop("me")
    assert not studio.begin("me", waiting)
    assert studio.was_stopped("me", waiting)
    following = studio.take_ticket("me")
    assert studio.begin("me", following)
    assert not studio.begin("me", following)  # twice would draw the same twice
    assert not studio.begin("me", -1)
    assert not studio.begin("stranger", 0)


def test_threads_take_turns_and_none_sees_the_other_s_module(studio: Studio) -> None:
    ask = Ask(CAPTIONS[0], config(num_inference_steps=6), ((0.5, 0.5),))
    alone = drawn(studio, ask)
    studio._kept.clear()
    others = [replace(ask, config=replace(ask.config, seed=seed)) for seed in (0, 1, 2)]
    with ThreadPoolExecutor(3) as threads:
        shown = list(threads.map(drawn, [studio] * 3, others, ("a", "b", "c")))
    assert pixels(shown[0].base) == pixels(alone.base)
    assert pixels(shown[0].guided) == pixels(alone.guided)


def test_who_comes_in_the_midst_of_a_guided_batch_waits(studio: Studio) -> None:
    ask = Ask(CAPTIONS[0], config(), ((0.5, 0.5),))
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if studio.pipe.unet._forward_hooks:  # the module's
            inside.set()
            go_on.wait(20)

    handle = studio.pipe.unet.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(drawn, studio, ask, "first")
        assert inside.wait(20)
        second = threads.submit(drawn, studio, ask, "second")
        wait([second], timeout=0.5)
        waits = not second.done()
        go_on.set()
        assert pixels(first.result().guided) == pixels(second.result().guided)
    handle.remove()
    assert waits


def test_old_sessions_are_forgotten(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invdiff.app.studio._MOST_SESSIONS", 2)
    for session in ("a", "b", "c"):
        studio.begin(session, studio.take_ticket(session))
        studio.stop(session)
    assert set(studio._tickets) == set(studio._stopped) == set(studio._begun) == {"b", "c"}


def test_few_unguided_images_are_kept(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invdiff.app.studio._MOST_KEPT", 6)
    for seed in range(4):
        drawn(studio, Ask(CAPTIONS[0], config(seed=seed), ((0.5, 0.5),)))
    assert [key[1].seed for key in studio._kept] == [2, 3]


def test_a_page_without_module_or_annotator_draws_the_base_model(tiny_pipe: StableDiffusionPipeline) -> None:
    plain = Studio(tiny_pipe)
    shown = drawn(plain, Ask(CAPTIONS[0], config()))
    assert (len(shown.base), shown.guided, plain.num_groups) == (3, [], ())
    assert "No annotator was given" in shares_seen(shown, None)


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
        (3, float("nan"), "finite numbers"),
        (4, 10**6, "ranges"),
        (5, -0.1, "ranges"),
        (0, "half \ud83d", "half of one"),
        (6, float("inf"), "finite numbers"),
        (6, None, "a number in every field"),
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


@pytest.mark.parametrize("prompt", ["a 'quoted' bird; rm -rf $HOME", "--output=elsewhere", ""])
def test_the_command_draws_the_same_images(studio: Studio, tiny_pipe_dir: Path, tmp_path: Path, prompt: str) -> None:
    assert studio.module is not None
    studio.module.save_pretrained(tmp_path / "module")
    ask = Ask(prompt, config(scale=0.35, guidance_scale=4.5, seed=1234567), ((1 / 3, 2 / 3),))
    words = shlex.split(command_for(ask, Commands(str(tiny_pipe_dir), str(tmp_path / "module"))))
    assert words[:3] == ["invdiff", "generate", str(tiny_pipe_dir)]
    assert [float(share) for share in words[words.index("--environments") + 1].split(",")] == list(ask.mix[0])
    words[words.index("--output") + 1] = str(tmp_path / "images")
    words[words.index("--output") : words.index("--output")] = ["--batch-size", "2", "--quiet"]
    done = CliRunner().invoke(cli.app, words[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    files = [Image.open(tmp_path / "images" / "00000" / f"{k:06d}.png").tobytes() for k in range(3)]
    assert files == pixels(drawn(studio, ask).guided)


def test_the_command_says_all_that_differs_from_the_defaults() -> None:
    ask = Ask("x", GenerateConfig(resolution=128), ())
    assert command_for(ask, Commands("m", dtype="fp16")).split()[3:] == [
        *("--resolution", "128", "--dtype", "fp16", "--output", "images", "--", "x")
    ]
    assert command_for(ask, Commands("m", reads_prompts=False)).split()[-2:] == ["--output", "images"]
    several = command_for(replace(ask, mix=((0.5, 0.5), (0.2, 0.8))), Commands("m", "module"))
    assert several.startswith("# The mix of several hidden factors")
    even = command_for(replace(ask, mix=((0.5, 0.5), (0.5, 0.5))), Commands("m", "module"))
    assert even.startswith("invdiff generate m --module module")


def test_the_type_of_the_weights_is_named(tiny_pipe: StableDiffusionPipeline) -> None:
    assert Studio(tiny_pipe).dtype == "fp32"
    tiny_pipe.to(torch.bfloat16)
    assert Studio(tiny_pipe).dtype == "bf16"
