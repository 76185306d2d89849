import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from invdiff.errors import ModelError
from invdiff.models.features import FeatureCapture, feature_block


def run(unet: nn.Module) -> None:
    numbers = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(2, 4, 8, 8, generator=numbers), torch.randn(2, 16, 16, generator=numbers)
    with torch.no_grad():
        unet(latents, 500, embeds)


def test_the_middle_block_is_read(tiny_pipe: StableDiffusionPipeline) -> None:
    capture = FeatureCapture(tiny_pipe.unet, "mid_block")
    run(tiny_pipe.unet)
    assert capture.take().shape == (2, 32, 4, 4)


def test_of_a_block_with_several_outputs_one_is_chosen(tiny_pipe: StableDiffusionPipeline) -> None:
    capture = FeatureCapture(tiny_pipe.unet, "down_blocks.0", read=lambda output: output[0].clone())
    run(tiny_pipe.unet)
    assert capture.take().shape == (2, 16, 4, 4)


def test_what_later_blocks_overwrite_is_kept_as_it_was(tiny_pipe: StableDiffusionPipeline) -> None:
    def overwrite(block: nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.zero_()

    capture = FeatureCapture(tiny_pipe.unet, "mid_block")
    run(tiny_pipe.unet)
    expected = capture.take()
    tiny_pipe.unet.mid_block.register_forward_hook(overwrite)
    run(tiny_pipe.unet)
    assert torch.equal(capture.take(), expected)


def test_what_is_kept_can_be_smaller_than_the_output(tiny_pipe: StableDiffusionPipeline) -> None:
    capture = FeatureCapture(tiny_pipe.unet, "mid_block", read=lambda hidden: hidden.mean((2, 3)))
    run(tiny_pipe.unet)
    assert capture.take().shape == (2, 32)


def test_features_are_taken_once(tiny_pipe: StableDiffusionPipeline) -> None:
    capture = FeatureCapture(tiny_pipe.unet, "mid_block")
    run(tiny_pipe.unet)
    capture.take()
    with pytest.raises(ModelError, match="ran without its block 'mid_block'"):
        capture.take()


def test_a_closed_capture_records_nothing(tiny_pipe: StableDiffusionPipeline) -> None:
    capture = FeatureCapture(tiny_pipe.unet, "mid_block")
    capture.close()
    run(tiny_pipe.unet)
    with pytest.raises(ModelError, match="ran without"):
        capture.take()


def test_an_unknown_block_is_refused_with_those_there_are(tiny_pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match=r"named 'middle'.*mid_block"):
        feature_block(tiny_pipe.unet, "middle")
