import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from sklearn.preprocessing import normalize
from transformers import CLIPImageProcessor, CLIPModel

from invdiff.errors import ConfigError, ModelError
from invdiff.evaluation.annotators.heldout import HeldOut, measure_annotator
from invdiff.evaluation.annotators.load import load_annotator, save_measured
from invdiff.evaluation.annotators.pretrained import ClipAnnotator, class_prompts
from tiny import make_tokenizer

PROMPTS = {
    "background": {"land": ["a photo on land", "land"], "water": "a photo of water"},
    "subject": {"bird": ["a bird"], "landbird": ["a landbird"], "waterbird": ["a waterbird", "waterbird on water"]},
}


@torch.no_grad()
def test_probabilities_are_the_softmax_of_scaled_cosines_to_mean_prompts(clip_dir, monkeypatch):
    model, tokenizer = CLIPModel.from_pretrained(clip_dir).eval(), make_tokenizer()
    processor, numbers = CLIPImageProcessor.from_pretrained(clip_dir), np.random.default_rng(0)
    images = [Image.fromarray(numbers.integers(0, 256, (36, 40, 3), dtype=np.uint8)) for _ in range(5)]
    shown, said = [], []  # each image and prompt on its own: no batches, no padding
    for image in images:
        tower = model.vision_model(pixel_values=processor(image, return_tensors="pt")["pixel_values"])
        shown.append(model.visual_projection(tower.pooler_output)[0].numpy())
    for prompt in ("a photo on land", "land", "a photo of water"):
        tower = model.text_model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]))
        said.append(model.text_projection(tower.pooler_output)[0].numpy())
    shown, said = normalize(shown), normalize(said)
    classes = normalize([said[:2].mean(axis=0), said[2]])
    monkeypatch.setattr("invdiff.models.encoders.BATCH_SIZE", 2)
    seen = ClipAnnotator(clip_dir, PROMPTS).predict(iter(images))
    expected = softmax(float(model.logit_scale.exp()) * shown @ classes.T, axis=1)
    np.testing.assert_allclose(seen.probabilities["background"], expected, atol=1e-4)
    np.testing.assert_allclose(seen.features, shown, atol=1e-5)
    assert seen.features.dtype == seen.probabilities["subject"].dtype == np.float32


def test_it_is_called_as_the_model_is_and_loaded_with_classes_only(clip_dir, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(PROMPTS))
    annotator = load_annotator(str(clip_dir), classes=tmp_path / "classes.json")
    assert annotator.name == annotator.feature_name == "tiny-clip"
    assert annotator.attributes == {"background": ("land", "water"), "subject": ("bird", "landbird", "waterbird")}
    assert annotator.confusion("background") is None
    seen = annotator.predict([])
    assert (seen.features.shape, seen.classes("subject").shape) == ((0, 8), (0,))
    with pytest.raises(ConfigError, match="Expected classes beside the CLIP model"):
        load_annotator(str(clip_dir))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "prompts by class by attribute"),
        (["gender"], "prompts by class by attribute"),
        ({"gender": {"man": "a man"}}, "two classes or more"),
        ({"gender": ["man", "woman"]}, "two classes or more"),
        ({"gender": {"man": "a man", "woman": []}}, "a prompt of each class"),
        ({"gender": {"man": "a man", "woman": " "}}, "a prompt of each class"),
        ({"gender": {"man": "a man", "woman": [3]}}, "text in item 1 in 'woman' in 'gender'"),
        ({"smiles": {True: "a smile", False: "no smile"}}, "true, false and numbers in quotes"),
        ({"gender": {"man": "a man " * 20, "woman": "a woman"}}, "at most 16 tokens"),
        ({"gender": {"man": "a man", "cannot tell": "a person"}}, "other than 'cannot tell'"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(clip_dir, prompts, message):
    with pytest.raises(ConfigError, match=message):
        ClipAnnotator(clip_dir, prompts)


@pytest.mark.parametrize("text", ["background:\n  land: a\n  water: [b, c]\n", "[", "gender: [man, woman]", "", None])
def test_classes_are_read_from_yaml_and_files_without_any_are_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "classes.yaml").write_text(text)
    if text and "water" in text:
        assert class_prompts(tmp_path / "classes.yaml") == {"background": {"land": ("a",), "water": ("b", "c")}}
    else:
        with pytest.raises(ConfigError, match=r"classes\.yaml"):
            class_prompts(tmp_path / "classes.yaml")


def test_a_measurement_comes_back_unless_it_is_of_a_model_that_was_replaced(clip_dir, data, tmp_path):
    shutil.copytree(clip_dir, tmp_path / "clip")
    annotator = ClipAnnotator(tmp_path / "clip", PROMPTS)
    held_out = measure_annotator(annotator, data, progress=False)
    save_measured(tmp_path / "measured", annotator, held_out, spec=str(tmp_path / "clip"), classes=PROMPTS)
    loaded = load_annotator(str(tmp_path / "measured"))
    assert loaded.name == "clip"
    assert loaded.confusion("background", 0.6).sum() == 12
    assert np.array_equal(loaded.confusion("background", 0.6), held_out.confusion("background", 0.6))
    assert loaded.confusion("subject") is None  # the images say nothing of it
    subjects, sure = PROMPTS["subject"], np.eye(3, dtype=np.float32)
    loaded.use_held_out(HeldOut({"subject": tuple(subjects)}, {"subject": sure}, truth={"subject": np.arange(3)}))
    assert [loaded.confusion(name).sum() for name in PROMPTS] == [12, 3]  # what was measured before stays
    model = CLIPModel.from_pretrained(clip_dir)
    model.text_projection.weight.data += 1
    model.save_pretrained(tmp_path / "clip")
    with pytest.raises(ModelError, match="found one of other weights"):
        load_annotator(str(tmp_path / "measured"))
