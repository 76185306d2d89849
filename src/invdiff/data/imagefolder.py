"""Write a captioned set as an imagefolder: images, then metadata.csv."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError
from ..files import check_same_settings, read_json, save_image, visible, write_json, write_text

Row = tuple[dict[str, Any], Callable[[], Image.Image]]  # text and attributes of an image, and how it is made


def write_imagefolder(
    folder: str | Path,
    rows: Iterable[Row],
    total: int,
    columns: Sequence[str],
    settings: dict[str, Any],
    *,
    record: str,
    label: str,
    progress: bool = False,
) -> Path:
    """Write `images/00000.png` and so on, then `metadata.csv` of file_name, text and `columns`; return the folder.

    A killed run is taken up where it stopped. `total` rows follow from `settings`, kept in the hidden file `record`:
    another set in the folder is a `ConfigError`, other files are a `DataError`. `label` is the progress bar's.
    """
    from ..progress import progress_bar  # imports torch, which writing does without

    folder = Path(folder)
    file = folder / record
    if file.exists():
        check_same_settings(folder, read_json(file), settings)
    elif folder.exists() and (not folder.is_dir() or visible(folder, "*")):
        raise DataError(f"Expected a new or empty folder at {folder}, found files. Choose another folder.")
    else:
        write_json(file, settings)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["file_name", "text", *columns], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    with progress_bar(label, total, enabled=progress) as bar:
        for index, (metadata, make) in enumerate(rows):
            name = image_file_name(index)
            writer.writerow({"file_name": name, **metadata})
            if not (folder / name).exists():
                save_image(folder / name, make().save)
            bar.advance()
    write_text(folder / "metadata.csv", table.getvalue())
    return folder


def image_file_name(index: int) -> str:
    """The path of an image in an imagefolder written here."""
    return f"images/{index:05d}.png"
