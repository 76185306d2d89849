"""The command that opens the web page."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .adapter import DATA, RUN, command, option, shown_default
from .arguments import CaptionOptions, Classes, WeightsOptions
from .print import finish, one_process, say, silence_libraries

PANEL = "The way through"
PASSWORD = "INVDIFF_UI_PASSWORD"  # noqa: S105  # the variable's name

app = typer.Typer()


@command(app, "invdiff ui out/demo", panel=PANEL)
def ui(
    *,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Folders with audit/, module/, data/ and results.json, such as `invdiff demo` writes; any part may "
            "be absent. Without one, and without a model, the bundled demo is opened.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        option("The pipeline." + shown_default("the one that the module was trained for"), metavar="MODEL"),
    ] = None,
    module: Annotated[
        str | None, option("What `invdiff train` wrote." + shown_default("the first run's"), metavar="MODULE")
    ] = None,
    annotator: Annotated[
        str | None,
        option(
            "What counts images, as for `invdiff evaluate`." + shown_default("for the bundled model, its own"),
            metavar="ANNOTATOR",
        ),
    ] = None,
    attribute: Annotated[
        str | None, option("For an image classifier: what its classes are classes of.", metavar="NAME")
    ] = None,
    classes: Classes = None,
    data: Annotated[
        str | None,
        option("The images that were audited, where a run does not hold them.", "--data", panel=DATA, metavar="DATA"),
    ] = None,
    source: CaptionOptions,
    weights: WeightsOptions,
    host: Annotated[
        str, option("Address to listen on. Any but this machine's own needs --public.", panel=RUN)
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        option("Port to listen on." + shown_default("the first free one from 7860"), panel=RUN, min=0, max=65535),
    ] = None,
    public: Annotated[
        bool,
        option(f"Let others on the network in, who are asked for the password in ${PASSWORD}.", "--public", panel=RUN),
    ] = False,
    browser: Annotated[bool, option("Open a browser.", panel=RUN)] = True,
) -> None:
    """Open a page in the browser: draw with and without guidance, look through an audit, compare results.

    Nothing leaves this machine. Names given to groups and images left out are saved beside the audit.
    """
    one_process("ui")
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("Expected gradio for the page, found none. Install it: pip install 'invdiff[ui]'.")
    from ..app.serve import check_address, ended_by_signals, free_port, launch, own_files

    password = os.environ.get(PASSWORD) or None
    check_address(host, public=public, password=password)
    source.expect(data, "--data")
    chosen_port = free_port(port)
    with ended_by_signals(), own_files():
        say("loading the page", quiet=False)
        silence_libraries()
        from ..app.page import build_page
        from ..app.studio import open_studio
        from ..app.workspace import open_workspace

        workspace = open_workspace(
            runs or (),
            model=model,
            module=module,
            annotator=annotator,
            data=source.load(data) if data else None,
        )
        if workspace.model:
            say("loading the model", quiet=False)
        studio = open_studio(workspace, dtype=weights.dtype, attribute=attribute or "", classes=classes)
        page = build_page(workspace, studio)
        address = launch(page, host=host, port=chosen_port, password=password, browser=browser, public=public)
        finish(f"The page is at {address} until you press Ctrl-C.")
        for name, parts in workspace.audits.items():
            say(f"names and changes to the audit of “{name}” are kept in {parts.audit}", quiet=False)
        page.block_thread()
