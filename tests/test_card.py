import ast
import dataclasses
import html
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from conftest import made_up_measures, make_guidance_module, make_tiny_pipeline
from invdiff import AuditConfig, GuidanceModule, TrainConfig, audit, load_captioned_images, load_guidance, train
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit, PromptAudit
from invdiff.errors import ConfigError, ModelError
from invdiff.evaluation.results import AnnotatorRecord, Quantity, Results
from invdiff.files import weights_digest
from invdiff.guidance.attach import mix_for
from invdiff.guidance.card import MOST_PROMPTS, render_card, training_record
from invdiff.models.load import load_pipeline
from runs import built_audit
from tiny import make_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ["README.md", "config.json", WEIGHTS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_folder):
    """The folder of a module that a real audit and a short training run made."""
    folder = tmp_path_factory.mktemp("trained")
    make_tiny_pipeline().save_pretrained(folder / "my-birds")
    pipe = load_pipeline(folder / "my-birds", device="cpu")
    data, options = load_captioned_images(tiny_folder), {"cache_dir": folder / "cache", "progress": False}
    settings = {"min_images": 4, "min_share": 0.1, "contrast_log_snr": (-4.2,), "caption_threshold": 0.0}
    found = audit(pipe, data, config=AuditConfig(solver="exact", batch_size=12, **settings), **options)
    steps = {"backend": "module", "steps": 12, "batch_size": 4, "preserve": 0}
    config = TrainConfig(**steps, mixed_precision="no", penalty=2.5, seed=3)
    train(pipe, data, found, folder / "module", config=config, **options)
    found.save(folder / "audit")
    return folder / "module"


@pytest.fixture
def module(trained):
    return GuidanceModule.from_pretrained(trained)


def rendered(card):
    return MarkdownIt("commonmark").enable("table").render(ModelCard(card).text)


def tables(card):
    """The rows of every table, as the text that a reader sees."""
    found = []
    for table in re.findall("<table>.*?</table>", rendered(card), flags=re.DOTALL):
        rows = re.findall("<tr>(.*?)</tr>", table, flags=re.DOTALL)
        found.append([[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows])
    return found


def make_prompt(prompt, *, found=True, num_images=60, **options):
    return PromptAudit(prompt, [prompt], num_images, found, "made up", **options)


def make_record(pipe, *prompts, **changes):
    losses = [[[1.0 + index, 2.0 + index] for index in range(len(prompts))]]
    log = [{"step": step, "group_losses": losses} for step in (10, 600)]
    found = built_audit(np.full((len(prompts), 2), 0.5), range(len(prompts)), prompts)
    settings = {"audit": found, "base_model": "org/name", "num_images": 1234, "rounds": 1}
    return training_record(pipe, **(settings | {"config": TrainConfig(), "log": log} | changes))


def card_of(record, **config):
    settings = {"num_groups": [2], "mode": "balanced", "base_model": "org/name", "prompt_dim": 16}
    return render_card({**settings, **config, "record": record}, num_parameters=1, source="org/module")


def test_training_writes_what_it_knows(trained):
    card = (trained / "README.md").read_text(encoding="utf-8")
    settings = json.loads((trained / "train.json").read_text())["settings"]
    found = Audit.load(trained.parent / "audit")
    made_of, groups, losses = tables(card)
    size = GuidanceModule.from_pretrained(trained).num_parameters()
    assert [value for _, value in made_of[1:-1]] == [
        *("my-birds (a local folder)", "Stable Diffusion 1.x/2.x, StableDiffusionPipeline"),
        *("UNet2DConditionModel, predicts epsilon", found.settings["denoiser_fingerprint"], settings["data"]),
        *("12", "module; in the null row of classifier-free guidance it is on", "balanced"),
        *("factor 1: 2, factor 2: 2", f"{size:,}"),
    ]
    assert re.fullmatch(r"invdiff \S+, torch \S+, diffusers \S+", made_of[-1][1])
    assert [row[0] for row in groups[1:]] == [prompt.prompt for prompt in found.prompts]
    assert groups[1][3] == " / ".join(f"{share:.1%}" for share in found.split(0, 0).shares)
    log = [json.loads(line)["group_losses"] for line in (trained / "log.jsonl").read_text().splitlines()]
    assert losses[0][3:] == ["Loss at step 10", "Loss at the end (step 12)"]
    assert losses[1][3:] == [f"{log[0][0][0][0]:.3f}", f"{log[-1][0][0][0]:.3f}"]
    assert "of what captions contribute: 2.5; captions dropped, where the null row is trained: 0.1; seed: 3." in card
    assert "`exact` splits every prompt" in card
    assert "None: images of this module have not been measured" in card
    assert str(trained.parent) not in card
    tags = ["invdiff", "guidance", "fairness", "debiasing"]
    assert ModelCard(card).data.to_dict() == {"library_name": "diffusers", "tags": tags}


def test_the_card_says_what_people_changed(loaded_pipe):
    """One image of four left out, the cuts of one prompt moved, one group named."""
    prompts = [make_prompt("a bird", num_images=2), make_prompt("a fish", num_images=2)]
    plain = built_audit(np.eye(2)[[0, 1, 0, 1]], [0, 0, 1, 1], prompts, scores=[0, 1, 0, 1])
    edited = apply(plain, Edits(names=(("on land", ""),), left_out=(0,), cuts={(0, 1): (0.5,)}))
    record = make_record(loaded_pipe, *prompts, audit=edited)
    text = html.unescape(card_of(json.loads(json.dumps(record))))
    assert "Names of groups were given by people who looked at the images: group 0 is “on land”." in text
    assert "images left out: 1, prompts whose cuts between groups were moved by hand: 1." in text
    assert len(Edits(cuts={(0, 1): (0.5,), (1, 1): (0.5,)}).prompts_cut) == 1  # cuts of two factors
    assert "numbers, not names" not in text
    text = card_of(make_record(loaded_pipe, make_prompt("a bird")))
    assert "Groups have numbers, not names" in text
    assert "People edited" not in text


@pytest.mark.parametrize("name", ["org/name", "", "/home/me/models/birds", "../org/name", "org/name/unet", "C:\\m\\b"])
def test_the_base_model_is_linked_where_it_is_on_the_hub(loaded_pipe, name):
    card = card_of(make_record(loaded_pipe, make_prompt("a photo"), base_model=name), base_model=name)
    assert ModelCard(card).data.get("base_model") == (name if name == "org/name" else None)
    assert ('from_pretrained("org/name")' in card) == (name == "org/name")
    assert "me/models" not in card


@pytest.mark.parametrize(
    "text",
    [
        "a | b | c\r\n\n# heading\n---\nlicense: mit\n---",
        "<script>alert(1)</script><img src=x onerror=alert(1)> $x$ &lt; &amp; {{ 7 * 7 }} {% raw %}",
        "[click](https://example.org) ![x](https://example.org/x.png) <https://example.org> **bold** _it_ ~~gone~~",
        "```\nfence `code` \\| \\`",
        "---\nlicense: mit\n---\u202egnp.exe\u2028tail \x00\x1b[31m \ud800",
    ],
)
def test_text_is_shown_as_it_is_and_stays_in_its_cell(loaded_pipe, text):
    record = make_record(loaded_pipe, make_prompt(text), make_prompt("nothing: " + text, found=False))
    figures = {"rows": [[text, text, text, 1.0, 0.0, 1.0]], "guided": [text], "annotator": text}
    record = {**record, "base": {**record["base"], "family": text}, "figures": {text: figures}}
    card = card_of({**record, "group_names": [[text]]}, prediction_type=text)
    card.encode("utf-8")
    _, groups, losses, measured = tables(card)
    shown = " ".join(re.sub("[\u202e\u2028\x00\x1b\ud800]", lambda m: "" if m[0] == "\u202e" else " ", text).split())
    assert [len(row) for row in groups] == [7, 7]
    assert [len(row) for row in losses] == [5, 5, 5]
    assert groups[1][0] == losses[1][0] == measured[1][0] == shown
    page = rendered(card)
    assert not re.findall("<(?:script|img|em|strong)", page)
    assert re.findall('<a href="(.*?)"', page) == ["https://github.com/invdiff/invdiff"]
    headings = ["Use", "How it was made", "Hidden groups", "Training", "Figures", "Limits"]
    assert re.findall("<h[12]>(.*?)</h", page)[1:] == headings
    assert ModelCard(card).data.license is None
    assert '"a photo of ..."' in card or text in card


def test_of_many_prompts_and_long_texts_the_first_are_stated(loaded_pipe):
    prompts = [make_prompt(f"p{i}" + "x" * 1000, found=i % 2 == 1, num_images=i) for i in range(300)]
    record = make_record(loaded_pipe, *prompts) | {"group_names": [["x" * 10_000] * 1000]}
    card = card_of(record)
    assert len(record["splits"]) == MOST_PROMPTS
    assert len(record["splits"][0]["prompt"]) == 300
    assert len(card) < 30_000
    assert [row[0][:4] for row in tables(card)[1][1:3]] == ["p299", "p297"]
    assert "Inferred under 150 of 300 prompts" in card
    assert "265 further prompts are left out here." in card
    card = card_of(make_record(loaded_pipe, make_prompt("a photo"), make_prompt("a drawing", found=False)))
    assert "not mean that nothing is there, under: a drawing (60 images)." in card


def test_losses_are_those_of_the_last_round(loaded_pipe):
    groups = {"group_losses": [[[1, 2], [3, 4]]]}, {"group_losses": [[[5, 6], [math.nan, 8]]]}
    log = [{"round": 0, "step": 10, **groups[1]}, *({"round": 1, "step": 10 * n, **of} for n, of in enumerate(groups))]
    record = make_record(loaded_pipe, make_prompt("a"), make_prompt("b"), log=log, rounds=2)
    json.dumps(record, allow_nan=False)
    assert {p["prompt"]: p["losses"] for p in record["splits"]} == {"a": [[1, 2], [5, 6]], "b": [[3, 4], [None, 8]]}
    assert tables(card_of(record))[2][3][3:] == ["3.000", "not known"]


@pytest.mark.parametrize(
    ("family", "call"), [("sd1", '"a photo of ..."'), ("dit", "class_labels="), ("ddpm", "batch_size=")]
)
def test_the_example_is_python_that_fits(family, call):
    pipe = make_tiny(family)
    for num_groups in (2, 3, (2, 6)):
        module = GuidanceModule.for_pipeline(pipe, num_groups=num_groups)
        card = module.model_card("org/module")
        code = re.search("```python\n(.*?)```", card, flags=re.DOTALL)[1]
        ast.parse(code)
        assert 'load_guidance("org/module")' in code
        assert f"pipe({call}" in code
        mix_for(module, ast.literal_eval(re.search(r"environments=(.*?)\)`", card)[1]))


def test_an_invariant_module_without_a_record_has_a_card_that_says_so(loaded_pipe, tmp_path):
    make_guidance_module(loaded_pipe, mode="invariant").save_pretrained(tmp_path)
    card = load_guidance(tmp_path).model_card()
    assert "target mix" not in card
    assert card.count("saved without a record of") == 2  # the groups, and its training
    assert dict(tables(card)[0])["Training images"] == "not known"


JUNK = (None, "text", {"x": []}, [1, "2", None, [], {"prompt": 3, "losses": "ab", "found": 1}], 10**400)


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: type(junk).__name__)
def test_a_malformed_record_is_not_known(loaded_pipe, junk):
    whole, rows = make_record(loaded_pipe, make_prompt("a photo")), [["base", "3.0", "Bias", 0.5, None, None]]
    malformed = [junk, *(whole | {"figures": {"a": {"rows": rows, "guided": []}}, name: junk} for name in whole)]
    malformed += [whole | {"splits": [whole["splits"][0] | {name: junk}]} for name in whole["splits"][0]]
    for figures in (junk, {"rows": junk, "guided": []}, {"rows": [junk], "guided": junk}):
        malformed += [whole | {"figures": {"a": figures}}, whole | {"figures": figures}]
    for record in malformed:
        card_of(record)
    card = card_of(whole | {"base": whole["base"] | {"hub_id": "evil/name\nlicense: mit"}})
    assert ModelCard(card).data.license is None


def test_figures_are_stated_and_kept_and_are_no_part_of_the_weights(trained, module, tmp_path):
    digest = weights_digest(module)
    made = {"interval": (0.61, 0.82), "floor": 0.0342, "accuracy": 0.93}
    base = {"3.0": made_up_measures(0.71, **made), "10.0": made_up_measures(0.9, **made)}
    models = {"guided": {"3.0": made_up_measures(0.04, frechet=39.0, **made)}, "base": base}
    annotator = AnnotatorRecord("my | judge", accuracy={"background": 0.875})
    about = {"attribute": "background", "annotator": annotator, "module_scales": {"guided": 1.0, "base": 0.0}}
    Results(models, **about).save(tmp_path / "results.json")
    module.add_figures(Results.load(tmp_path / "results.json"))
    module.save_pretrained(tmp_path / "m")
    module.save_pretrained(tmp_path / "other-process", is_main_process=False)
    assert not (tmp_path / "other-process" / "README.md").exists()
    assert weights_digest(module) == digest
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")

    def stated(model, scale, bias, *quality):
        rows = [["Bias", bias, "0.61 to 0.82"], ["floor of Bias", "0.0342", "-"], ["subject accuracy", "0.93", "-"]]
        return [[model, scale, *row] for row in (*rows, *quality, ["fewest images of a prompt", "512", "-"])]

    frechet, (_, *shown) = ["Frechet distance (made up)", "39", "-"], tables(card)[3]
    base = [*stated("base", "3.0", "0.71"), *stated("base", "10.0", "0.9")]
    assert shown == [*base, *stated("guided", "3.0", "0.04", frechet)]
    assert "Attribute: background. Annotator: my | judge, held-out accuracy 87.5%." in html.unescape(card)
    assert "The annotator errs" in card
    assert GuidanceModule.from_pretrained(tmp_path / "m").model_card() == card
    figures = ModelCard(card).data.eval_results
    assert {one.dataset_name for one in figures} == {"guided images at guidance scale 3.0, annotated for background"}
    assert [figure.metric_value for figure in figures if figure.metric_type == "Bias"] == [0.04]


def test_figures_of_an_attribute_replace_only_its_own_and_other_things_are_refused(module):
    for attribute, bias in (("background", 0.1), ("gender", 0.2), ("background", 0.3)):
        measures = made_up_measures(bias, interval=(0.0, 1.0), floor=0.1)
        moved = {"feature shift (x), 'a bicycle'": Quantity(0.125), "feature shift (y)": Quantity(None)}
        named = dataclasses.replace(measures, attributes={attribute: measures.first}, preservation=moved)
        module.add_figures(Results({"guided": {"3.0": named}}, attribute=attribute))
    for wrong in ({"base": 3}, 7, "results.json", None):
        with pytest.raises(ConfigError, match="Expected the results of an evaluation, got"):
            module.add_figures(wrong)
    figures = tables(module.model_card())[3:]
    assert [rows[1][3] for rows in figures] == ["0.3", "0.2"]
    assert figures[0][-1] == ["guided", "3.0", "feature shift (x), 'a bicycle'", "0.125", "-"]  # after all others
    assert not any("feature shift (y)" in row for row in figures[0])


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_our_card_is_what_is_pushed_where_the_hub_has_another(trained, module, tmp_path, monkeypatch, way):
    uploads = []

    def upload_folder(*, repo_id, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / "uploaded")
        uploads.append((repo_id, options["commit_message"]))

    other = ModelCard("---\nlibrary_name: other\n---\n\n# Another card")
    for place in ("diffusers.utils.hub_utils", "diffusers.models.modeling_utils"):
        monkeypatch.setattr(f"{place}.create_repo", lambda name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload_folder)
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", lambda name, **options: other)
    options = {"repo_id": "org/birds-guidance", "commit_message": "first"}
    if way == "push_to_hub":
        module.push_to_hub(**options, private=True)
    else:
        module.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, **options)
    assert uploads == [("org/birds-guidance", "first")]
    uploaded = tmp_path / "uploaded"
    assert sorted(path.name for path in uploaded.iterdir()) == FILES
    card = (uploaded / "README.md").read_text(encoding="utf-8")
    assert card == module.model_card("org/birds-guidance")
    assert 'load_guidance("org/birds-guidance")' in card
    assert (uploaded / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


def test_a_module_is_loaded_from_the_hub_with_its_card(trained, tmp_path, monkeypatch):
    """From the cache of huggingface_hub as it is after org/birds-guidance was downloaded."""
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--org--birds-guidance"
    shutil.copytree(trained, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    load_guidance("org/birds-guidance").save_pretrained(tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes() for name in FILES)


def test_a_pickle_is_never_loaded_and_an_absent_folder_is_no_question_of_the_network(trained, tmp_path):
    shutil.copy(trained / "config.json", tmp_path)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_guidance(tmp_path)
    for name in ("./absent", "a/b/c"):
        with pytest.raises(ModelError, match=r"no such folder\. Give the folder that `invdiff train` wrote\.$"):
            load_guidance(name)
    message = r"at org/absent, could not load.*invdiff train.*no org/absent.* check the spelling"
    with pytest.raises(ModelError, match=message):
        load_guidance("org/absent")
