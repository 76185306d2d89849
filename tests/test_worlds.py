"""Worlds of photographs, from stand-ins for the public parquet files: one plain colour for each image."""

import io
from itertools import product

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import worlds
from PIL import Image

from invdiff.data.captioned import load_captioned_images
from invdiff.errors import ConfigError, DataError


def picture(mode, size, colour):
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Green forests, blue seas, red land birds and white water birds; the held-out fifth is of half the brightness."""
    folder = tmp_path_factory.mktemp("public")

    def write(name, rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")

    def many(column, colours, mode, size):
        rows = []
        for kind, colour in colours.items():
            for row in range(20):
                shade = (*(value // (1 + (row % 5 == 4)) for value in colour), 255)
                rows.append({"image": picture(mode, size, shade[: len(mode)]), column: kind})
        return rows

    write("scenes", many("scene", {"forest": (0, 200, 0), "sea": (0, 0, 200)}, "RGB", (96, 96)))
    birds = {"landbird": (200, 0, 0), "waterbird": (200, 200, 200)}
    write("waterbirds_cutouts", many("subject", birds, "RGBA", (112, 60)))
    ages, same = ("3-9", "20-29", "30-39", "60-69"), {"image": picture("RGB", (64, 64), (9, 9, 9)), "split": "train"}
    people = product(ages, worlds.GENDERS, worlds.RACES, range(10))
    write("fairface_64px", [same | {"age": age, "gender": gender, "race": race} for age, gender, race, _ in people])
    return folder


def table(folder):
    return pd.read_csv(folder / "metadata.csv")


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
    assert rows.groupby(["gender", "age"]).size().to_dict() == {
        ("man", "old"): 18, ("man", "young"): 2, ("woman", "old"): 2, ("woman", "young"): 18
    }  # fmt: skip
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
    faces = 3 * 2 * 4 * 10  # three ages of 20 and more
    assert len(rows) == faces + 2 * 16 + 200
    assert {"a photo of the sea", "a photo of a forest", "a photo of an old woman", "a photo of an Indian man"} <= {
        *rows["text"]
    }
    places = rows["text"][rows["text"].str.contains("a landbird in a forest|a waterbird in a forest")]
    assert places.nunique() == 2
