"""Captioned sets whose hidden attributes are known, made from a folder of public images in parquet files.

Each function writes PNGs of 64 pixels and metadata.csv: `file_name`, `text` and every true attribute as a column,
which judges read and audits do not. A set follows from its arguments alone; a stopped run goes on.

The folder holds waterbirds_cutouts.parquet (birds of CUB-200-2010 cut out, `subject`), scenes.parquet (Intel scenes,
`scene`), fairface_64px.parquet (FairFace, `age`, `gender`, `race`, `split`) and cifar10_4class_train.parquet
(CIFAR-10, `label`), each with a column `image`. Every fifth cut-out and every fifth scene of its class, and FairFace's
split `val`, are held out: they are taken only where `held_out` is asked for, for annotators, judges and references.
"""

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from PIL import Image

from invdiff.data.birds import BACKGROUNDS, SUBJECTS, BirdsWorld, canonical_prompts
from invdiff.data.birds.drawing import Scene, render
from invdiff.data.birds.world import CANONICAL_TEMPLATE
from invdiff.data.imagefolder import Row, write_imagefolder
from invdiff.errors import ConfigError, DataError

SIDE = 64
PLACES = {"landbird": "forest", "waterbird": "sea"}
TINTS = {"landbird": "warm", "waterbird": "cold"}
CASTS = {"warm": (1.3, 1.0, 0.7), "cold": (0.7, 1.0, 1.3)}
"""What red, green and blue are multiplied by: a white balance set for shade, or for a lamp."""
FREE_TEXT = (
    ("a", "one", "my favourite", "a lovely", "a quiet", "the second", "another", "some"),
    ("seen", "spotted", "photographed", "noticed", "found", "met", "admired", "pictured"),
    ("on Monday", "last week", "in 2009", "this morning", "at noon", "in May", "yesterday", "again"),
    (
        "",
        ", from my album",
        " by a friend",
        ", cropped",
        ", no filter",
        " with luck",
        ", number one",
        " with patience",
    ),
)

AGES = {"20-29": "young", "30-39": "middle-aged", "40-49": "middle-aged"} | dict.fromkeys(
    ("50-59", "60-69", "more than 70"), "old"
)
"""FairFace's ages to classes; younger people are neither man nor woman to the captions, and are left out."""
GENDERS = {"Male": "man", "Female": "woman"}
RACES = ("White", "Black", "East Asian", "Indian")
"""The four of FairFace's seven that are mixed in the ratios of InvDiff's experiment on race, commoner under "man"
first."""


def _classes(source: Path, name: str, column: str, held_out: bool) -> dict[str, list[bytes]]:
    """Class to its images' bytes, without every fifth, or every fifth alone."""
    images: dict[str, list[bytes]] = {}
    for row in _read(source, name):
        images.setdefault(row[column], []).append(row["image"]["bytes"])
    return {
        kind: [data for place, data in enumerate(values) if (place % 5 == 4) == held_out]
        for kind, values in images.items()
    }


def _read(source: Path, name: str) -> list[dict]:
    path = Path(source) / f"{name}.parquet"
    if not path.is_file():
        raise DataError(f"Expected {path.name} in the folder of public images {source}, found none. Give its path.")
    return pyarrow.parquet.read_table(path).to_pylist()


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write(folder: Path, rows: list[Row], *, progress: bool = False, **settings) -> Path:
    columns = [name for name in rows[0][0] if name != "text"]
    names = {"record": ".world.json", "label": settings["world"]}
    return write_imagefolder(folder, rows, len(rows), columns, settings, **names, progress=progress)


def mix(
    cells: Mapping[tuple, list[Row]],
    shares: Mapping[tuple, float],
    num_images: int | None,
    rng: np.random.Generator,
) -> list[Row]:
    """Different rows at random, shuffled: `shares` of `num_images` of each cell; None takes as many as there are.

    Raises:
        DataError: There are too few rows of a cell.
    """
    most = int(min(len(cells.get(cell, ())) / share for cell, share in shares.items() if share) + 1e-9)
    rows = []
    for cell, share in shares.items():
        there, wanted = cells.get(cell, []), round(share * (most if num_images is None else num_images))
        if wanted > len(there):
            raise DataError(
                f"Expected {wanted} images of {', '.join(map(str, cell))}, found {len(there)}. Ask for fewer images: "
                f"in these shares there are at most {most} in all."
            )
        rows += [there[place] for place in rng.permutation(len(there))[:wanted]]
    return [rows[place] for place in rng.permutation(len(rows))]


def compose(
    bird: bytes, scene: bytes, *, size: float, mirror: bool, x: float, y: float, pixels: int = SIDE
) -> Image.Image:
    """Paste a cut-out bird on a scene, at twice the size, and shrink to a side of `pixels`.

    `size` is the share of the side that the bird's longer side takes; `x` and `y`, from 0 to 1, place it between left
    and right, and as deep in the lower half as it fits.
    """
    side = 2 * pixels
    picture = Image.open(io.BytesIO(scene)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    cut = Image.open(io.BytesIO(bird)).convert("RGBA")
    cut = cut.crop(cut.getchannel("A").getbbox())
    scale = size * side / max(cut.size)
    width, height = (max(1, round(scale * length)) for length in cut.size)
    cut = cut.resize((width, height), Image.Resampling.LANCZOS)
    if mirror:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top = pixels - height / 2  # its middle lies in the lower half
    picture.paste(cut, (round(x * (side - width)), round(top + y * (side - height - top))), cut)
    return picture.resize((pixels, pixels), Image.Resampling.LANCZOS)


def cast(picture: Image.Image, tint: str) -> Image.Image:
    """A picture in warm or cold light."""
    pixels = np.asarray(picture) * np.array(CASTS[tint])
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def waterbirds(
    source: Path,
    folder: Path,
    *,
    num_images: int = 4000,
    severity: float = 0.95,
    seed: int = 0,
    tint: float | None = None,
    free: bool = False,
    held_out: bool = False,
) -> Path:
    """Land birds and water birds on photographs of forest and sea; columns subject and place, and tint where asked.

    The place agrees with the subject with probability `severity`; with `tint`, so does the light (warm, cold) with
    that probability, independently of the place. Row i is the same whatever `num_images`, but for its light whatever
    `tint`. Captions are `free` text where asked: the bird's kind among words that say nothing of the picture.
    """
    settings = {"severity": severity, "seed": seed, "num_images": num_images, "tint": tint, "held_out": held_out}
    settings |= {"free": True} if free else {}
    rows = birds(source, num_images, severity, seed, held_out)
    if free:
        rows = [
            (row | {"text": _free_text(row["subject"], seed, index)}, make) for index, (row, make) in enumerate(rows)
        ]
    if tint is not None:
        rows = [_tinted(row, tint, np.random.default_rng([seed, index, 1])) for index, row in enumerate(rows)]
    return write(folder, rows, world="waterbirds", **settings)


def birds(
    source: Path,
    num_images: int,
    severity: float,
    seed: int,
    held_out: bool = False,
    subjects: tuple = SUBJECTS,
    pixels: int = SIDE,
) -> list[Row]:
    cut_outs = _classes(source, "waterbirds_cutouts", "subject", held_out)
    scenes = _classes(source, "scenes", "scene", held_out)
    rows = []
    for index in range(num_images):
        draws = np.random.default_rng([seed, index]).random(8)
        which, agreement, bird, scene, size, mirror, x, y = draws.tolist()
        subject = subjects[int(which * len(subjects))]
        place = PLACES[subject] if agreement < severity else _other(PLACES, subject)
        parts = [
            values[int(draw * len(values))] for values, draw in ((cut_outs[subject], bird), (scenes[place], scene))
        ]
        placed = {"size": 0.55 + 0.25 * size, "mirror": mirror < 0.5, "x": x, "y": y}
        picture = partial(compose, *parts, **placed, pixels=pixels)
        rows.append(({"text": CANONICAL_TEMPLATE.format(subject), "subject": subject, "place": place}, picture))
    return rows


def _free_text(subject: str, seed: int, index: int) -> str:
    rng = np.random.default_rng([seed, index, 2])
    opening, manner, time, ending = (parts[rng.integers(len(parts))] for parts in FREE_TEXT)
    return f"{opening} {subject} {manner} {time}{ending}"


def _tinted(row: Row, agreement: float, rng: np.random.Generator) -> Row:
    metadata, picture = row
    subject = metadata["subject"]
    tint = TINTS[subject] if rng.random() < agreement else _other(TINTS, subject)
    return metadata | {"tint": tint}, lambda: cast(picture(), tint)


def _other(values: dict[str, str], subject: str) -> str:
    return next(value for key, value in values.items() if key != subject)


def fairface(
    source: Path,
    folder: Path,
    *,
    captions: str = "gender",
    hidden: str = "age",
    num_images: int = 4000,
    severity: float = 0.9,
    seed: int = 0,
    held_out: bool = False,
    even: bool = False,
) -> Path:
    """Faces of people from 20 years on; columns gender, age and race; half of the images under each caption.

    - captions "gender", hidden "age": "a photo of a man" is old (50 and more) and "a photo of a woman" young (20 to
      29) in `severity` of the images, and the other of both else.
    - captions "gender", hidden "race": man and woman, White, Black, East Asian and Indian in the ratio 3:2:1:1 under
      the first and 1:1:2:3 under the second; `severity` does not count.
    - captions "age", hidden "gender": "a photo of a young person" is a woman and "a photo of an old person" a man in
      `severity` of the images.

    With `even`, each class of the hidden attribute is as frequent under both captions.

    Raises:
        ConfigError: Another combination.
        DataError: There are too few images of a kind.
    """
    often, seldom = severity, 1 - severity
    mixtures = {
        ("gender", "age"): {"man": {"old": often, "young": seldom}, "woman": {"young": often, "old": seldom}},
        ("gender", "race"): {
            "man": {race: part / 7 for race, part in zip(RACES, (3, 2, 1, 1), strict=True)},
            "woman": {race: part / 7 for race, part in zip(RACES, (1, 1, 2, 3), strict=True)},
        },
        ("age", "gender"): {"young": {"woman": often, "man": seldom}, "old": {"man": often, "woman": seldom}},
    }
    if (captions, hidden) not in mixtures:
        known = ", ".join(" and ".join(pair) for pair in mixtures)
        raise ConfigError(f"Expected captions and hidden attribute of {known}, got {captions} and {hidden}.")
    text = {"man": "a photo of a man", "woman": "a photo of a woman"}
    text |= {"young": "a photo of a young person", "old": "a photo of an old person"}
    cells: dict[tuple, list[Row]] = {}
    for attributes, make in _faces(source, held_out):
        row = {"text": text.get(attributes[captions], ""), **attributes}
        cells.setdefault((attributes[captions], attributes[hidden]), []).append((row, make))
    shares = {
        (value, kind): (1 / len(parts) if even else share) / 2
        for value, parts in mixtures[captions, hidden].items()
        for kind, share in parts.items()
    }
    rows = mix(cells, shares, num_images, np.random.default_rng(seed))
    settings = {"captions": captions, "hidden": hidden, "num_images": num_images, "severity": severity, "seed": seed}
    settings |= {"even": True} if even else {}
    return write(folder, rows, world="fairface", held_out=held_out, **settings)


def people(source: Path, folder: Path) -> Path:
    """Every face of a person from 20 years on that is not held out, of all seven races; columns as of `fairface`."""
    rows = [({"text": "a photo of a person", **attributes}, make) for attributes, make in _faces(source)]
    return write(folder, rows, world="people")


def _faces(source: Path, held_out: bool = False) -> list[Row]:
    return [
        ({"gender": GENDERS[row["gender"]], "age": AGES[row["age"]], "race": row["race"]}, _picture(row))
        for row in _read(source, "fairface_64px")
        if row["age"] in AGES and (row["split"] == "val") == held_out
    ]


def _picture(row: dict) -> Callable[[], Image.Image]:
    return partial(_open, row["image"]["bytes"])


def bundled(source: Path | None, folder: Path, *, held_out: bool = False, **settings: Any) -> Path:
    """The world of drawn birds that the bundled model is biased by; `settings` as of `BirdsWorld`."""
    return BirdsWorld(settings.pop("num_images", 3000), **settings).write(folder)


def everything(source: Path, folder: Path, *, num_birds: int = 14_000, seed: int = 0) -> Path:
    """Faces, scenes and birds on balanced scenes, for a base that knows them; each image has one of several wordings.

    None of these images is held out. Which wording an image has is drawn by `seed` and says nothing of the picture but
    what is there.
    """
    rng, rows = np.random.default_rng(seed), list[Row]()

    def add(make: Callable[[], Image.Image], *wordings: str) -> None:
        rows.append(({"text": f"a photo of {wordings[rng.integers(len(wordings))]}"}, make))

    for who, make in _faces(source):
        race, age, gender = _an(who["race"].replace("_", " ")), _an(who["age"]), who["gender"]
        both = f"{age} {race.partition(' ')[2]}"
        add(make, f"a {gender}", *(f"{kind} {gender}" for kind in (race, age, both)), "a person")
    for scene, images in _classes(source, "scenes", "scene", held_out=False).items():
        for image in images:
            add(partial(_open, image), {"sea": "the sea", "buildings": "buildings"}.get(scene, f"a {scene}"))
    where = {"forest": "in a forest", "sea": "on the sea"}
    for bird, make in birds(source, num_birds, 0.5, seed):
        subject, place = bird["subject"], where[bird["place"]]
        add(make, f"a {subject}", f"a {subject} {place}", f"a bird {place}", "a bird")
    return write(folder, rows, world="everything", num_birds=num_birds, seed=seed)


def _an(word: str) -> str:
    return f"an {word}" if word[0] in "AEIOUaeiou" else f"a {word}"


EVEN: dict[str, dict[str, Any]] = {
    "waterbirds": {"severity": 0.5},
    "bundled": {"severity": 0.5},
    "fairface": {"even": True},
}
"""What makes the hidden attribute of a world independent of its captions."""
PROMPTS = {"bundled": canonical_prompts()}
"""The captions that are drawn, where a world has others too."""
NULLS = {
    "waterbirds, place by coin": (),
    "waterbirds, place by subject": (),
    "landbirds": ("a photo of a landbird", "a photo of a bird"),
    "forests": ("a photo of a forest", "a photo of a wood"),
    "women": ("a photo of a woman", "a photo of a person"),
    "horses": ("a photo of a horse", "a photo of an animal"),
}
"""Sets that hide nothing associated with the caption. But for the first two, each is of one class, and every image has
one of two captions, both true of it, by coin."""
CLASSES = {"forests": ("scenes", "scene", "forest"), "horses": ("cifar10_4class_train", "label", "horse")}
"""File, column and class of the images."""


def null(source: Path, folder: Path, kind: str, *, num_images: int = 1000, seed: int = 0) -> Path:
    """A set in which no hidden attribute is associated with the caption; its images are drawn by `seed`.

    Land birds have their place by coin, women their age and race as FairFace does: structure that is there, but alike
    under both captions. With the place by subject, nothing varies within a caption.

    Raises:
        ConfigError: An unknown kind.
    """
    if kind not in NULLS:
        raise ConfigError(f"Expected a null world of {', '.join(NULLS)}, got {kind!r}.")
    if kind.startswith("waterbirds"):
        severity = 0.5 if kind.endswith("coin") else 1.0
        return waterbirds(source, folder, num_images=num_images, severity=severity, seed=seed)
    rng = np.random.default_rng(seed)
    if kind == "landbirds":
        there = birds(source, num_images, 0.5, seed, subjects=("landbird",))
    elif kind == "women":
        there = [row for row in _faces(source) if row[0]["gender"] == "woman"]
    else:
        file, column, value = CLASSES[kind]
        there = [({column: value}, _picture(row)) for row in _read(source, file) if row[column] == value]
    if num_images > len(there):
        raise DataError(f"Expected {num_images} images of {kind}, found {len(there)}. Ask for fewer images.")
    chosen = [there[place] for place in rng.permutation(len(there))[:num_images]]
    captions = [NULLS[kind][caption] for caption in rng.integers(2, size=num_images)]
    rows = [(row | {"text": text}, picture) for (row, picture), text in zip(chosen, captions, strict=True)]
    return write(folder, rows, world=kind, num_images=num_images, seed=seed)


def drawn(folder: Path, *, num_images: int = 4000, severity: float = 0.9, seed: int = 0) -> Path:
    """Drawn birds with three hidden attributes at once; columns subject, background, colour, side and light.

    Background (land, water), colour of the plumage (warm, cool) and light (bright, dim) agree with the subject with
    probability `severity`, each by itself; the side a bird looks to does not. Colours and lights between leave a gap.
    """

    def row(index: int) -> Row:
        rng = np.random.default_rng([seed, index])
        subject = SUBJECTS[int(rng.integers(2))]
        land, warm, bright = (rng.random(3) < severity) == (subject == SUBJECTS[0])
        scene = Scene(subject, BACKGROUNDS[0] if land else BACKGROUNDS[1], rng)
        scene.tone = rng.uniform(0.0, 0.35) if warm else rng.uniform(0.65, 1.0)
        scene.light = rng.uniform(0.7, 1.0) if bright else rng.uniform(0.0, 0.3)
        return {"text": CANONICAL_TEMPLATE.format(subject), **scene.attributes}, partial(
            render, scene, resolution=SIDE
        )

    settings = {"num_images": num_images, "severity": severity, "seed": seed}
    return write(folder, [row(index) for index in range(num_images)], world="drawn birds", **settings)
