"""For tests of the page: a file that imports this before all of invdiff.app skips where gradio is absent."""

import atexit
import shutil

import pytest

pytest.importorskip("starlette", reason="needs the ui extra: pip install 'invdiff[ui]'")
from invdiff.app.serve import own_files

with own_files() as folder:  # it looks for them when it is imported, and writes there again when a page is served
    gr = pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")
atexit.register(shutil.rmtree, folder, ignore_errors=True)
