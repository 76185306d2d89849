"""The pool of frozen outputs: a pass serves as many steps as asked; what a step sees follows from its number."""

import pytest
import torch

from invdiff.seeds import generator
from invdiff.training.frozen import FrozenBatch, FrozenPool

SIZE = 6


def whole(size):
    return slice(0, size)


def make(number, part=whole):
    """A batch in which each place is known by its batch and its place: 100 * number + place."""
    places = 100 * number + torch.arange(SIZE)
    mine = places[part(SIZE)]
    images = mine[:, None, None, None].float()
    return FrozenBatch(
        prompts=places,
        environments=places[:, None],
        captions=mine,
        noisy_latents=images,
        timesteps=mine,
        target=images,
        model_pred=images,
        features=images,
    )


def batches(reuse, steps, *, part=whole, start=0):
    drawn = []

    def draw(number):
        drawn.append(number)
        return make(number, part)

    pool = FrozenPool(draw, reuse)
    return [pool.batch(step, part, generator("mixture", step)) for step in range(start, steps)], drawn


def test_without_reuse_each_step_has_a_batch_of_its_own():
    seen, drawn = batches(1, 4)
    assert drawn == [0, 1, 2, 3]
    assert [batch.prompts.tolist() for batch in seen] == [make(n).prompts.tolist() for n in range(4)]


@pytest.mark.parametrize("reuse", [2, 4])
def test_one_pass_serves_several_steps(reuse):
    seen, drawn = batches(reuse, 40)
    assert drawn == list(range(40 // reuse + reuse - 1))
    uses = torch.stack([batch.prompts for batch in seen]).flatten().bincount(minlength=100 * len(drawn))
    settled = uses.view(-1, 100)[reuse:-reuse, :SIZE].float()  # batches that lived their whole time
    assert settled.mean().item() == pytest.approx(reuse, rel=0.15)


def test_every_figure_of_a_place_is_of_the_same_image():
    for batch in batches(3, 5)[0]:
        for values in (batch.environments[:, 0], batch.captions, batch.timesteps, batch.features[:, 0, 0, 0]):
            assert values.tolist() == batch.prompts.tolist()
        assert (batch.prompts % 100).tolist() == list(range(SIZE))


def test_a_killed_run_sees_what_it_would_have_seen():
    seen, _ = batches(4, 12)
    resumed, _ = batches(4, 12, start=7)
    assert [batch.prompts.tolist() for batch in resumed] == [batch.prompts.tolist() for batch in seen[7:]]


def test_processes_see_their_parts_of_the_same_mixture():
    seen, _ = batches(3, 5)
    for part in (slice(0, 3), slice(3, 6)):
        shared, _ = batches(3, 5, part=lambda size, part=part: part)
        for mine, all_of_it in zip(shared, seen, strict=True):
            assert mine.prompts.tolist() == all_of_it.prompts.tolist()
            assert mine.captions.tolist() == all_of_it.captions[part].tolist()
