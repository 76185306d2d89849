"""Take the README's pictures: of the report and the page in a real browser, and the demo's own before and after.

After `make demo`: python scripts/take_pictures.py out/demo

It needs playwright (`pip install -e '.[browser]'`) and a Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from invdiff.files import save_image

DOCS = Path(__file__).parents[1] / "docs"
WIDTH = 1280


def main() -> None:
    """Take the pictures of a finished demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="what `invdiff demo` wrote")
    parser.add_argument("--output", type=Path, default=DOCS, help="where the pictures go")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="a Chromium")
    arguments = parser.parse_args()
    before_after = Image.open(arguments.run / "report-before-after.png")
    save(
        before_after.resize((1200, round(before_after.height * 1200 / before_after.width))),
        arguments.output / "before_after.png",
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.browser, args=["--no-sandbox", "--disable-gpu"])
        for name, take in (("report.png", picture_of_report), ("page.png", picture_of_page)):
            view = browser.new_page(viewport={"width": WIDTH, "height": 900})
            save(Image.open(io.BytesIO(take(view, arguments.run))), arguments.output / name)
        browser.close()


def picture_of_report(view: Any, run: Path) -> bytes:
    """Return the top of the report."""
    view.set_viewport_size({"width": WIDTH, "height": 1500})
    view.goto((run / "report.html").resolve().as_uri())
    return bytes(view.screenshot())


def picture_of_page(view: Any, run: Path) -> bytes:
    """Return the page's first tab after a drawing."""
    command = [sys.executable, "-m", "invdiff", "ui", str(run), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603
    try:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        view.goto(address)
        view.wait_for_selector("#draw")
        view.click("#draw")
        view.wait_for_function("document.querySelectorAll('#guided img').length === 12", timeout=120_000)
        view.wait_for_timeout(1000)
        view.mouse.move(0, 0)
        return bytes(view.screenshot(full_page=True))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as small as its colours allow."""
    save_image(path, lambda temporary: picture.convert("RGB").save(temporary, format="PNG", optimize=True))
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
