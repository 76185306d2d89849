"""The command line, in process, on tiny models: the whole way, errors, and that each flag has its effect."""

import json
import shlex
from unittest.mock import Mock

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from conftest import CAPTIONS, contents, made_up_measures, make_guidance_module, make_tiny_pipeline, write_tiny_folder
from invdiff import Audit, FinetuneConfig, GenerateConfig, Results, cli
from invdiff.auditing.edits import Edits, apply
from invdiff.cli.arguments import labelled_folders
from invdiff.errors import ConfigError, DataError
from runs import make_audit
from test_finetune import SHAPE
from tiny import make_tiny

FIGURES = {"interval": (0.4, 0.6), "floor": 0.1}


def run(*words, env=None):
    return CliRunner().invoke(cli.app, [str(word) for word in words], env=env, catch_exceptions=False)


def succeed(*words):
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*words, env=None):
    result = run(*words, env=env)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def next_command(stdout):
    """The words of the command that the last line names."""
    return shlex.split(stdout.rstrip("\n").split("\n")[-1].partition("Next")[2].partition(": ")[2])


def yaml_file(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INVDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recorded(monkeypatch):
    """Replace what a command calls, such as "invdiff.demo.run_demo", by a mock that notes its arguments."""

    def record(name, result=None):
        monkeypatch.setattr(name, noted := Mock(return_value=result))
        return noted

    return record


def test_the_whole_way_each_command_naming_the_next(tmp_path, cache):
    data = write_tiny_folder(tmp_path / "my photos", num_images=24)
    shape = yaml_file(tmp_path / "shape.yaml", SHAPE.to_dict())
    few = yaml_file(tmp_path / "few.yaml", {"batch_size": 4, "autoencoder_batch_size": 4, "ema_decay": 0.5})
    steps = ("--steps", 3, "--autoencoder-steps", 2, "--config", few, "--quiet")
    out = succeed("finetune", data, "--output", tmp_path / "model", "--architecture", shape, *steps)
    words = next_command(out)
    assert words == ["invdiff", "audit", f"{tmp_path / 'model'}", f"{data}", "--output", f"{tmp_path / 'audit'}"]

    loose = yaml_file(tmp_path / "loose.yaml", {"min_images": 4, "caption_threshold": 0.0, "resolution": 8})
    out = succeed(*words[1:], "--solver", "exact", "--config", loose, "--quiet")
    assert list((tmp_path / "audit").glob("*.png"))
    assert "landbird" in out
    words = next_command(out)
    assert words[:4] == ["invdiff", "train", f"{tmp_path / 'model'}", f"{data}"]

    out = succeed(*words[1:], "--steps", 2, "--batch-size", 4, "--quiet")
    words = next_command(out)
    assert words[:2] == ["invdiff", "generate"]
    assert set(words[3:5]) == set(CAPTIONS)
    assert words[words.index("--resolution") + 1] == "8"

    out = succeed(*words[1:], "--images-per-prompt", 2, "--steps", 1, "--quiet")
    words = next_command(out)
    assert "--module" not in words
    assert words[-6:] == ["--images-per-prompt", "2", "--steps", "1", "--resolution", "8"]
    out = succeed(*words[1:], "--quiet")
    images = tmp_path / "images"
    assert next_command(out)[:3] == ["invdiff", "evaluate", str(images / "base")]

    settings = ("--steps", 1, "--batch-size", 4, "--resolution", 16, "--output", tmp_path / "annotator", "--quiet")
    words = next_command(succeed("annotator", "train", data, "--attribute", "background", *settings))
    assert words[:4] == ["invdiff", "evaluate", str(images / "base"), str(images / "guided")]
    out = succeed(*words[1:], "--reference", data, "--output", tmp_path / "results.json", "--quiet")
    where, table = tmp_path / "results.json", tmp_path / "results.csv"
    assert f"The results are in {where}, and as a table in {table}." in out
    assert next_command(out)[1:] == ["report", str(tmp_path), "--output", str(tmp_path / "report")]
    assert table.read_text().startswith("model,guidance_scale,")
    results = json.loads(where.read_text())["models"]
    assert set(results) == {"base", "guided"}
    assert results["base"]["3.0"]["frechet"] > 0


def test_the_whole_way_without_captions(tmp_path, cache):
    """An unconditional model and a mere folder of images."""
    make_tiny("ddpm").save_pretrained(tmp_path / "model")
    photos = write_tiny_folder(tmp_path / "photos")
    (photos / "metadata.csv").unlink()
    loose = yaml_file(tmp_path / "audit.yaml", {"solver": "gradient", "min_images": 4, "min_share": 0.1})
    settings = ("--no-captions", "--quiet")
    shown = succeed("audit", tmp_path / "model", photos, "--output", tmp_path / "audit", "--config", loose, *settings)
    assert "--no-captions" in next_command(shown)
    shown = succeed(*next_command(shown)[1:], "--steps", 2, "--batch-size", 4, "--quiet")
    drawing = ("--guidance-scale", 1, "--images-per-prompt", 2, "--steps", 1, "--quiet")
    succeed("generate", tmp_path / "model", "--module", tmp_path / "module", "--output", tmp_path / "images", *drawing)
    rows = [json.loads(line) for line in (tmp_path / "images" / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["", ""]


def test_demo_passes_its_settings_on(tmp_path, recorded):
    base, guided = made_up_measures(0.5, **FIGURES), made_up_measures(0.125, **FIGURES)
    run_demo = recorded("invdiff.demo.run_demo", Results({"base": {"3.0": base}, "guided": {"3.0": guided}}))
    out = succeed("demo", "--output", tmp_path, "--images-per-prompt", 5, "--severity", 0.9, "--quiet")
    config, progress = (run_demo.call_args.kwargs[name] for name in ("config", "progress"))
    assert (config.images_per_prompt, config.severity, progress) == (5, 0.9, False)
    rows = [line.split("│") for line in out.splitlines() if "0.400 to 0.600" in line]
    assert [[cell.strip() for cell in row[1:5]] for row in rows] == [
        ["base", "3", "0.500", "0.400 to 0.600"],
        ["guided", "3", "0.125", "0.400 to 0.600"],
    ]
    assert all(len(line) <= 80 for line in out.splitlines() if "│" in line)


def test_generate_passes_module_mix_and_settings_on(tiny_pipe_dir, tmp_path, recorded):
    generate = recorded("invdiff.sampling.generate")
    make_guidance_module(make_tiny_pipeline()).save_pretrained(tmp_path / "module")
    file = yaml_file(tmp_path / "c.yaml", {"seed": 5, "num_inference_steps": 3})
    lines = tmp_path / "prompts.txt"
    lines.write_text("second\n\n third \n")
    guided = ("--module", tmp_path / "module", "--environments", "0.7,0.3", "--scale", 0.5)
    settings = ("--config", file, "--seed", 6, "--output", tmp_path / "o", "-q")
    succeed("generate", tiny_pipe_dir, "first", "--prompts-file", lines, *guided, *settings)
    (_, *given), options = generate.call_args
    assert given == [["first", "second", "third"], tmp_path / "o"]
    assert options["module"].num_groups == (2,)
    config = GenerateConfig(seed=6, num_inference_steps=3, scale=0.5)
    assert options.items() >= {"config": config, "environments": [0.7, 0.3], "progress": False}.items()
    words = ["generate", tiny_pipe_dir, "first", "--environments", "iid", "--output", tmp_path / "o", "-q"]
    assert "Expected --module beside --scale and --environments" in fail(*words)
    out = succeed(*words, "--module", tmp_path / "module", "--", "-odd prompt")
    assert generate.call_args.kwargs["environments"] == "iid"
    succeed(*next_command(out)[1:])
    assert generate.call_args.args[1] == ["first", "-odd prompt"]


def test_finetune_passes_its_arguments_on_and_the_data_s_to_the_next_command(tiny_folder, tmp_path, recorded):
    finetune = recorded("invdiff.training.finetune.finetune")
    columns = ("--caption-column", "background", "--limit", "5")
    settings = ("--base", "org/model", "--learning-rate", 1e-4)
    words = ("finetune", tiny_folder, "--output", tmp_path / "m", *settings, *columns)
    loud = run(*words)
    (data, *_), options = finetune.call_args
    assert (loud.stderr, options["progress"]) == ("loading images\n", True)
    expected = {"base": "org/model", "architecture": None, "config": FinetuneConfig(learning_rate=1e-4)}
    assert options.items() >= expected.items()
    assert data.captions == ["land", "water", "land", "water", "land"]
    assert next_command(loud.stdout)[-4:] == list(columns)
    assert run(*words, "--quiet").stderr == ""
    assert not finetune.call_args.kwargs["progress"]


def test_changes_by_people_are_printed_by_audit_and_train(tiny_pipe_dir, tiny_folder, tmp_path, cache, recorded):
    loose = yaml_file(tmp_path / "loose.yaml", {"min_images": 4, "caption_threshold": 0.0, "min_share": 0.1})
    again = ("audit", tiny_pipe_dir, tiny_folder, "--output", tmp_path / "a", "--solver", "exact", "--config", loose)
    assert "people" not in run(*again).stderr
    found = Audit.load(tmp_path / "a")
    prompt = next(index for index, entry in enumerate(found.prompts) if entry.found)
    changed = apply(found, Edits().without_images([3, 5]).with_cuts(0, prompt, [0.125]))
    changed.save(tmp_path / "a")

    shown = " ".join(run(*again).stderr.split())
    assert "people's changes in" in shown
    assert "are kept" in shown
    train = recorded("invdiff.training.train.train")
    words = ("train", tiny_pipe_dir, tiny_folder, tmp_path / "a", "--output", tmp_path / "m")
    shown = run(*words).stderr
    assert "2 images are left out and cuts between groups were moved by hand under 1 prompt." in shown
    assert "People" not in run(*words, "--quiet").stderr
    assert train.call_args.args[2].fingerprint == changed.fingerprint

    assert "put aside, in" in run(*again, "--min-images", 13).stderr  # nothing is found any more
    assert (tmp_path / "a" / f"curation-{found.fingerprint}.json").is_file()

    before = contents(tmp_path / "a")
    (_, model, data, *rest), others = again, write_tiny_folder(tmp_path / "others", 10)
    make_tiny_pipeline(1).save_pretrained(tmp_path / "model")
    assert "data_fingerprint was" in fail("audit", model, others, *rest, "-q")
    assert "denoiser_fingerprint was" in fail("audit", tmp_path / "model", data, *rest, "-q")
    assert "own_images_of was None, now ['a']" in fail("audit", model, "--prompt", "a", *rest, "-q")
    assert contents(tmp_path / "a") == before


def test_images_that_could_not_be_read_are_told_by_audit_its_files_and_report(tiny_pipe_dir, tmp_path, cache, plain):
    photos, found, output = write_tiny_folder(tmp_path / "photos"), tmp_path / "audit", tmp_path / "report"
    (photos / "07.png").write_bytes((photos / "07.png").read_bytes()[:500])
    told = "1 of 12 images could not be read and is left out: 07.png (image file is truncated"
    fewer = ("--max-unreadable", "0.1", "--quiet")
    small = yaml_file(tmp_path / "small.yaml", {"min_images": 4, "caption_threshold": 0.0, "min_share": 0.1})
    words = ("audit", tiny_pipe_dir, photos, "--output", found, "--solver", "exact", "--config", small, *fewer)
    for _ in range(2):  # measured, and read back
        assert told in " ".join(run(*words).stderr.split())
    assert json.loads((found / "audit.json").read_text())["unreadable"].keys() == {"07.png"}
    assert Audit.load(found).unreadable.keys() == {"07.png"}
    succeed("report", found, "--output", output)
    assert told in (output / "report.html").read_text()
    assert "1 of 12 images could not be read" in (output / "report.md").read_text()


@pytest.mark.parametrize("output", ["photos", "photos/new/audit", "link/audit", "photos/../photos/audit"])
def test_an_output_folder_among_the_images_is_refused_before_work(output, tmp_path):
    photos, audit = tmp_path / "photos", tmp_path / "audit"
    for name in ("cat/0.png", "dog/0.png"):
        (photos / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(photos / name)
    (tmp_path / "link").symlink_to(photos)
    make_audit(audit)
    for words in (
        ("audit", "absent/model", photos, "--no-captions", "-q"),
        ("train", "absent/model", photos, audit, "--no-captions", "-q"),
        ("report", audit, "--data", photos, "--no-captions"),
        ("annotator", "train", photos, "-q"),
        ("annotator", "measure", "absent/model", photos, "-q"),
    ):
        assert "Expected a folder to write to outside the data" in fail(*words, "--output", tmp_path / output)
    assert sorted(path.name for path in photos.rglob("*")) == ["0.png", "0.png", "cat", "dog"]


def test_beside_a_metadata_file_only_the_folders_of_its_images_are_refused(tmp_path):
    photos = write_tiny_folder(tmp_path / "photos", 2)
    assert "found data in" in fail("finetune", photos, "--output", photos, "-q")
    assert "absent/model" in fail("audit", "absent/model", photos, "--output", photos / "audit", "-q")


def test_where_nothing_is_found_audit_says_why_and_train_stops(
    tiny_pipe_dir, tiny_folder, tmp_path, cache, recorded, monkeypatch
):
    audit = ("audit", tiny_pipe_dir, tiny_folder, "--output", tmp_path / "audit", "-q", "--min-images")
    few = succeed(*audit, 13)
    assert "nothing found" in few
    assert "of too few images: give more images, or label a few" in few
    assert "Next" not in few
    monkeypatch.setattr("invdiff.auditing.factors.power", lambda *_: "a group of 8% would have been seen")
    words = next_command(succeed(*audit, 4))
    assert words[:2] == ["invdiff", "audit"]
    assert words[-4:] == ["--vision-encoder", "facebook/dinov2-small", "--min-images", "4"]
    message = fail("train", tiny_pipe_dir, tiny_folder, tmp_path / "audit", "--output", tmp_path / "module", "-q")
    assert "nothing to balance" in message
    recorded("invdiff.auditing.run.encode_vision")
    last = succeed(*words[1:], "-q")
    assert "No hidden group was found" in last
    assert "Next" not in last


def test_errors_name_what_is_wrong(tiny_pipe_dir, tiny_folder, tmp_path):
    make_guidance_module(make_tiny_pipeline()).save_pretrained(tmp_path / "module")
    (tmp_path / "p").write_bytes(b"\xff\xfe\x00")
    unknown = yaml_file(tmp_path / "unknown.yaml", {"x": 1})
    shape, draw = yaml_file(tmp_path / "shape.yaml", SHAPE.to_dict()), ("generate", tiny_pipe_dir)
    finetune, judge = ("finetune", tiny_folder), ("--annotator", "a", "--attribute", "b")
    mixed = (*draw, "p", "--module", tmp_path / "module", "--environments")
    mapped = ("evaluate", tmp_path, "--annotator", "labels", "--attribute", "b")
    wrong_targets = ("land", "land=a", "land=0.5,land=0.5", "=1", "land=0.5,,water=0.5")
    train = ("train", tiny_pipe_dir, tiny_folder, tmp_path)
    for expected, *words in (
        ("found nothing there", "audit", tiny_pipe_dir, tmp_path / "absent"),
        ("has no audit.json", *train),
        ("at least 0, got -1.0", *train, "--calibrate", -1),
        ("error: --mode: expected balanced beside", *train, "--mode", "invariant", "--calibrate", 3),
        ("error: --rank: expected nothing with backend 'module'", *train, "--backend", "module", "--rank", 4),
        ("error: --preserve: expected at least 0 and below 1, got 1.0", *train, "--preserve", 1),
        ("error: --null-adapter: exp", *train, "--backend", "tokens", "--null-adapter", "off"),
        ("There is no absent/one in this folder", "audit", "absent/one", tiny_folder),
        ("or pass --caption-column.", *finetune, "--caption-column", "x"),
        ("Raise --images-per-prompt instead", *draw, "p", "p"),
        ("FinetuneConfig: unknown setting x; known are steps, batch_size", *finetune, "--config", unknown),
        ("absent.yaml", *finetune, "--config", tmp_path / "absent.yaml"),
        ("found a pipeline. Check the order", "audit", tiny_folder, tiny_pipe_dir),
        ("nowhere, which is no folder", "evaluate", tmp_path / "nowhere", "--annotator", "labels", "--attribute", "b"),
        ("either a base or an", *finetune, "--base", "a", "--architecture", shape),
        ("--autoencoder-steps", *finetune, "--base", "a", "--autoencoder-steps", 3),
        ("a base for --fresh-denoiser", *finetune, "--fresh-denoiser"),
        ("--reference beside --limit", "evaluate", tmp_path, *judge, "--limit", 3),
        ("--module", *draw, "p", "--scale", 0.5),
        ("'lots'", *mixed, "lots"),
        ("one prompt per line", *draw, "--prompts-file", tmp_path / "p"),
        ("one prompt per line", *draw, "--prompts-file", tmp_path / "absent"),
        ("found other bytes in 'a \\udce9'", *draw, "a \udce9"),
        ("NUMBER,...", "demo", "--guidance-scales", "1,x"),
        *(("each once, for --target", *mapped, "--target", text) for text in wrong_targets),
    ):
        assert expected in fail(*words, "--output", tmp_path / "out", "-q"), words
    assert not (tmp_path / "out").exists()
    assert "Expected a .json file" in fail("evaluate", tmp_path, *judge, "--output", tmp_path / "r.csv")
    for name in ("metadata.json", "manifest.jsonl"):
        assert "that of a manifest of images" in fail("evaluate", tmp_path, *judge, "--output", tmp_path / name)
    out_of_range = run(*draw, "p", "--images-per-prompt", 0, "--output", tmp_path / "out")
    assert out_of_range.exit_code == 2
    assert "--images-per-prompt" in out_of_range.stderr


def test_other_errors_keep_their_traceback_and_stopping_says_how_to_go_on(tiny_folder, tmp_path, monkeypatch):
    words = ("finetune", tmp_path / "absent", "--output", tmp_path / "o", "-q")
    for debug, environment in ((("--debug",), {}), ((), {"INVDIFF_DEBUG": "1"})):
        with pytest.raises(DataError):
            run(*debug, *words, env=environment)

    def broken(*arguments, **keywords):
        raise errors.pop()

    errors = [ZeroDivisionError, torch.OutOfMemoryError, KeyboardInterrupt]
    monkeypatch.setattr("invdiff.training.finetune.finetune", broken)
    result = run("finetune", tiny_folder, "--output", tmp_path, "-q")
    assert (result.exit_code, result.stderr[:40]) == (130, "stopped; what was finished, if anything,")
    assert "found it full; finished work is kept" in fail("finetune", tiny_folder, "--output", tmp_path, "-q")
    with pytest.raises(ZeroDivisionError):
        run("finetune", tiny_folder, "--output", tmp_path, "-q")


def test_folders_are_named_after_themselves_or_by_the_user(tmp_path):
    one, two, odd = (tmp_path / name for name in ("one", "two", "x=y"))
    odd.mkdir()
    assert labelled_folders([str(one), str(odd)]) == {"one": [one], "x=y": [odd]}
    assert labelled_folders([f"a={one}", str(two), f"a={two}"]) == {"a": [one, two], "two": [two]}
    for twice in (["runs/1/base", "runs/2/base"], [str(one), f"one={two}"], [f"one={two}", str(one)]):
        with pytest.raises(ConfigError, match="NAME="):
            labelled_folders(twice)


def test_images_of_other_tools_are_evaluated_by_their_labels(tmp_path):
    (theirs := tmp_path / "base").mkdir()
    rows = ["file_name,text,seed,gender,age,coat"]
    for index, labels in enumerate(["man,old,white"] * 3 + ["woman,young,blue"]):
        Image.new("RGB", (8, 8), (20 * index, 100, 9)).save(theirs / f"{index}.png")
        rows.append(f"{index}.png,a doctor in white,{index},{labels}")
    (theirs / "metadata.csv").write_text("\n".join(rows) + "\n")
    attributes = ("--attribute", "gender", "--attribute", "age", "--subject-attribute", "coat")
    asked = ("--annotator", "labels", *attributes, "--target", "man=0.75,woman=0.25")
    out = succeed("evaluate", theirs, f"ours={theirs}", *asked, "--output", tmp_path / "r.json", "-q")
    measured = json.loads((tmp_path / "r.json").read_text())["models"]["ours"]["unstated"]
    assert (measured["bias"], measured["accuracy"]) == (0.5, 0.75)
    assert measured["attributes"]["gender"]["overall"]["kl_to_target"]["value"] == pytest.approx(0.0)
    assert list(measured["attributes"]) == ["gender", "age", "gender x age"]
    assert "unstated" in out
    assert "intersections are not corrected" in out
