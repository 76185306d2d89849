"""Worlds of photographs and published sets, from stand-ins for their files: one plain colour an image."""

import argparse
import io
from itertools import product

import numpy as np
import pandas as pd
import pytest
import sets
import worlds
from PIL import Image

from invdiff.data.captioned import load_captioned_images
from invdiff.errors import ConfigError, DataError


def png(mode, size, colour):
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Green forests, blue seas, red land birds and white water birds; the held-out fifth is of half the brightness."""
    folder = tmp_path_factory.mktemp("public")

    def write(name, column, colours, mode, size):
        rows = []
        for kind, colour in colours.items():
            for row in range(20):
                shade = (*(value // (1 + (row % 5 == 4)) for value in colour), 255)
                rows.append({"image": png(mode, size, shade[: len(mode)]), column: kind})
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")

    write("scenes", "scene", {"forest": (0, 200, 0), "sea": (0, 0, 200)}, "RGB", (96, 96))
    write("waterbirds_cutouts", "subject", {"landbird": (200, 0, 0), "waterbird": (200, 200, 200)}, "RGBA", (112, 60))
    ages, same = ("3-9", "20-29", "30-39", "60-69"), {"image": png("RGB", (64, 64), (9, 9, 9)), "split": "train"}
    people = product(ages, worlds.GENDERS, worlds.RACES, range(10))
    people = [same | {"age": age, "gender": gender, "race": race} for age, gender, race, _ in people]
    pd.DataFrame(people).to_parquet(folder / "fairface_64px.parquet")
    return folder


def table(folder):
    return pd.read_csv(folder / "metadata.csv")


def counts(table, *columns):
    return table.groupby(list(columns)).size().to_dict()


def counted(first, second, *numbers):
    """What `counts` gives for two columns of these values."""
    return dict(zip(product(first, second), numbers, strict=True))


def test_a_waterbird_world_is_what_its_columns_say(source, tmp_path):
    folder = worlds.waterbirds(source, tmp_path / "world", num_images=400, severity=0.9, tint=0.8)
    rows, data = table(folder), load_captioned_images(folder)
    assert list(rows.columns) == ["file_name", "text", "subject", "place", "tint"]
    assert data.captions == [f"a photo of a {subject}" for subject in rows.subject]
    for column, of_subject, agreement in (("place", worlds.PLACES, 0.9), ("tint", worlds.TINTS, 0.8)):
        agrees = rows[column] == rows.subject.map(of_subject)
        assert abs(agrees.mean() - agreement) < 4 * (agreement * (1 - agreement) / 400) ** 0.5
    both = (rows.place == rows.subject.map(worlds.PLACES)) & (rows.tint == rows.subject.map(worlds.TINTS))
    assert abs(both.mean() - 0.72) < 0.09  # independent of each other
    for index in range(20):
        pixels = np.asarray(data.image(index)).astype(int)
        assert pixels.shape == (64, 64, 3)
        _, green, blue = pixels[0, 0]  # the scene: birds lie lower
        assert (green > blue) == (rows.place[index] == "forest")
        if rows.place[index] == "sea":
            assert (blue > 200) == (rows.tint[index] == "cold")
        birds = (pixels[..., 0] > 100).sum(axis=1)
        assert birds[:20].sum() == 0 < birds[32:].sum()
    plain = worlds.waterbirds(source, tmp_path / "plain", num_images=40, severity=0.9)
    pd.testing.assert_frame_equal(table(plain), rows.drop(columns="tint").head(40))  # a larger set begins alike


def test_faces_hide_what_is_asked_in_the_shares_that_are_asked(source, tmp_path):
    rows = table(worlds.fairface(source, tmp_path / "age", num_images=40))
    assert counts(rows, "gender", "age") == counted(("man", "woman"), ("old", "young"), 18, 2, 2, 18)
    assert (rows.text == "a photo of a " + rows.gender).all()
    rows = table(worlds.fairface(source, tmp_path / "race", hidden="race", num_images=28))
    shares = pd.crosstab(rows.gender, rows.race)[list(worlds.RACES)]
    assert shares.to_numpy().tolist() == [[6, 4, 2, 2], [2, 2, 4, 6]]
    with pytest.raises(DataError, match="found 40"):
        worlds.fairface(source, tmp_path / "more", num_images=100)
    with pytest.raises(ConfigError, match="got age and race"):
        worlds.fairface(source, tmp_path / "none", captions="age", hidden="race")


def test_a_base_learns_from_all_that_is_not_held_out_under_several_wordings(source, tmp_path):
    rows = table(worlds.everything(source, tmp_path / "all", num_birds=200))
    assert len(rows) == 3 * 2 * 4 * 10 + 2 * 16 + 200  # faces of three ages of 20 and more, scenes and birds
    wordings = {"a photo of the sea", "a photo of a forest", "a photo of an old woman", "a photo of an Indian man"}
    assert wordings <= {*rows.text}
    assert rows.text[rows.text.str.contains("a landbird in a forest|a waterbird in a forest")].nunique() == 2


DARK, BRIGHT = (40, 0, 0), (240, 0, 0)


def picture(path, held_out, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, BRIGHT if held_out else DARK).save(path)


def stored(held_out):
    return png("RGB", (8, 8), BRIGHT if held_out else DARK)


def prepare(name, source, out, *options):
    """Run the command; return the tables of both parts, whose pictures are of the right split and size."""
    parser = argparse.ArgumentParser()
    sets.add_prepare(parser.add_subparsers())
    sets.prepare(parser.parse_args(["prepare", name, str(source), str(out), "--size", "6", *options]))
    tables = []
    for part, bright in (("train", False), ("held-out", True)):
        data = load_captioned_images(out / part)
        pixels = [np.asarray(data.image(row)) for row in range(len(data))]
        assert pixels[0].shape == (6, 6, 3)
        assert name == "waterbirds" or all((of[0, 0, 0] > 99) == bright for of in pixels)
        tables.append(pd.read_csv(out / part / "metadata.csv"))
    return tables


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """FairFace's files: two training images and one other of each gender, race and age."""
    folder = tmp_path_factory.mktemp("fairface")
    for part, times in (("train", 2), ("val", 1)):
        ages, races = ("03-Sep", "20-29", "60-69"), (*worlds.RACES, "Latino_Hispanic")
        rows = list(product(("Male", "Female"), races, ages)) * times
        lines = ["file,age,gender,race,service_test"]
        for number, (gender, race, age) in enumerate(rows):
            picture(folder / "fairface-img-margin025-trainval" / part / f"{number}.jpg", part == "val")
            lines.append(f"{part}/{number}.jpg,{age},{gender},{race},True")
        (folder / f"fairface_label_{part}.csv").write_text("\n".join(lines))
    return folder


def test_fairface_has_the_papers_ratio_of_races_and_an_even_held_out_part(faces, tmp_path):
    train, held_out = prepare("fairface", faces, tmp_path / "race", "--images", "14")
    assert list(train.columns) == ["file_name", "text", "gender", "race", "age", "years", "subject"]
    shares = pd.crosstab(train.text, train.race)[list(worlds.RACES)]
    assert shares.to_numpy().tolist() == [[3, 2, 1, 1], [1, 1, 2, 3]]
    assert list(shares.index) == ["a photo of a man", "a photo of a woman"]
    assert set(counts(held_out, "text", "race").values()) == {2}
    assert set(train.age) <= {"young", "old"}  # nobody under 20


def test_fairface_by_other_captions_attributes_and_ratios(faces, tmp_path):
    by_age = ["--captions", "age", "--hidden", "gender", "--severity", ".75"]
    train, _ = prepare("fairface", faces, tmp_path / "by-age", *by_age)
    texts = ("a photo of a young person", "a photo of an old person")
    assert counts(train, "text", "gender") == counted(texts, ("woman", "man"), 10, 3, 3, 10)
    one = ["--captions", "one", "--hidden", "gender x race", "--groups", "woman x White", "man x Black"]
    more = ["--ratio", "2:1", "--all-ages", "--images", "9"]
    train, held_out = prepare("fairface", faces, tmp_path / "one", *one, *more)
    assert set(train.text) == {"a photo of a person"}
    assert counts(train, "gender", "race") == {("woman", "White"): 6, ("man", "Black"): 3}
    assert "child" in set(train.age) | set(held_out.age)
    train, _ = prepare("fairface", faces, tmp_path / "all", "--groups", "all", "--hidden", "race")
    assert set(train.race) == {*worlds.RACES, "Latino_Hispanic"}


def test_ages_that_a_spreadsheet_turned_into_dates_are_repaired():
    dates = {"3-9": ("3-9", "03-Sep", "9-Mar", "Mar-09", "2019-03-09", "09.03.2019"), "20-29": ("20-29",)}
    dates["10-19"] = ("Oct-19", "19-Oct", "2019-10-01", "10/1/2019")
    for age, spellings in dates.items():
        assert {sets.repaired_age(text) for text in spellings} == {age}
    with pytest.raises(DataError, match="got '04-Sep'"):
        sets.repaired_age("04-Sep")


def test_what_is_missing_unknown_or_too_much_is_said_and_nothing_is_written(faces, tmp_path):
    for error, message, *options in (
        (DataError, r"30 images of a photo of a man, White, found 4\..* at most 18 in all", "--images", "140"),
        (ConfigError, "--hidden of age, gender, race, years, got beard", "--hidden", "beard"),
        (ConfigError, "--captions of .*, got tall", "--captions", "a [tall] person=tall"),
        (ConfigError, r"4 groups \(White, Black, East Asian, Indian\) for each of 2 cap", "--severity", ".9"),
    ):
        with pytest.raises(error, match=message):
            prepare("fairface", faces, tmp_path / "out", *options)
    with pytest.raises(DataError, match=r"list_attr_celeba.txt .*Nothing is downloaded: get it from https://mmlab"):
        prepare("celeba", faces, tmp_path / "out")
    assert not (tmp_path / "out").exists()


NAMES = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Smiling")
PEOPLE = [
    dict(zip(NAMES, values, strict=True))
    for hair in ((1, -1, -1), (-1, 1, -1), (-1, -1, 1), (-1, 1, 1), (-1, -1, -1))
    for values in product(*((value,) for value in hair), (1, -1), (1, -1))
] * 2  # the last two kinds of hair are both and neither


@pytest.mark.parametrize("layout", ["txt", "csv", "parquet"])
def test_celeba_is_read_from_lists_and_from_parquet(layout, tmp_path):
    source = tmp_path / "celeba"
    if layout == "parquet":
        for part in ("train", "valid", "test"):
            people = (pd.DataFrame(PEOPLE) > 0).assign(image=[stored(part != "train")] * len(PEOPLE), celeb_id=7)
            (source / "data").mkdir(parents=True, exist_ok=True)
            people.to_parquet(source / "data" / f"{part}-00000-of-00001.parquet")
    else:
        parts = np.repeat(range(3), len(PEOPLE))
        files = pd.Index([f"{number:06}.jpg" for number in range(len(parts))], name="image_id")
        for file, part in zip(files, parts, strict=True):
            picture(source / "img_align_celeba" / file, part != 0, size=(8, 10))
        attributes, partition = pd.DataFrame(PEOPLE * 3, files), pd.DataFrame({"partition": parts}, files)
        if layout == "csv":
            lists = {"list_attr_celeba": attributes.to_csv(), "list_eval_partition": partition.to_csv()}
        else:
            text = attributes.to_csv(sep=" ", index_label=False).replace(" ", "  ")
            lists = {"Anno/list_attr_celeba": f"{len(files)}\n{text}"}
            lists["Eval/list_eval_partition"] = partition.to_csv(sep=" ", header=False)
        for name, text in lists.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / f"{name}.{layout}").write_text(text)
    train, held_out = prepare("celeba", source, tmp_path / "natural")
    blond, dark = (f"a photo of a person with {hair} hair" for hair in ("blond", "dark"))
    assert counts(train, "text", "gender") == counted((blond, dark), ("female", "male"), 4, 4, 8, 8)
    assert counts(held_out, "subject", "gender") == dict.fromkeys(product(("blond", "dark"), ("female", "male")), 8)
    texts = ["a [smiling] person=Smiling", "a [serious] person=not Smiling"]
    hidden = ["--hidden", "Blond_Hair", "--severity", ".75", "--images", "16"]
    train, _ = prepare("celeba", source, tmp_path / "smiling", "--captions", *texts, *hidden)
    classes = ("smiling", "serious"), ("Blond_Hair", "not Blond_Hair")
    assert counts(train, "subject", "Blond_Hair") == counted(*classes, 6, 2, 2, 6)


def test_waterbirds_as_released_and_with_another_severity(tmp_path):
    source = tmp_path / "waterbird_complete95_forest2water2"
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    trained = [*((y, y, 0) for y in (0, 0, 0, 1, 1, 1)), (0, 1, 0), (1, 0, 0)]
    for y, place, split in [*product((0, 1), (0, 1), (1, 2)), *trained]:
        picture(source / f"{len(lines)}.jpg", split != 0, size=(12, 8))
        lines.append(f"{len(lines)},{len(lines)}.jpg,{y},{split},{place},x.jpg")
    (source / "metadata.csv").write_text("\n".join(lines))
    train, held_out = prepare("waterbirds", tmp_path, tmp_path / "released")
    birds, places = ("landbird", "waterbird"), ("land", "water")
    assert counts(train, "subject", "place") == counted(birds, places, 3, 1, 1, 3)
    assert set(train.text) == {"a photo of a landbird", "a photo of a waterbird"}
    assert set(counts(held_out, "subject", "place").values()) == {2}
    train, _ = prepare("waterbirds", source, tmp_path / "more", "--severity", ".6667", "--images", "6")
    assert sorted(counts(train, "subject", "place").values()) == [1, 1, 2, 2]
    (source / "metadata.csv").write_text("\n".join(lines).replace("place", "where"))
    with pytest.raises(DataError, match="column place"):
        prepare("waterbirds", source, tmp_path / "out")


def test_waterbirds_are_composed_and_a_stopped_run_goes_on_to_the_same(tmp_path):
    files = {"waterbirds_cutouts": ("subject", worlds.PLACES), "scenes": ("scene", worlds.PLACES.values())}
    for name, (column, kinds) in files.items():
        rows = [{"image": stored(row % 5 == 4), column: kind} for kind in kinds for row in range(10)]
        pd.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
    options = ["--severity", ".9", "--images", "40", "--held-out", "12"]
    train, held_out = prepare("waterbirds", tmp_path, tmp_path / "out", *options)
    birds, places = ("landbird", "waterbird"), ("forest", "sea")
    assert counts(train, "subject", "place") == counted(birds, places, 18, 2, 2, 18)
    assert set(counts(held_out, "subject", "place").values()) == {3}
    for part, colour in (("train", DARK), ("held-out", BRIGHT)):
        assert np.allclose(np.asarray(load_captioned_images(tmp_path / "out" / part).image(0))[0, 0], colour, atol=2)
    before = load_captioned_images(tmp_path / "out" / "train").fingerprint
    (tmp_path / "out" / "train" / "metadata.csv").unlink()
    (tmp_path / "out" / "train" / "images" / "00004.png").unlink()
    prepare("waterbirds", tmp_path, tmp_path / "out", *options)
    assert load_captioned_images(tmp_path / "out" / "train").fingerprint == before
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        prepare("waterbirds", tmp_path, tmp_path / "out", *options, "--seed", "1")
