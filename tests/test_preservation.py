"""Captions that are held to the frozen model are not those of the images, nor what the model takes for them."""

from types import SimpleNamespace

import torch

from invdiff.models.frozen import FrozenDenoiser
from invdiff.training import preservation
from invdiff.training.preservation import unrelated_captions, unrelated_condition


def test_captions_with_the_last_word_of_one_of_the_images_are_left_out():
    every, some = unrelated_captions([]), unrelated_captions(["my dog", "A photo of the MOON!"])
    assert {*every} - {*some} == {"a photo of a dog", "a photo of the moon"}
    assert {*every} - {*unrelated_captions(["a dog lying in the snow"])} >= {"a photo of a dog"}


def test_what_the_model_takes_for_a_caption_of_the_images_is_left_out(tiny_pipe, encoded, monkeypatch):
    everyday = unrelated_captions([])[::16]
    monkeypatch.setattr(preservation, "unrelated_captions", lambda captions: everyday)
    with FrozenDenoiser(tiny_pipe) as frozen:
        for threshold, empty in ((0.0, False), (10.0, True)):
            monkeypatch.setattr("invdiff.config.AuditConfig.caption_threshold", threshold)
            found = unrelated_condition(tiny_pipe, frozen, encoded, torch.arange(12), seed=0)
            assert (not found) == empty


def test_of_a_class_conditional_model_they_are_the_classes_of_no_image():
    data = SimpleNamespace(conditions={"class_labels": torch.tensor([0, 3, 5])})  # the last is the null class
    assert unrelated_condition(None, None, data, torch.arange(2), seed=0)["class_labels"].tolist() == [1, 2, 4]
