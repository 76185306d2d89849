import json
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from conftest import write_tiny_folder
from invdiff.data.captioned import load_captioned_images, readable_images
from invdiff.data.images import UnreadableImage
from invdiff.errors import DataError

RED = (255, 0, 0)


@pytest.fixture(autouse=True)
def parquet_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write_parquet(path, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(str(path))


def write_folder(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), RED).save(folder / name)


def named(*names):
    return [{"file_name": name, "text": "a bird"} for name in names]


def captioned(*texts):
    return [{"file_name": f"{row}.png", "text": text} for row, text in enumerate(texts)]


def test_reads_a_folder_with_csv_and_its_first_rows(tiny_folder):
    data = load_captioned_images(tiny_folder)
    assert len(data) == len(load_captioned_images(tiny_folder, limit=99)) == 12
    assert load_captioned_images(tiny_folder, limit=2).names == data.names[:2] == ["00.png", "01.png"]
    assert data.captions[:2] == ["a photo of a landbird", "a photo of a waterbird"]
    assert data.attributes == {"background": ["land", "water"] * 5 + ["land", "land"]}
    assert repr(data) == "CaptionedImages(12 images, 2 captions; attributes: background)"
    assert np.array_equal(data.image(3), Image.open(tiny_folder / "03.png"))


def test_reads_what_save_to_disk_wrote(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    table = {"image": [str(tmp_path / name) for name in ("a.png", "b.png")], "text": ["a", "b"], "age": [3, 4]}
    saved = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": saved.select([1])}).save_to_disk(tmp_path / "splits")
    data, test = load_captioned_images(tmp_path / "one"), load_captioned_images(tmp_path / "splits", split="test")
    assert (data.captions, test.captions, data.attributes) == (["a", "b"], ["b"], {"age": [3, 4]})
    assert data.image(0).getpixel((0, 0)) == RED
    assert data.folder == tmp_path / "one"
    assert "found test" in refusal(tmp_path / "splits")
    assert "Expected no split of one dataset, got 'test'" in refusal(tmp_path / "one", split="test")
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    assert "Expected a saved dataset in" in refusal(tmp_path / "one")


def test_reads_jsonl_with_typed_attributes_in_the_sub_folder_of_the_split(tmp_path):
    write_images(tmp_path / "train", "sub/a.png")
    rows = [{"file_name": "sub/a.png", "text": "é, a bird", "male": True}, named("b.png")[0] | {"age": 3}]
    write_folder(tmp_path / "train", rows)
    data = load_captioned_images(tmp_path)
    assert data.captions == ["é, a bird", "a bird"]
    assert data.attributes == {"male": [True, None], "age": [None, 3]}
    assert data.image(0).getpixel((0, 0)) == RED
    assert data.is_own(0)


def test_reads_parquet_and_names_images_by_row(tiny_folder, tmp_path):
    in_folder = load_captioned_images(tiny_folder)
    rows = [{"bytes": (tiny_folder / name).read_bytes(), "path": name} for name in in_folder.names]
    write_parquet(tmp_path / "images.parquet", image=rows, caption=in_folder.captions, **in_folder.attributes)
    for source in (tmp_path, tmp_path / "images.parquet"):
        data = load_captioned_images(source, limit=11)
        assert data.names == [f"row {row}" for row in range(11)]
        first = in_folder.select(range(11))
        assert (data.attributes, data.fingerprint) == (first.attributes, first.fingerprint)
    assert "split 'test'" in refusal(tmp_path, split="test")
    assert "got 'test'" in refusal(tmp_path / "images.parquet", split="test")
    shutil.copy(tmp_path / "images.parquet", tmp_path / "train-more.parquet")
    assert "found some (train), and none in images.parquet" in refusal(tmp_path)
    (tmp_path / "train-more.parquet").unlink()
    for content in (b"not parquet at all", b""):
        (tmp_path / "images.parquet").write_bytes(content)
        assert f"Expected a parquet file at {tmp_path}" in refusal(tmp_path)


@pytest.mark.parametrize("beside", ["images/a.png", "train-0.png"])
def test_parquet_beside_its_image_files_is_read(tmp_path, beside):
    write_images(tmp_path, beside)
    write_parquet(tmp_path / "data.parquet", image=[beside], text=["a caption"])
    data = load_captioned_images(tmp_path)
    assert data.captions == ["a caption"]
    assert data.image(0).getpixel((0, 0)) == RED


def images_in_memory(kind, folder):
    paths = [str(folder / f"{row:02d}.png") for row in range(2)]
    images = {
        "pil": lambda: [Image.open(path).copy() for path in paths],
        "dicts": lambda: [{"bytes": Path(path).read_bytes(), "path": None} for path in paths],
        "dict paths": lambda: [{"bytes": None, "path": path} for path in paths],
    }.get(kind, lambda: paths)()
    table = datasets.Dataset.from_dict({"image": images, "text": ["a", "b"], "label": [1, -1]})
    if kind == "feature":
        names = datasets.ClassLabel(names=["cat", "dog"])
        table = table.cast_column("image", datasets.Image()).cast_column("label", names)
    return table


@pytest.mark.parametrize("kind", ["pil", "dicts", "dict paths", "paths", "feature"])
def test_reads_datasets_in_memory(kind, tiny_folder):
    data = load_captioned_images(images_in_memory(kind, tiny_folder))
    assert np.array_equal(data.image(1), Image.open(tiny_folder / "01.png"))
    assert data.captions == ["a", "b"]
    assert data.attributes["label"] == (["dog", None] if kind == "feature" else [1, -1])
    assert data.names[1] == (str(tiny_folder / "01.png") if kind == "paths" else "row 1")


def test_splits_and_columns_can_be_named_and_default_in_order(tiny_folder, monkeypatch):
    table = images_in_memory("feature", tiny_folder)
    splits = datasets.DatasetDict({"test": table})
    assert len(load_captioned_images(splits, split="test")) == 2
    assert "split named 'train', found test" in refusal(splits)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: {("org/birds", "test"): table}[name, split])
    assert len(load_captioned_images("org/birds", split="test")) == 2

    table = table.rename_column("image", "picture").add_column("caption", ["c", "d"])
    data = load_captioned_images(table)  # the only Image feature; text before caption
    assert data.captions == ["a", "b"]
    assert set(data.attributes) == {"caption", "label"}
    assert data.image(0).mode == "RGB"
    assert load_captioned_images(table, caption_column="caption").captions == ["c", "d"]


def test_without_captions_a_folder_of_images_will_do(tmp_path):
    write_images(tmp_path, "b.png", "a.PNG", "more/c.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    data = load_captioned_images(tmp_path, captions=False)
    assert (data.names, data.captions) == (["a.PNG", "b.png", "more/c.jpg"], ["", "", ""])
    assert data.image(2).size == (4, 4)
    assert len(load_captioned_images(tmp_path, captions=False, limit=2)) == 2
    assert load_captioned_images(tmp_path, captions=False, split="more").names == ["c.jpg"]
    assert "Expected no split of" in refusal(tmp_path, captions=False, split="tset")
    write_images(tmp_path / "split", "train/a.png", "test/b.png")
    assert load_captioned_images(tmp_path / "split", captions=False).names == ["a.png"]
    write_folder(tmp_path, [{"file_name": "b.png", "background": "land"}])
    data = load_captioned_images(tmp_path, captions=False)
    assert (data.names, data.captions, data.attributes) == (["b.png"], [""], {"background": ["land"]})
    assert "is of all its images, got 'test'" in refusal(tmp_path, captions=False, split="test")


@pytest.mark.parametrize("clutter", ["._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/x/._a.png", ".trash/more/a.png"])
def test_what_systems_leave_in_a_folder_is_no_data(tmp_path, clutter):
    home = tmp_path / ".cache" / "data"  # hidden itself, which its owner knows
    write_images(home, "a.png", clutter)
    (home / "Thumbs.db").write_bytes(b"\xd0\xcf")
    (home / ".DS_Store").write_bytes(b"\0")
    assert load_captioned_images(home, captions=False).names == ["a.png"]
    write_parquet(home / "train-00000-of-00001.parquet", image=["a.png"], text=["a caption"])
    (home / clutter).with_suffix(".parquet").write_bytes(b"\0\5\x16\7")
    assert load_captioned_images(home).captions == ["a caption"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_numbers_of_classes_are_captions(tmp_path, kind):
    if kind == "parquet":
        write_parquet(tmp_path / "x.parquet", image=["0.png", "1.png"], text=[3, 0])
    elif kind == "jsonl":
        write_folder(tmp_path, captioned(3, 0.0))
    else:
        (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,3\n1.png,0\n")
    assert load_captioned_images(tmp_path).captions == ["3", "0"]


def test_names_written_on_windows_are_read(tmp_path):
    write_images(tmp_path, "sub/a.png", "sub/b.png")
    write_folder(tmp_path, named("sub\\a.png", ".\\sub/b.png"))
    write_parquet(tmp_path / "a.parquet", image=["sub\\a.png"], text=["a bird"])
    for source, names in ((tmp_path, ["sub/a.png", "sub/b.png"]), (tmp_path / "a.parquet", ["sub/a.png"])):
        data = load_captioned_images(source)
        assert data.names == names
        assert data.image(len(names) - 1).size == (4, 4)


def test_select_keeps_everything_in_step_and_passes_between_processes(tiny_folder):
    data = load_captioned_images(tiny_folder)
    some = pickle.loads(pickle.dumps(data.select([11, 2]).select([1, 0])))
    assert (some.names, some.captions) == (["02.png", "11.png"], [data.captions[2], data.captions[11]])
    assert some.attributes == {"background": ["land", "land"]}
    assert np.array_equal(some.image(1), data.image(11))


def test_the_fingerprint_sees_captions_bytes_and_order_and_no_attributes(tmp_path):
    folder = write_tiny_folder(tmp_path, 4)
    data = load_captioned_images(folder)
    seen = {data.fingerprint, data.select([1, 0, 2, 3]).fingerprint, data.select([0, 1, 2]).fingerprint}
    metadata = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(metadata.replace("photo", "drawing", 1))
    seen.add(load_captioned_images(folder).fingerprint)
    (folder / "metadata.csv").write_text(metadata.replace("background", "age").replace(",water", ",3"))
    assert load_captioned_images(folder).fingerprint == data.fingerprint
    (folder / "02.png").write_bytes((folder / "02.png").read_bytes() + b"\0")
    seen.add(load_captioned_images(folder).fingerprint)
    (folder / "02.png").unlink()
    seen.add(load_captioned_images(folder).fingerprint)
    assert len(seen) == 6


def test_unreadable_images_are_left_out_up_to_the_share_allowed(tmp_path, capsys):
    folder = write_tiny_folder(tmp_path, 4)
    (folder / "01.png").write_bytes(b"")
    data = load_captioned_images(folder, max_unreadable=0.25)
    assert [row for row, _ in readable_images(data, "looking", progress=True)] == [0, 2, 3]
    told = "1 of 4 images could not be read and is left out: 01.png (the file is empty)."
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert told in shown
    list(readable_images(data, "looking", progress=False))
    assert capsys.readouterr().err.strip() == told
    (folder / "03.png").unlink()
    with pytest.raises(DataError, match=r"at most 25.0% of 4 .* 2 \(50.0%\).*01.png \(the file is empty\), 03.png"):
        list(readable_images(data, "looking", progress=False))
    with pytest.raises(DataError, match=r"1 \(100.0%\)"):
        list(readable_images(load_captioned_images(folder, max_unreadable=1).select([1]), "looking", progress=False))


def test_images_are_own_where_they_truly_lie_in_the_folder_of_the_data(tmp_path):
    # A link may be trained on, but whoever passes images on should not show what only a name brought in.
    folder = write_folder(tmp_path / "data", named("a.png", "b.png", "c.png"))
    write_images(folder, "a.png")
    write_images(tmp_path, "private.png")
    (folder / "b.png").symlink_to(tmp_path / "private.png")
    (folder / "c.png").symlink_to(folder / "a.png")
    data = load_captioned_images(folder)
    assert [data.is_own(row) for row in range(3)] == [True, False, True]
    assert [data.select([1, 2]).is_own(row) for row in range(2)] == [False, True]
    assert data.image(1).getpixel((0, 0)) == RED
    (tmp_path / "link").symlink_to(folder)
    assert load_captioned_images(tmp_path / "link").is_own(0)

    names = ["a.png", "../private.png", str(tmp_path / "private.png")]
    write_parquet(folder / "images.parquet", image=names, text=["a bird"] * 3)
    data = load_captioned_images(folder / "images.parquet")
    assert [data.is_own(row) for row in range(3)] == [True, False, False]
    paths = datasets.Dataset.from_dict({"image": names[2:], "text": ["a bird"]})
    assert not load_captioned_images(paths).is_own(0)  # in memory: no folder to lie in
    held = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}], "text": ["a bird"]})
    assert load_captioned_images(held.cast_column("image", datasets.Image())).is_own(0)


def test_opening_reads_no_image_and_a_row_without_one_is_unreadable(tmp_path):
    data = load_captioned_images(write_folder(tmp_path, named("gone.png")))
    with pytest.raises(UnreadableImage, match=r"gone\.png: the file does not exist") as error:
        data.image(0)
    assert (error.value.name, error.value.reason) == ("gone.png", "the file does not exist")
    table = datasets.Dataset.from_dict({"image": ["00.png", None], "text": ["a", "b"]})
    with pytest.raises(UnreadableImage, match="row 1: the row holds no image"):
        load_captioned_images(table.cast_column("image", datasets.Image())).image(1)


def refusal(source, **options):
    with pytest.raises(DataError) as error:
        load_captioned_images(source, **options)
    return str(error.value)


def test_what_is_not_there(tmp_path):
    assert "nothing there" in refusal(tmp_path / "absent")
    assert "nothing there" in refusal("./absent")
    assert "neither an existing local path nor a reachable hub dataset" in refusal("nobody/nothing")
    assert "file_name,text\n  0001.png,a photo of a waterbird" in refusal(tmp_path)
    assert f"Expected images in {tmp_path}, found none" in refusal(tmp_path, captions=False)
    assert "found no rows" in refusal(datasets.Dataset.from_dict({"image": [], "text": []}))


def test_arguments_and_files_out_of_range_or_at_odds(tiny_folder, tmp_path):
    assert "limit of at least 1, got 0" in refusal(tiny_folder, limit=0)
    assert "between 0 and 1, got 2" in refusal(tiny_folder, max_unreadable=2)
    assert "no caption_column with captions=False" in refusal(tiny_folder, captions=False, caption_column="text")
    assert "both .csv and .jsonl" in refusal(write_folder(write_tiny_folder(tmp_path, 1), named("a.png")))


def test_columns_that_are_not_there(tmp_path):
    folder = write_folder(tmp_path / "a", [{"file_name": "a.png", "title": "a bird", "age": 3}])
    assert "text or caption or prompt" in refusal(folder)
    assert "found title, age" in refusal(folder)
    assert "captions named words" in refusal(folder, caption_column="words")
    folder = write_folder(tmp_path / "b", [{"image": "a.png", "text": "a bird"}])
    assert f"a column file_name in line 1 of {folder / 'metadata.jsonl'}, found image, text" in refusal(folder)
    assert load_captioned_images(folder, image_column="image").names == ["a.png"]
    table = datasets.Dataset.from_dict({"text": ["a"], "photo": ["a.png"]})
    assert "images named image or img in the dataset, found text, photo" in refusal(table)


def test_captions_of_another_type_are_called_so(tmp_path):
    message = refusal(write_folder(tmp_path, captioned("a bird", ["a", "b"], {"en": "a bird"}, True, 3.5)))
    assert "found another type in column 'text' for 4 of 5: 1.png (list: ['a', 'b']), 2.png (dict: " in message
    assert "3.png (bool: True), 4.png (float: 3.5)" in message
    table = datasets.Dataset.from_dict({"image": ["0.png"], "text": [["a bird", "a duck"]]})
    assert "another type in column 'text' for 1 of 1: 0.png (List(" in refusal(table.add_column("age", [3]))


def test_rows_that_cannot_be_used(tmp_path):
    half = "8 of 16: 1.png, 3.png, 5.png, 7.png, 9.png and 3 more"
    outside = ("../a.png", "sub/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png")
    for rows, message in (
        *((named("a.png", value), "file name in line 2 of") for value in ("", None)),
        (named("a.png", "b.png", "./a.png", "c.png", "b.png"), "2 more than once: a.png, b.png"),
        *((named(name), "file names inside") for name in outside),
        *((captioned(*["a bird", value] * 8), half) for value in ("", "  ", None, float("nan"))),
        (captioned("whole \ud83d\ude00", "half \ud83d"), "lone surrogate), in column 'text' for 1 of 2: 1.png"),
    ):
        assert message in refusal(write_folder(tmp_path, rows))
