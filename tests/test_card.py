import ast
import html
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from markdown_it import MarkdownIt

from conftest import made_up_measures, make_guidance_module, make_tiny_pipeline
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit, PromptAudit
from invdiff.auditing.run import audit
from invdiff.config import AuditConfig, TrainConfig
from invdiff.data.captioned import load_captioned_images
from invdiff.errors import ConfigError, DataError, ModelError
from invdiff.evaluation.results import AnnotatorRecord, Results
from invdiff.files import weights_digest
from invdiff.guidance.attach import mix_for
from invdiff.guidance.card import escape, render_card
from invdiff.guidance.loading import load_module
from invdiff.guidance.module import GuidanceModule
from invdiff.guidance.record import MOST_PROMPTS, training_record
from invdiff.models.load import load_pipeline
from invdiff.training.train import train
from tiny import make_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ["README.md", "config.json", WEIGHTS]
AUDIT = AuditConfig(
    solver="exact", min_images=4, min_share=0.1, contrast_log_snr=(-4.2,), caption_threshold=0.0, batch_size=12
)
FIGURES = {"interval": (0.61, 0.82), "floor": 0.0342, "accuracy": 0.93}
RESULTS = Results(
    {
        "guided": {
            "10.0": made_up_measures(0.05, **FIGURES),
            "3.0": made_up_measures(0.04, frechet=39.0, **FIGURES),
        },
        "base": {"3.0": made_up_measures(0.71, **FIGURES)},
    },
    attribute="background",
    annotator=AnnotatorRecord("my | judge", accuracy={"background": 0.875}),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_folder):
    """The folder of a module that a real audit and a short training run made."""
    folder = tmp_path_factory.mktemp("trained")
    make_tiny_pipeline().save_pretrained(folder / "my-birds")
    pipe = load_pipeline(folder / "my-birds", device="cpu")
    data, options = load_captioned_images(tiny_folder), {"cache_dir": folder / "cache", "progress": False}
    found = audit(pipe, data, config=AUDIT, **options)
    config = TrainConfig(steps=12, batch_size=4, mixed_precision="no", penalty=2.5, seed=3)
    train(pipe, data, found, folder / "module", config=config, **options)
    found.save(folder / "audit")
    return folder / "module"


@pytest.fixture
def module(trained):
    return GuidanceModule.from_pretrained(trained)


def rendered(card):
    """The card as HTML, by a renderer of CommonMark with tables."""
    return MarkdownIt("commonmark").enable("table").render(card.split("\n---\n", 1)[1])


def tables(card):
    """The rows of every table, as the text that a reader sees."""
    found = []
    for table in re.findall("<table>.*?</table>", rendered(card), flags=re.DOTALL):
        rows = re.findall("<tr>(.*?)</tr>", table, flags=re.DOTALL)
        found.append([[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows])
    return found


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def make_audit(*prompts):
    prompt_ids = np.arange(len(prompts))
    weights = np.full((len(prompts), 2), 0.5, np.float32)
    audits = Audit(
        (weights,), np.zeros(len(prompts), np.float32), prompt_ids, list(prompts), [], 0.0, {"solver": "auto"}
    )
    return audits, audits


def make_prompt(prompt, *, found=True, num_images=60, **options):
    shares = [0.95, 0.05] if found else []
    return PromptAudit(prompt, [prompt], num_images, found, "made up", "contrast", shares, 0.9, 0.8, **options)


def make_record(*prompts, **changes):
    losses = [[1.0 + index, 2.0 + index] for index in range(len(prompts))]
    settings = {
        "base_model": "org/name",
        "pipeline": "StableDiffusionPipeline",
        "family": "Stable Diffusion 1.x/2.x",
        "denoiser_fingerprint": "0" * 16,
        "data_fingerprint": "1" * 16,
        "num_images": 1234,
        "audits": make_audit(*prompts),
        "config": TrainConfig(),
        "rounds": 1,
        "log": [{"step": 10, "group_losses": losses}, {"step": 600, "group_losses": losses}],
    }
    return training_record(**(settings | changes))


def card_of(record, **config):
    settings = {"num_groups": [2], "mode": "balanced", "base_model": "org/name", "prompt_dim": 16}
    return render_card({**settings, **config, "record": record}, num_parameters=1, source="org/module")


def edited_audits(*names):
    """Audits of four images under two prompts, one image left out and the cuts of one prompt moved."""
    prompts = [make_prompt("a bird", num_images=2), make_prompt("a fish", num_images=2)]
    ids, scores = np.array([0, 0, 1, 1]), np.array([0.0, 1.0, 0.0, 1.0], np.float32)
    plain = Audit((np.eye(2, dtype=np.float32)[[0, 1, 0, 1]],), scores, ids, prompts, list("abcd"), 0.0, {})
    found = apply(plain, Edits(names=(names,), left_out=(0,), cuts={1: (0.5,)}))
    return found, found


def test_the_card_says_what_people_changed():
    record = make_record(audits=edited_audits("on land", ""))
    assert record["group_names"] == [["on land", ""]]
    assert record["changed_by_people"] == {"left_out": 1, "cuts_moved": 1}
    card = card_of(json.loads(json.dumps(record)))
    text = html.unescape(card)
    assert "people's words for what they saw in its pictures: group 0 is “on land”." in text
    assert "images left out: 1, prompts whose cuts between groups were moved by hand: 1." in text
    assert "numbers, not names" not in text


def test_the_card_says_nothing_of_people_where_they_changed_nothing():
    text = card_of(make_record(make_prompt("a bird")))
    assert "Groups have numbers, not names" in text
    assert "People changed" not in text


@pytest.mark.parametrize(
    ("names", "changed"),
    [
        (7, 7),
        ({"a": 1}, [1]),
        ([["<script>alert(1)</script>", "](x) | `*"], "abc", [3, None]], {"left_out": "<b>", "cuts_moved": 10**400}),
        ([["x" * 10_000]] * 1000, {"left_out": True, "cuts_moved": -3}),
    ],
)
def test_what_a_record_says_of_people_is_not_trusted(names, changed):
    record = {**make_record(make_prompt("a bird")), "group_names": names, "changed_by_people": changed}
    card = card_of(record)
    assert "People changed" not in card
    assert not re.search("<(?!/?(?:h[12]|p|pre|code|table|thead|tbody|tr|t[hd]|ul|li|a|strong)\\b)", rendered(card))
    assert len(card) < 20_000


def test_training_writes_what_it_knows(trained):
    card = (trained / "README.md").read_text(encoding="utf-8")
    settings = json.loads((trained / "train.json").read_text())["settings"]
    found = Audit.load(trained.parent / "audit")
    made_of, groups, losses = tables(card)
    facts = dict(made_of)
    assert facts["Base model"] == "my-birds (a local folder)"
    assert facts["Family"] == "Stable Diffusion 1.x/2.x, StableDiffusionPipeline"
    assert facts["Denoiser"] == "UNet2DConditionModel, predicts epsilon"
    assert facts["Denoiser fingerprint (weights and noise schedule)"] == found.settings["denoiser_fingerprint"]
    assert facts["Data fingerprint (captions and images)"] == settings["data"]
    assert facts["Training images"] == "12"
    assert facts["Mode"] == "balanced"
    assert facts["Parameters of the module"] == f"{GuidanceModule.from_pretrained(trained).num_parameters():,}"
    assert re.fullmatch(r"invdiff \S+, torch \S+, diffusers \S+", facts["Versions"])
    assert [row[0] for row in groups[1:]] == [prompt.prompt for prompt in found.prompts]
    assert groups[1][2] == " / ".join(f"{share:.1%}" for share in found.prompts[0].shares)
    log = [json.loads(line)["group_losses"] for line in (trained / "log.jsonl").read_text().splitlines()]
    assert losses[0][2:] == ["Loss at step 10", "Loss at the end (step 12)"]
    assert losses[1][2:] == [f"{log[0][0][0]:.3f}", f"{log[-1][0][0]:.3f}"]
    assert "lambda, the weight of the variance of group losses: 2.5; captions dropped: 0.1; seed: 3." in card
    assert "`exact` splits every prompt" in card
    assert front_matter(card) == {
        "library_name": "diffusers",
        "tags": ["invdiff", "guidance", "fairness", "debiasing"],
    }


def test_a_card_does_not_tell_where_the_files_lay(trained):
    assert str(trained.parent) not in (trained / "README.md").read_text(encoding="utf-8")


def test_a_card_says_that_nothing_was_measured(trained):
    assert "None: images of this module have not been measured" in (trained / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_base_model_is_linked_where_it_is_on_the_hub(tmp_path, monkeypatch, is_folder):
    monkeypatch.chdir(tmp_path)
    if is_folder:
        (tmp_path / "org" / "name").mkdir(parents=True)
    card = card_of(make_record(make_prompt("a photo")))
    assert front_matter(card).get("base_model") == (None if is_folder else "org/name")
    assert ('from_pretrained("org/name")' in card) == (not is_folder)


@pytest.mark.parametrize(
    "name", ["", "/home/me/models/birds", "birds", "../org/name", "org/name/unet", "C:\\m\\birds"]
)
def test_a_folder_is_not_linked(name):
    card = card_of(make_record(make_prompt("a photo"), base_model=name), base_model=name)
    assert "base_model" not in front_matter(card)
    assert "me/models" not in card


HOSTILE = [
    "a | b | c",
    "line\nbreak\r\n\n# heading",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[click](https://example.org) ![x](https://example.org/x.png) <https://example.org>",
    "```\nfence `code` \\| \\`",
    "**bold** _it_ ~~gone~~ $x$ &lt; &amp;",
    "---\nlicense: mit\n---",
    "\u202egnp.exe\u2028tail \x00\x1b[31m \ud800",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is_and_stays_in_its_cell(text):
    record = make_record(make_prompt(text), make_prompt("nothing: " + text, found=False))
    card = card_of({**record, "base": {**record["base"], "family": text}}, prediction_type=text)
    card.encode("utf-8")
    _, groups, losses = tables(card)
    shown = " ".join(re.sub("[\u202e\u2028\x00\x1b\ud800]", lambda m: "" if m[0] == "\u202e" else " ", text).split())
    assert [len(row) for row in groups] == [6, 6]
    assert [len(row) for row in losses] == [4, 4, 4]
    assert groups[1][0] == losses[1][0] == shown
    page = rendered(card)
    assert not re.findall("<(?:script|img|em|strong)", page)
    assert re.findall('<a href="(.*?)"', page) == ["https://github.com/invdiff/invdiff"]
    assert re.findall("<h[12]>(.*?)</h", page)[1:] == [
        "Use", "What it was made of", "Hidden groups", "Training", "Figures", "Limits",
    ]  # fmt: skip
    assert "license" not in front_matter(card)
    assert '"a photo of ..."' in card or text in card


def test_a_long_caption_is_cut():
    assert escape("word " * 50, limit=20) == "word word word word…"
    assert len(make_record(make_prompt("x" * 10_000))["prompts"][0]["prompt"]) == 300


def test_of_many_prompts_the_largest_with_groups_come_first():
    prompts = [make_prompt(f"p{index}", found=index % 2 == 1, num_images=index) for index in range(300)]
    record = make_record(*prompts)
    card = card_of(record)
    assert len(record["prompts"]) == MOST_PROMPTS
    assert [row[0] for row in tables(card)[1][1:3]] == ["p299", "p297"]
    assert "Inferred under 150 of 300 prompts" in card
    assert "275 further prompts are left out here." in card


def test_prompts_without_groups_are_named():
    card = card_of(make_record(make_prompt("a photo"), make_prompt("a drawing", found=False)))
    assert "not mean that nothing is there, under: a drawing (60 images)." in card


def test_losses_follow_a_prompt_through_the_rounds():
    first, _ = make_audit(make_prompt("a"), make_prompt("b"))
    last, _ = make_audit(make_prompt("b"), make_prompt("a", found=False))
    log = [{"step": 10, "group_losses": [[1, 2], [3, 4]]}, {"step": 20, "group_losses": [[5, 6], [7, 8]]}]
    by_prompt = {p["prompt"]: p["losses"] for p in make_record(audits=(first, last), log=log, rounds=2)["prompts"]}
    assert by_prompt == {"a": [[1, 2], None], "b": [[3, 4], [5, 6]]}
    assert tables(card_of(make_record(audits=(first, last), log=log)))[2][1:][0][2:] == ["1.000", "not known"]


def test_numbers_that_json_lacks_are_not_known():
    record = make_record(make_prompt("a", candidates=[]), log=[{"step": 10, "group_losses": [[math.nan, math.inf]]}])
    json.dumps(record, allow_nan=False)
    assert [row[2] for row in tables(card_of(record))[2][1:]] == ["not known"] * 2


@pytest.mark.parametrize("family", ["sd1", "dit", "ddpm"])
@pytest.mark.parametrize("num_groups", [2, 3, (2, 6)])
def test_the_example_is_python_that_fits(family, num_groups):
    module = GuidanceModule.for_pipeline(make_tiny(family), num_groups=num_groups)
    card = module.model_card("org/module")
    code = re.search("```python\n(.*?)```", card, flags=re.DOTALL)[1]
    ast.parse(code)
    assert 'GuidanceModule.from_pretrained("org/module")' in code
    call = {"sd1": '"a photo of ..."', "dit": "class_labels=", "ddpm": "batch_size="}[family]
    assert f"pipe({call}" in code
    mix_for(module, ast.literal_eval(re.search(r"environments=(.*?)\)`", card)[1]))


def test_an_invariant_module_has_no_target_mix(tiny_pipe):
    assert "target mix" not in GuidanceModule.for_pipeline(tiny_pipe, mode="invariant").model_card()


def test_a_module_of_before_there_were_cards_gets_one_that_says_so(tiny_pipe, tmp_path):
    make_guidance_module(tiny_pipe).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["record"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").unlink()
    card = load_module(tmp_path).model_card()
    assert "saved without a record of the groups" in card
    assert "saved without a record of its training" in card
    assert dict(tables(card)[0])["Training images"] == "not known"


JUNK = [None, [], "text", 7, True, {"x": []}, [[]], [1, "2", None, {"prompt": 3, "losses": "ab", "found": 1}], 10**400]


@pytest.mark.parametrize("junk", JUNK)
def test_a_malformed_record_is_not_known(junk):
    card_of(junk)
    whole = make_record(make_prompt("a photo")) | {"figures": {"background": {"models": {"base": {"3.0": {}}}}}}
    for name in whole:
        card_of({**whole, name: junk})
    for name in whole["prompts"][0]:
        card_of({**whole, "prompts": [{**whole["prompts"][0], "found": True, name: junk}]})
    for figures in ({"a": junk}, {"a": {"models": junk}}, {"a": {"models": {"base": {"x": junk}}}}):
        card_of({**whole, "figures": figures})
    base = {**whole["base"], "hub_id": "evil/name\nlicense: mit"}
    assert "license" not in front_matter(card_of({**whole, "base": base}))


def test_saving_again_gives_the_same_bytes(trained, module, tmp_path):
    module.add_figures(RESULTS)
    module.save_pretrained(tmp_path / "a")
    GuidanceModule.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


def test_a_loaded_module_writes_the_card_of_its_training(trained, module, tmp_path):
    module.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (trained / "README.md").read_bytes()
    assert (tmp_path / "config.json").read_bytes() == (trained / "config.json").read_bytes()


def test_the_card_is_no_part_of_the_weights(module):
    digest = weights_digest(module)
    module.add_figures(RESULTS)
    module.register_to_config(record=None)
    assert weights_digest(module) == digest


def test_only_the_main_process_writes_the_card(module, tmp_path):
    module.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("form", ["results", "mapping", "path", "text"])
def test_figures_are_stated_and_kept(module, tmp_path, form):
    path = tmp_path / "results.json"
    RESULTS.save(path)
    given = {"results": RESULTS, "mapping": RESULTS.to_dict(), "path": path, "text": str(path)}[form]
    module.add_figures(given, attribute="background", annotator="a | b", annotator_accuracy=0.998)
    module.save_pretrained(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert tables(card)[3][1:] == [
        ["base", "3.0", "0.71 (0.61 to 0.82)", "0.034", "93.0%", "-", "512"],
        ["guided", "3.0", "0.04 (0.61 to 0.82)", "0.034", "93.0%", "39.00", "512"],
        ["guided", "10.0", "0.05 (0.61 to 0.82)", "0.034", "93.0%", "-", "512"],
    ]
    assert "Attribute: background. Annotator: a | b, held-out accuracy 99.8%." in html.unescape(card)
    assert "The annotator errs" in card
    assert GuidanceModule.from_pretrained(tmp_path / "m").model_card() == card


@pytest.mark.parametrize("form", ["results", "path"])
def test_results_say_what_they_are_of_and_who_judged(module, tmp_path, form):
    RESULTS.save(tmp_path / "results.json")
    module.add_figures(RESULTS if form == "results" else tmp_path / "results.json")
    card = html.unescape(module.model_card())
    assert "Attribute: background. Annotator: my | judge, held-out accuracy 87.5%." in card


def test_figures_of_an_attribute_replace_only_its_own(module):
    for attribute, bias in (("background", 0.1), ("gender", 0.2), ("background", 0.3)):
        module.add_figures({"base": {"3.0": {"bias": bias, "bias_ci": [0, 1]}}}, attribute=attribute)
    biases = [table[1][2] for table in tables(module.model_card())[3:]]
    assert biases == ["0.30 (0.00 to 1.00)", "0.20 (0.00 to 1.00)"]


@pytest.mark.parametrize("wrong", [{"base": 3}, {"base": {"3.0": {}}}, {"base": {"x": {"bias": 1, "bias_ci": []}}}, 7])
def test_other_things_than_results_are_refused(module, tmp_path, wrong):
    with pytest.raises(ConfigError, match="Expected the results of an evaluation, got"):
        module.add_figures(wrong)
    (tmp_path / "other.json").write_text(json.dumps(wrong))
    with pytest.raises(ConfigError, match=r"Expected the results of an evaluation in .*other\.json, got"):
        module.add_figures(tmp_path / "other.json")
    with pytest.raises(DataError, match="found none"):
        module.add_figures(tmp_path / "absent.json")


@pytest.fixture(params=["no card on the hub", "another card on the hub"])
def hub(request, monkeypatch, tmp_path):
    """A hub that keeps what is uploaded in a folder."""
    uploads = []

    def load(name, **options):
        if request.param.startswith("no"):
            raise EntryNotFoundError("there is none")
        return ModelCard("---\nlibrary_name: other\n---\n\n# Another card")

    def upload_folder(*, repo_id, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / "uploaded")
        uploads.append((repo_id, options))

    for place in ("diffusers.utils.hub_utils", "diffusers.models.modeling_utils"):
        monkeypatch.setattr(f"{place}.create_repo", lambda name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload_folder)
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", load)
    return uploads


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_our_card_is_what_is_pushed(trained, module, tmp_path, hub, way):
    if way == "push_to_hub":
        module.push_to_hub("org/birds-guidance", private=True, commit_message="first")
    else:
        module.save_pretrained(
            str(tmp_path / "saved"), push_to_hub=True, repo_id="org/birds-guidance", commit_message="first"
        )
    ((repo_id, options),) = hub
    uploaded = tmp_path / "uploaded"
    assert (repo_id, options["commit_message"]) == ("org/birds-guidance", "first")
    assert sorted(path.name for path in uploaded.iterdir()) == FILES
    card = (uploaded / "README.md").read_text(encoding="utf-8")
    assert card == module.model_card("org/birds-guidance")
    assert 'GuidanceModule.from_pretrained("org/birds-guidance")' in card
    assert ModelCard(card).data.library_name == "diffusers"
    assert (uploaded / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


@pytest.fixture
def hub_cache(trained, tmp_path):
    """The cache of huggingface_hub as it is after org/birds-guidance was downloaded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--birds-guidance"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("config.json", WEIGHTS):
        shutil.copy(trained / name, repository / "snapshots" / commit)
    return tmp_path


def test_a_module_is_loaded_from_the_hub_with_its_card(trained, hub_cache, tmp_path):
    module = GuidanceModule.from_pretrained("org/birds-guidance", cache_dir=hub_cache)
    module.save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_load_module_takes_a_hub_id(trained, hub_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
    module = load_module("org/birds-guidance")
    assert weights_digest(module) == weights_digest(GuidanceModule.from_pretrained(trained))
    assert not module.training


@pytest.mark.parametrize("name", ["org/absent", "absent"])
def test_a_hub_id_that_cannot_be_reached_is_an_error_that_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=f"at {name}, found none.*or the hub id of a module; check the spelling, the"):
        load_module(name)


@pytest.mark.parametrize("name", ["./absent", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_question_of_the_network(name):
    with pytest.raises(ModelError, match=r"found none\. Give the folder that `invdiff train` wrote\.$"):
        load_module(name)


def test_a_pickle_is_never_loaded(trained, tmp_path):
    shutil.copy(trained / "config.json", tmp_path)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        GuidanceModule.from_pretrained(tmp_path)


def test_the_same_run_writes_the_same_card(trained, tiny_folder, tmp_path):
    pipe = load_pipeline(trained.parent / "my-birds", device="cpu")
    found = Audit.load(trained.parent / "audit")
    config = TrainConfig(steps=12, batch_size=4, mixed_precision="no", penalty=2.5, seed=3)
    options = {"config": config, "cache_dir": tmp_path / "cache", "progress": False}
    again = train(pipe, load_captioned_images(tiny_folder), found, tmp_path / "module", **options)
    for name in FILES:
        assert Path(tmp_path / "module" / name).read_bytes() == (trained / name).read_bytes()
    assert again.model_card() == (trained / "README.md").read_text(encoding="utf-8")
