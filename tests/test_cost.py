"""The guidance module stays small beside the denoisers that people use, counted on the meta device."""

import cost
import pytest
import torch

from invdiff.guidance.module import GuidanceModule


@pytest.mark.parametrize("name", cost.HELD_TO_REQUIREMENT)
def test_the_module_is_small_beside_the_denoiser(name):
    counted = cost.size(name)
    assert 0 < counted["parameter_share"] <= cost.MAX_PARAMETERS
    assert 0 < counted["flop_share"] <= cost.MAX_FLOPS


@pytest.mark.parametrize(("name", "published"), [("SD 1.5", 859_520_964), ("SDXL", 2_567_463_684)])
def test_the_shapes_are_those_of_the_published_models(name, published):
    network, config, *_ = cost.SHAPES[name]
    with torch.device("meta"):
        denoiser = network(**config)
    assert denoiser.num_parameters() == published


def test_what_is_counted_is_what_a_pipeline_gets(tiny_pipe):
    counted, given = cost.fitting_module(tiny_pipe.unet), GuidanceModule.for_pipeline(tiny_pipe)
    sizes = [{name: value.shape for name, value in module.named_parameters()} for module in (counted, given)]
    assert sizes[0] == sizes[1]
