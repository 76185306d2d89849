import csv
import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from conftest import write_tiny_folder
from invdiff.data.captioned import CaptionedImages, load_captioned_images
from invdiff.data.images import UnreadableImage, decode_image
from invdiff.errors import DataError

RED = (255, 0, 0)


@pytest.fixture(autouse=True)
def parquet_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write_folder(folder: Path, rows: list[dict[str, object]], kind: str = "csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    else:
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    return image.getpixel(at)


# sources


def test_reads_a_folder_with_csv(tiny_folder: Path) -> None:
    data = load_captioned_images(tiny_folder)
    assert len(data) == 12
    assert data.names[:2] == ["00.png", "01.png"]
    assert data.captions[:2] == ["a photo of a landbird", "a photo of a waterbird"]
    assert data.attributes == {"background": ["land", "water"] * 5 + ["land", "land"]}
    expected = Image.open(tiny_folder / "03.png").convert("RGB")
    assert np.array_equal(np.asarray(data.image(3)), np.asarray(expected))


def test_reads_jsonl_with_typed_attributes_and_sub_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (4, 4), RED).save(tmp_path / "sub" / "a.png")
    rows = [
        {"file_name": "sub/a.png", "text": "é, a bird", "male": True},
        {"file_name": "b.png", "text": "two", "age": 3},
    ]
    data = load_captioned_images(write_folder(tmp_path, rows, "jsonl"))
    assert data.captions == ["é, a bird", "two"]
    assert data.attributes == {"male": [True, None], "age": [None, 3]}
    assert data.image(0).getpixel((0, 0)) == RED


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a bird\n", encoding="utf-8-sig")
    assert load_captioned_images(tmp_path).names == ["a.png"]


def test_the_sub_folder_of_the_split_is_found(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "train", 3)
    assert len(load_captioned_images(tmp_path)) == 3


def test_limit_takes_the_first_rows(tiny_folder: Path) -> None:
    assert load_captioned_images(tiny_folder, limit=2).names == ["00.png", "01.png"]
    assert len(load_captioned_images(tiny_folder, limit=99)) == 12


@pytest.mark.parametrize("as_folder", [False, True])
def test_reads_parquet_and_names_images_by_row(tiny_folder: Path, tmp_path: Path, as_folder: bool) -> None:
    in_folder = load_captioned_images(tiny_folder)
    rows = [{"bytes": (tiny_folder / name).read_bytes(), "path": name} for name in in_folder.names]
    table = datasets.Dataset.from_dict(
        {"image": rows, "caption": in_folder.captions, "background": in_folder.attributes["background"]}
    )
    table.to_parquet(tmp_path / "images.parquet")
    data = load_captioned_images(tmp_path if as_folder else tmp_path / "images.parquet", limit=11)
    assert data.names == [f"row {row}" for row in range(11)]
    assert data.attributes == {"background": in_folder.attributes["background"][:11]}
    assert data.fingerprint == in_folder.select(range(11)).fingerprint
    assert np.array_equal(np.asarray(data.image(3)), np.asarray(in_folder.image(3)))


def images_in_memory(kind: str, folder: Path) -> datasets.Dataset:
    paths = [str(folder / f"{row:02d}.png") for row in range(2)]
    columns = {
        "pil": lambda: [Image.open(path).copy() for path in paths],
        "dicts": lambda: [{"bytes": Path(path).read_bytes(), "path": None} for path in paths],
        "dict paths": lambda: [{"bytes": None, "path": path} for path in paths],
        "paths": lambda: paths,
        "feature": lambda: paths,
    }
    table = datasets.Dataset.from_dict({"image": columns[kind](), "text": ["a", "b"], "label": [1, -1]})
    if kind == "feature":
        names = datasets.ClassLabel(names=["cat", "dog"])
        table = table.cast_column("image", datasets.Image()).cast_column("label", names)
    return table


@pytest.mark.parametrize("kind", ["pil", "dicts", "dict paths", "paths", "feature"])
def test_reads_datasets_in_memory(kind: str, tiny_folder: Path) -> None:
    data = load_captioned_images(images_in_memory(kind, tiny_folder))
    expected = Image.open(tiny_folder / "01.png").convert("RGB")
    assert np.array_equal(np.asarray(data.image(1)), np.asarray(expected))
    assert data.captions == ["a", "b"]
    assert data.attributes["label"] == (["dog", None] if kind == "feature" else [1, -1])
    assert data.names[1] == (str(tiny_folder / "01.png") if kind == "paths" else "row 1")


def test_the_split_of_a_dataset_dict_is_taken(tiny_folder: Path) -> None:
    splits = datasets.DatasetDict({"test": images_in_memory("paths", tiny_folder)})
    assert len(load_captioned_images(splits, split="test")) == 2
    with pytest.raises(DataError, match="split named 'train', found test"):
        load_captioned_images(splits)


def test_columns_can_be_named_and_default_in_order(tiny_folder: Path) -> None:
    table = images_in_memory("feature", tiny_folder).rename_column("image", "picture")
    table = table.add_column("caption", ["c", "d"])
    data = load_captioned_images(table)  # the only Image feature; text before caption
    assert data.captions == ["a", "b"]
    assert set(data.attributes) == {"caption", "label"}
    assert data.image(0).mode == "RGB"
    assert load_captioned_images(table, caption_column="caption").captions == ["c", "d"]


def test_a_hub_dataset_is_opened_by_its_split(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        assert (name, split) == ("org/birds", "test")
        return images_in_memory("feature", tiny_folder)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_captioned_images("org/birds", split="test")) == 2


# the lazy view


def test_opening_reads_no_image(tmp_path: Path) -> None:
    data = load_captioned_images(write_folder(tmp_path, [{"file_name": "gone.png", "text": "a bird"}]))
    with pytest.raises(UnreadableImage, match=r"gone\.png: the file does not exist") as error:
        data.image(0)
    assert (error.value.name, error.value.reason) == ("gone.png", "the file does not exist")


def test_select_keeps_everything_in_step(tiny_folder: Path) -> None:
    data = load_captioned_images(tiny_folder)
    some = data.select([11, 2]).select([1, 0])
    assert some.names == ["02.png", "11.png"]
    assert some.captions == [data.captions[2], data.captions[11]]
    assert some.attributes == {"background": ["land", "land"]}
    assert np.array_equal(np.asarray(some.image(1)), np.asarray(data.image(11)))


def fingerprint_of(folder: Path) -> str:
    return load_captioned_images(folder).fingerprint


def test_the_fingerprint_ignores_attributes_and_column_order(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path, 4)
    before = fingerprint_of(folder)
    rows = [
        {"age": row, "text": caption, "file_name": f"{row:02d}.png"}
        for row, caption in enumerate(load_captioned_images(folder).captions)
    ]
    assert fingerprint_of(write_folder(folder, rows)) == before


def test_the_fingerprint_sees_captions_bytes_and_order(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path, 4)
    data = load_captioned_images(folder)
    seen = {data.fingerprint, data.select([1, 0, 2, 3]).fingerprint, data.select([0, 1, 2]).fingerprint}
    metadata = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(metadata.replace("photo", "drawing", 1))
    seen.add(fingerprint_of(folder))
    (folder / "metadata.csv").write_text(metadata)
    (folder / "02.png").write_bytes((folder / "02.png").read_bytes() + b"\0")
    seen.add(fingerprint_of(folder))
    (folder / "02.png").unlink()
    seen.add(fingerprint_of(folder))
    assert len(seen) == 6


# decoding


def test_grey_becomes_rgb() -> None:
    assert pixel(encoded(Image.new("L", (2, 2), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (2, 2), 1))) == (255, 255, 255)


def test_transparency_is_laid_on_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 127)))) == (128, 128, 128)
    assert pixel(encoded(Image.new("LA", (2, 2), (0, 0)))) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (2, 2), RED), transparency=RED)) == (255, 255, 255)


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(encoded(image)) == RED
    assert pixel(encoded(image, transparency=1)) == (255, 255, 255)
    assert pixel(encoded(image, transparency=bytes([255, 127]))) == (255, 128, 128)


def test_cmyk_becomes_rgb() -> None:
    red = pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.subtract(red, RED)).max() < 5


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(grey), kind)
    assert [pixel(data, (x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(UnreadableImage, match="no known range"):
        pixel(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_a_rotated_photograph_comes_out_upright() -> None:
    image = Image.new("RGB", (16, 8))
    image.paste(RED, (0, 0, 8, 8))  # left half, which EXIF 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode_image(encoded(image, exif=exif), "x")
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2)) == RED
    assert upright.getpixel((4, 13)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_image_is_unreadable(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(UnreadableImage, match=r"cut\.img: .*truncated"):
        decode_image(data[: len(data) // 2], "cut.img")


def test_empty_and_foreign_files_are_unreadable() -> None:
    with pytest.raises(UnreadableImage, match="the file is empty"):
        decode_image(b"", "a.png")
    with pytest.raises(UnreadableImage, match="not an image in a known format"):
        decode_image(b"hello", "a.png")


def test_a_row_without_an_image_is_unreadable(tiny_folder: Path) -> None:
    table = datasets.Dataset.from_dict({"image": [str(tiny_folder / "00.png"), None], "text": ["a", "b"]})
    data = load_captioned_images(table.cast_column("image", datasets.Image()))
    with pytest.raises(UnreadableImage, match="row 1: the row holds no image"):
        data.image(1)


# messages


def refusal(source: object, **options: object) -> str:
    with pytest.raises(DataError) as error:
        load_captioned_images(source, **options)
    return str(error.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "nothing there" in refusal(tmp_path / "absent")
    assert "nothing there" in refusal("./absent")


def test_a_folder_without_metadata(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "metadata.csv or metadata.jsonl" in message
    assert "file_name,text\n  0001.png,a photo of a waterbird" in message


def test_both_metadata_files(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"file_name": "a.png", "text": "a bird"}]
    write_folder(tmp_path, rows, "jsonl")
    assert "both .csv and .jsonl" in refusal(write_folder(tmp_path, rows))


def test_no_caption_column(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [{"file_name": "a.png", "title": "a bird", "age": 3}])
    assert "text or caption or prompt" in refusal(folder)
    assert "found title, age" in refusal(folder)
    assert "captions named words" in refusal(folder, caption_column="words")


def test_no_image_column() -> None:
    table = datasets.Dataset.from_dict({"text": ["a"], "photo": ["a.png"]})
    assert "images named image or img in the dataset, found text, photo" in refusal(table)


def test_no_file_name_column(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [{"image": "a.png", "text": "a bird"}])
    message = refusal(folder)
    assert "column file_name" in message
    assert "found image, text" in message
    assert load_captioned_images(folder, image_column="image").names == ["a.png"]


@pytest.mark.parametrize("value", ["", None])
def test_a_row_without_file_name(tmp_path: Path, value: str | None) -> None:
    rows: list[dict[str, object]] = [{"file_name": "a.png", "text": "a"}, {"file_name": value, "text": "b"}]
    assert f"file name in line 2 of {tmp_path}" in refusal(write_folder(tmp_path, rows, "jsonl"))


def test_duplicate_file_names(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "./a.png", "c.png", "b.png"]
    folder = write_folder(tmp_path, [{"file_name": name, "text": "a bird"} for name in names])
    assert "2 named more than once: a.png, b.png" in refusal(folder)


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert "found no rows" in refusal(tmp_path)
    assert "found no rows" in refusal(datasets.Dataset.from_dict({"image": [], "text": []}))


@pytest.mark.parametrize("value", ["", "  ", None, 3])
def test_empty_captions(tmp_path: Path, value: object) -> None:
    captions = [value if row % 2 else "a bird" for row in range(16)]
    rows: list[dict[str, object]] = [{"file_name": f"{row}.png", "text": c} for row, c in enumerate(captions)]
    message = refusal(write_folder(tmp_path, rows, "jsonl"))
    assert "8 of 16: 1.png, 3.png, 5.png, 7.png, 9.png and 3 more" in message


@pytest.mark.parametrize("name", ["../a.png", "sub/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png"])
def test_a_name_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, [{"file_name": name, "text": "a bird"}])
    assert "file names inside" in refusal(folder)


def test_what_is_part_of_the_data_itself(tmp_path: Path) -> None:
    # A link may be trained on, but whoever passes images on should not show what only a name brought in.
    folder = write_folder(tmp_path / "data", [{"file_name": f"{k}.png", "text": "a bird"} for k in "abc"])
    for path in (folder / "a.png", tmp_path / "private.png"):
        Image.new("RGB", (4, 4), RED).save(path)
    (folder / "b.png").symlink_to(tmp_path / "private.png")
    (folder / "c.png").symlink_to(folder / "a.png")
    data = load_captioned_images(folder)
    assert [data.is_own(row) for row in range(3)] == [True, False, True]
    assert [data.select([1, 2]).is_own(row) for row in range(2)] == [False, True]
    assert data.image(1).getpixel((0, 0)) == RED
    (tmp_path / "link").symlink_to(folder)
    assert load_captioned_images(tmp_path / "link").is_own(0)


def test_paths_in_parquet_are_part_of_the_data_in_its_folder_only(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "data" / "a.png", tmp_path / "private.png"):
        Image.new("RGB", (4, 4), RED).save(path)
    names = ["a.png", "../private.png", str(tmp_path / "private.png")]
    paths = datasets.Dataset.from_dict({"image": names, "text": ["a bird"] * 3})
    paths.to_parquet(tmp_path / "data" / "images.parquet")
    data = load_captioned_images(tmp_path / "data" / "images.parquet")
    assert [data.is_own(row) for row in range(3)] == [True, False, False]
    assert not load_captioned_images(paths.select([2])).is_own(0)  # in memory: no folder to lie in
    held = datasets.Dataset.from_dict({"image": [encoded(Image.new("RGB", (4, 4)))], "text": ["a bird"]})
    assert load_captioned_images(held.cast_column("image", datasets.Image())).is_own(0)


def test_a_csv_row_with_a_bare_comma(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a dog, sitting\n")
    assert "2 cells in line 2" in refusal(tmp_path)


@pytest.mark.parametrize(("line", "found"), [("{oops", "Expected JSON in line 2"), ("[1]", "a JSON object in line 2")])
def test_a_broken_jsonl_line(tmp_path: Path, line: str, found: str) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    assert found in refusal(tmp_path)


def test_metadata_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\xfe\n")
    assert "Expected UTF-8 in line 2" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"not parquet at all", b""])
def test_parquet_that_is_not_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "images.parquet").write_bytes(content)
    assert f"Expected a parquet file at {tmp_path}" in refusal(tmp_path)


def test_parquet_without_the_split(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": ["a.png"], "text": ["a"]}).to_parquet(tmp_path / "x.parquet")
    assert "split 'test'" in refusal(tmp_path, split="test")


def test_an_unreachable_hub_dataset() -> None:
    message = refusal("nobody/nothing")
    assert "neither an existing local path nor a reachable hub dataset" in message


def test_limits_outside_their_range(tiny_folder: Path) -> None:
    assert "limit of at least 1, got 0" in refusal(tiny_folder, limit=0)
    assert "between 0 and 1, got 2" in refusal(tiny_folder, max_unreadable=2)


def test_images_pass_between_processes(tiny_folder: Path) -> None:
    data = pickle.loads(pickle.dumps(load_captioned_images(tiny_folder).select([3])))
    assert isinstance(data, CaptionedImages)
    assert data.image(0).size == (40, 36)


def test_without_captions_a_folder_of_images_will_do(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("b.png", "a.PNG", "more/c.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data = load_captioned_images(tmp_path, captions=False)
    assert data.names == ["a.PNG", "b.png", "more/c.jpg"]
    assert data.captions == ["", "", ""]
    assert data.image(2).size == (4, 4)
    assert len(load_captioned_images(tmp_path, captions=False, limit=2)) == 2


def test_without_captions_metadata_still_names_images_and_attributes(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    write_folder(tmp_path, [{"file_name": "a.png", "background": "land"}])
    data = load_captioned_images(tmp_path, captions=False)
    assert (data.names, data.captions, data.attributes) == (["a.png"], [""], {"background": ["land"]})


def test_without_captions_there_must_be_images_and_no_caption_column(tmp_path: Path) -> None:
    assert f"Expected images in {tmp_path}, found none" in refusal(tmp_path, captions=False)
    assert "no caption_column with captions=False" in refusal(tmp_path, captions=False, caption_column="text")


def test_half_a_character_in_a_caption_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    rows = [("a.png", "whole \ud83d\ude00"), ("b.png", "half \ud83d"), ("c.png", "plain")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"half of one \(a lone surrogate\) in those of 1 of 3: b\.png"):
        load_captioned_images(tmp_path)


@pytest.mark.parametrize("beside", ["images/a.png", "train/a.png", "train-0.png"])
def test_parquet_beside_its_image_files_is_read(tmp_path: Path, beside: str) -> None:
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / beside)
    datasets.Dataset.from_dict({"image": [beside], "text": ["a caption"]}).to_parquet(str(tmp_path / "data.parquet"))
    data = load_captioned_images(tmp_path)
    assert data.captions == ["a caption"]
    assert data.image(0).getpixel((0, 0)) == (255, 0, 0)
