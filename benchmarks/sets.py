"""Waterbirds, CelebA and FairFace in their published layouts, written as captioned folders.

OUT/train is biased as asked; OUT/held-out has as many images of each group under each caption, from the published
validation and test images alone. Both have every attribute as a column, and `subject`, what the caption names. Nothing
is downloaded: SOURCE is the folder of the set that you fetched under its terms.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import worlds
from PIL import Image, ImageOps

from invdiff.data.imagefolder import Row
from invdiff.errors import ConfigError, DataError, found_else
from invdiff.options import read_yaml

AGES = {"0-2": "child", "3-9": "child", "10-19": "teenager"} | worlds.AGES
Found = Iterator[tuple[bool, dict[str, Any], Callable[[], Image.Image]]]
"""Whether an image is held out, its attributes, and how it is opened."""


SETS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _composed(arguments: argparse.Namespace) -> bool:
    return arguments.name == "waterbirds" and (arguments.source / "waterbirds_cutouts.parquet").is_file()


def _waterbirds(arguments: argparse.Namespace) -> Found:
    if not _composed(arguments):
        table = _find(arguments, "metadata.csv")
        for row in _csv(table, {"img_filename", "y", "split", "place"}):
            place, subject = ("land", "water")[int(row["place"])], ("landbird", "waterbird")[int(row["y"])]
            make = partial(_open, table.parent / row["img_filename"], arguments.size)
            yield row["split"] != "0", {"place": place, "subject": subject}, make
        return
    for held_out, number in enumerate((arguments.images, arguments.held_out)):
        enough = 200 + int(2.2 * number)  # of which half or more are in no cell that is wanted; none is painted yet
        seed, side = arguments.seed, arguments.size
        for row, make in worlds.birds(arguments.source, enough, 0.5, seed, bool(held_out), pixels=side):
            yield bool(held_out), {"place": row["place"], "subject": row["subject"]}, make


def _celeba(arguments: argparse.Namespace) -> Found:
    def rows() -> Found:
        if files := _parquet(arguments.source, {"Male", "Blond_Hair"}):
            yield from _stored(files, arguments.size)
            return
        names, *lines = _words(_find(arguments, "list_attr_celeba.txt", "list_attr_celeba.csv"))
        parts = dict(_words(_find(arguments, "list_eval_partition.txt", "list_eval_partition.csv")))
        folder = _find(arguments, "img_align_celeba")
        folder = folder / folder.name if (folder / folder.name).is_dir() else folder
        for file, *values in lines:
            row = dict(zip(names[-len(values) :], map(int, values), strict=True))
            yield parts[file] != "0", row, partial(_open, folder / file, arguments.size)

    for held_out, row, make in rows():
        numbers = {name: value for name, value in row.items() if isinstance(value, int) and name != "celeb_id"}
        classes = {name: name if value > 0 else f"not {name}" for name, value in numbers.items()}
        classes["gender"] = "male" if classes.pop("Male") == "Male" else "female"
        yield held_out, classes, make


def _fairface(arguments: argparse.Namespace) -> Found:
    def rows() -> Found:
        columns = {"age", "gender", "race"}
        if files := _parquet(arguments.source, columns):
            yield from _stored(files, arguments.size)
            return
        for part in ("train", "val"):
            table, folder = _find(arguments, f"fairface_label_{part}.csv"), _find(arguments, part).parent
            for row in _csv(table, {"file"} | columns):
                yield part == "val", row, partial(_open, folder / row["file"], arguments.size)

    for held_out, row, make in rows():
        years = repaired_age(row["age"])
        if arguments.all_ages or years in worlds.AGES:
            attributes = {"gender": worlds.GENDERS[row["gender"]], "race": row["race"]}
            yield held_out, attributes | {"age": AGES[years], "years": years}, make


def repaired_age(text: str) -> str:
    """FairFace's class of age; spreadsheets turn 3-9 and 10-19 into dates: 03-Sep, 9-Mar, Oct-19, 2019-10-01.

    Raises:
        DataError: It is neither.
    """
    months = {"mar": 3, "sep": 9, "oct": 10}
    parts = re.findall(r"\d+|[a-z]+", text.lower())
    numbers = {int(part) if part.isdigit() else months.get(part[:3]) for part in parts}
    if text in AGES:
        return text
    if {3, 9} <= numbers:
        return "3-9"
    if 10 in numbers and numbers & {19, 2019}:
        return "10-19"
    raise DataError(f"Expected an age of {', '.join(AGES)}, got {text!r}. Correct it in the labels.")


READERS = {"waterbirds": _waterbirds, "celeba": _celeba, "fairface": _fairface}


def prepare(arguments: argparse.Namespace) -> None:
    """Write OUT/train and OUT/held-out as the command line asks, and say what is in them.

    Raises:
        ConfigError: An option does not fit the set or the others.
        DataError: Files are missing or damaged, or there are too few images of a group.
    """
    published = SETS[arguments.name]
    if _composed(arguments):
        arguments.images, arguments.held_out = arguments.images or 4000, arguments.held_out or 1000
    if min(arguments.size, arguments.images or 1, arguments.held_out or 1) < 1:
        raise ConfigError("Expected --images, --held-out and --size of at least 1. Give other numbers.")
    specs = arguments.captions or list(published["captions"])[:1]
    captions = [_caption(spec) for spec in published["captions"].get(specs[0], specs)]
    hidden = arguments.hidden or next(iter(published["hidden"]))
    columns, texts = hidden.split(" x "), [text for text, _, _ in captions]
    cells, classes = _read(arguments, captions, columns)
    orders = {} if arguments.groups == ["all"] else published["hidden"]
    every = product(*(orders.get(column) or sorted(classes[column]) for column in columns))
    groups = [" x ".join(parts) for parts in every] if arguments.groups in (None, ["all"]) else arguments.groups

    usual = "19:1/1:19" if _composed(arguments) else published["ratios"].get(hidden)
    shares, part = _shares(arguments, usual, texts, groups), cells["train"]
    if shares is None:
        part = {("the set",): [row for (_, group), rows in part.items() if group in groups for row in rows]}
        shares = {("the set",): 1.0}
    even = {cell: 1 / len(texts) / len(groups) for cell in product(texts, groups)}
    rng = np.random.default_rng(arguments.seed)
    both = {"train": worlds.mix(part, shares, arguments.images, rng)}
    both["held-out"] = worlds.mix(cells["held-out"], even, arguments.held_out, rng)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("source", "out", "command")}
    for name, rows in both.items():
        settings["digest"] = hashlib.sha256(json.dumps([row for row, _ in rows]).encode()).hexdigest()
        worlds.write(arguments.out / name, rows, progress=True, world=f"{arguments.name}, {name}", **settings)
        print(f"{arguments.out / name}: {len(rows)} images")
        counts = Counter((row["text"], " x ".join(row[column] for column in columns)) for row, _ in rows)
        for (text, group), number in sorted(counts.items()):
            print(f"  {number:6} {text}: {group}")
    print(f"Terms of {arguments.name}: {published['terms']}.")


def _read(
    arguments: argparse.Namespace, captions: list[tuple[str, str, set[str]]], columns: list[str]
) -> tuple[dict[str, dict[tuple, list[Row]]], dict[str, set[str]]]:
    """Part to (caption, group) to rows, of images that just one caption is true of; column to its classes."""
    cells: dict[str, dict[tuple, list[Row]]] = {"train": {}, "held-out": {}}
    classes: dict[str, set[str]] = {}
    try:
        for held_out, attributes, make in READERS[arguments.name](arguments):
            for column, value in attributes.items():
                classes.setdefault(column, set()).add(value)
            fitting = [caption for caption in captions if not caption[2] or caption[2] & set(attributes.values())]
            if len(fitting) == 1:
                text, subject, _ = fitting[0]
                cell = text, " x ".join(attributes.get(column, "") for column in columns)
                row = {"text": text, **attributes, "subject": subject}
                cells["held-out" if held_out else "train"].setdefault(cell, []).append((row, make))
    except (KeyError, ValueError, IndexError) as error:
        remedy = f"Get them again from {SETS[arguments.name]['page']}."
        raise DataError(found_else(f"labels of {arguments.name}", error, remedy)) from error
    words = set().union(*(words for _, _, words in captions))
    for option, names, known in (
        ("--hidden", set(columns), set(classes)),
        ("--captions", words, set().union(*classes.values())),
    ):
        if unknown := sorted(names - known):
            raise ConfigError(f"Expected {option} of {', '.join(sorted(known))}, got {unknown[0]}. Correct it.")
    return cells, classes


def _caption(spec: str) -> tuple[str, str, set[str]]:
    """Text, subject and classes of "a photo of a [young] person=young"; no classes where it is true of every image."""
    text, _, words = spec.rpartition("=")
    found = re.fullmatch(r"([^][]*)\[([^][]+)\]([^][]*)", text)
    if not found or not words:
        raise ConfigError(
            f"Expected a caption such as 'a photo of a [smiling] person=Smiling', got {spec!r}. Put its subject in "
            "brackets and a class after the equals sign, several with | between, * for every image."
        )
    return "".join(found.groups()), found[2], set() if words == "*" else set(words.split("|"))


def _shares(arguments: argparse.Namespace, usual: str | None, texts: list, groups: list) -> dict | None:
    """Share of every (caption, group), captions equally often; None takes the set as it is."""
    ratio, severity = arguments.ratio, arguments.severity
    if severity is not None:
        ratio = f"{severity:g}:{1 - severity:g}/{1 - severity:g}:{severity:g}"
    elif not ratio and usual and arguments.groups is None and len(texts) <= 2:
        ratio = "/".join(usual.split("/")[: len(texts)])
    if not ratio:
        return None
    parts = [part.split(":") for part in ratio.split("/")]
    parts = parts * len(texts) if len(parts) == 1 else parts
    try:
        table = np.array(parts, dtype=float)
        if table.shape != (len(texts), len(groups)) or (table < 0).any() or not table.sum(axis=1).all():
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"Expected --ratio of {len(groups)} groups ({', '.join(groups)}) for each of {len(texts)} captions, such "
            f"as 3:1/1:3, or --severity from 0 to 1 of two groups and two captions, got {ratio}. Correct it."
        ) from None
    table /= table.sum(axis=1, keepdims=True) * len(texts)
    return dict(zip(product(texts, groups), table.ravel().tolist(), strict=True))


def _find(arguments: argparse.Namespace, *files: str) -> Path:
    for file in files:
        if found := sorted(arguments.source.glob(file)) or sorted(arguments.source.glob(f"*/{file}")):
            return found[0]
    published = SETS[arguments.name]
    raise DataError(
        f"Expected {' or '.join(files)} in {arguments.source}, found none. {arguments.name} is read from "
        f"{published['files']}. Nothing is downloaded: get it from {published['page']} and keep to its terms "
        f"({published['terms']})."
    )


def _csv(path: Path, columns: set[str]) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if absent := sorted(columns - set(reader.fieldnames or ())):
            raise DataError(f"Expected a column {absent[0]} in {path}, found none. Use the published file.")
        yield from reader


def _words(path: Path) -> Iterator[list[str]]:
    """Words of the lines of CelebA's lists, with commas or without; the line with their number is left out."""
    lines = (line.replace(",", " ").split() for line in path.read_text("utf-8").splitlines())
    return (words for words in lines if len(words) > 1)


def _parquet(source: Path, columns: set[str]) -> list[Path]:
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    return [path for path in files if columns <= set(pyarrow.parquet.read_schema(path).names)]


def _stored(files: list[Path], size: int) -> Found:
    """Rows of parquet files; their split is a column, or begins the name of the file or of its folder."""
    for path in files:
        table = pyarrow.parquet.read_table(path)
        about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        names = {column: kind["names"] for column, kind in about.get("features", {}).items() if "names" in kind}
        for index, row in enumerate(table.drop_columns(["image"]).to_pylist()):
            splits = (row.pop("split", ""), path.name, path.parent.name)
            split = next((split for split in splits if split.startswith(("train", "val", "test"))), None)
            if split is None:
                raise DataError(
                    f"Expected a column split in {path}, or a name such as train-00000.parquet. Rename it."
                )
            row |= {column: kinds[row[column]] for column, kinds in names.items()}
            yield not split.startswith("train"), row, partial(_decode, table["image"], index, size)


def _decode(images: Any, index: int, size: int) -> Image.Image:
    return _open(io.BytesIO(images[index].as_py()["bytes"]), size)


def _open(file: Path | io.BytesIO, size: int) -> Image.Image:
    """The middle square of an image."""
    try:
        with Image.open(file) as image:
            return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except OSError as error:
        raise DataError(f"Expected an image at {file}, found none ({error}). Unpack the images again.") from error


def add_prepare(commands: Any) -> None:
    """Add `prepare` to the commands of a parser."""
    about = ["What each set is read from, where it comes from, its terms:"]
    for name, published in SETS.items():
        captions, hidden = (", ".join(published[option]) for option in ("captions", "hidden"))
        about.append("\n" + textwrap.fill(f"{name}: {published['files']}.", 80))
        about.append(f"  {published['page']}")
        about.append(textwrap.fill(f"Terms: {published['terms']}.", 80, initial_indent="  ", subsequent_indent="  "))
        about.append(f"  --captions {captions}; --hidden {hidden}, or any other column")
    parser = commands.add_parser(
        "prepare",
        help="write a published set as captioned folders",
        description="\n\n".join(textwrap.fill(part, 80) for part in str(__doc__).split("\n\n")),
        epilog="\n".join(about),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=SETS, help="the set")
    parser.add_argument("source", type=Path, help="the folder of the set as published, or a parquet file")
    parser.add_argument("out", type=Path, help="where train/ and held-out/ are written")
    parser.add_argument("--images", type=int, help="number of training images (all; 4000 of composed birds)")
    parser.add_argument("--held-out", type=int, help="number of held-out images (all; 1000 of composed birds)")
    parser.add_argument("--size", type=int, default=worlds.SIDE, help="side in pixels (%(default)s)")
    bias = parser.add_mutually_exclusive_group()
    bias.add_argument("--severity", type=float, help="share of a caption's own of two groups, such as .95")
    bias.add_argument("--ratio", help="of the groups under each caption, such as 3:2:1:1/1:1:2:3")
    parser.add_argument("--captions", nargs="+", help="a name below, or such as 'a [smiling] person=Smiling'")
    parser.add_argument("--hidden", help="the hidden attribute, or two as in 'gender x race'")
    parser.add_argument("--groups", nargs="+", help="its classes in the order of --ratio, or all; others are left out")
    parser.add_argument("--all-ages", action="store_true", help="people under 20 too (FairFace)")
    parser.add_argument("--seed", type=int, default=0, help="what images are drawn (%(default)s)")
