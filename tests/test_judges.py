"""The judge of photographs, on an encoder that averages colours."""

import judges
import numpy as np
import torch
import worlds

from invdiff.data.captioned import load_captioned_images
from invdiff.evaluation.annotators.annotations import Annotator


class Colours:
    """The mean colour of each quarter of an image."""

    name = "colours"

    def extract(self, images):
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
        return pixels.reshape(len(pixels), 2, 32, 2, 32, 3).mean(axis=(2, 4)).reshape(len(pixels), -1)


def test_a_judge_is_measured_on_images_held_out_and_is_kept(tmp_path):
    drawn = [worlds.drawn(tmp_path / str(seed), num_images=200, severity=0.5, seed=seed) for seed in (0, 1)]
    data, held_out = map(load_captioned_images, drawn)
    attributes = ["light", "colour"]
    judge = judges.Judge.fit(data, attributes, held_out=held_out, encoder=Colours())
    confusion = judge.confusion("light")
    assert confusion.sum() == 100
    assert confusion.trace() > 90
    judge.save(tmp_path / "judge")
    again: Annotator = judges.Judge.load(tmp_path / "judge", Colours())
    images = [held_out.image(row) for row in range(0, 200, 2)]
    expected, seen = judge.predict(images), again.predict(images)
    for name in attributes:
        np.testing.assert_array_equal(again.confusion(name), judge.confusion(name))
        np.testing.assert_array_equal(seen.probabilities[name], expected.probabilities[name])
    assert again.feature_name == "colours"
    assert seen.features.shape == (100, 12)
    assert (np.array(seen.labels("light")) == np.array(held_out.attributes["light"])[::2]).mean() > 0.9


def test_an_encoder_is_tuned_once_and_follows_from_its_seed(tmp_path, monkeypatch):
    class Small(judges.EfficientNetLite):
        def __init__(self, tuned=None):
            self.network, self.side = torch.nn.Conv2d(3, 1280, 3, stride=8), 16
            self.network.extract_features = self.network.forward
            if tuned:
                self.network.load_state_dict(judges.read_tensors(tuned))

    monkeypatch.setattr(judges, "TUNING", judges.TUNING | {"side": 16, "steps": 3, "batch_size": 4})
    data = load_captioned_images(worlds.drawn(tmp_path / "data", num_images=40, seed=0))
    first, again, other = (
        Small.tuned_to(data, ["light", "colour"], tmp_path / name, seed).network.weight
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(Small.tuned_to(data, ["light"], tmp_path / "first", 1).network.weight, first)  # read back
