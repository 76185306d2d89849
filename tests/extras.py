"""For tests of the page: a file that imports this before all of invdiff.app skips where gradio is absent."""

import pytest

pytest.importorskip("starlette", reason="needs the ui extra: pip install 'invdiff[ui]'")
from invdiff.app.serve import own_files

with own_files():  # it looks for them when it is imported
    gr = pytest.importorskip("gradio", reason="needs the ui extra: pip install 'invdiff[ui]'")
