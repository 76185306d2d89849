import pytest
import torch

from invdiff.errors import ModelError
from invdiff.models.frozen import FeatureCapture, feature_block


def run(unet):
    numbers = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(2, 4, 8, 8, generator=numbers), torch.randn(2, 16, 16, generator=numbers)
    with torch.no_grad():
        unet(latents, 500, embeds)


@pytest.mark.parametrize(
    ("path", "read", "shape"),
    [
        ("mid_block", torch.clone, (2, 32, 4, 4)),
        ("mid_block", lambda hidden: hidden.mean((2, 3)), (2, 32)),
        ("down_blocks.0", lambda outputs: outputs[0].clone(), (2, 16, 4, 4)),
    ],
)
def test_a_blocks_output_is_read_once_until_it_is_closed(tiny_pipe, path, read, shape):
    capture = FeatureCapture(tiny_pipe.unet, path, read)
    run(tiny_pipe.unet)
    assert capture.take().shape == shape
    with pytest.raises(ModelError, match=f"ran without its block '{path}'"):
        capture.take()
    capture.close()
    run(tiny_pipe.unet)
    with pytest.raises(ModelError, match="ran without"):
        capture.take()


def test_what_later_blocks_overwrite_is_kept_as_it_was(tiny_pipe):
    capture = FeatureCapture(tiny_pipe.unet, "mid_block")
    run(tiny_pipe.unet)
    expected = capture.take()
    tiny_pipe.unet.mid_block.register_forward_hook(lambda block, inputs, output: [output.zero_(), None][1])
    run(tiny_pipe.unet)
    assert torch.equal(capture.take(), expected)


def test_an_unknown_block_is_refused_with_those_there_are(tiny_pipe):
    with pytest.raises(ModelError, match=r"named 'middle'.*mid_block"):
        feature_block(tiny_pipe.unet, "middle")
