"""HTML fragments, image files and galleries that the tabs share; text of others is never taken for markup."""

import hashlib
import os
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..files import save_image
from ..report.write import html_templates

_FRAGMENTS: Any = html_templates("invdiff.app").get_template("fragments.html.j2").module
# Options of every event: without gradio's own progress, and without a name to be called by.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def fragment(name: str, *arguments: Any) -> str:
    """A macro of `templates/fragments.html.j2`, filled in."""
    return str(getattr(_FRAGMENTS, name)(*arguments))


def notice(text: str) -> str:
    """A line of status."""
    return fragment("notice", text)


def refusal(error: Exception | str) -> str:
    """A line about an error, marked for screen readers."""
    return fragment("notice", str(error), "error")


def image_file(image: Image.Image) -> str:
    """Path of an image as PNG, named after its pixels, below the folder that the page serves.

    Gradio deletes files that were not shown for a while; shown again, they are written again.
    """
    digest = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:32]
    path = Path(os.environ["GRADIO_TEMP_DIR"]) / "shown" / f"{digest}.png"
    if path.is_file():
        os.utime(path)
    else:
        save_image(path, image.save)
    return str(path)


def gallery(name: str, columns: int, **options: Any) -> gr.Gallery:
    """A gallery that nobody can upload to."""
    options |= {"show_label": False, "container": False, "interactive": False}
    options |= {"columns": columns, "height": "auto", "object_fit": "contain"}
    return gr.Gallery(elem_id=name, elem_classes=["shots", f"of-{columns}"], **options)
