"""Read a saved guidance module, with an error that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import ModelError
from ..models.load import looks_local
from .module import GuidanceModule


def load_module(name_or_folder: str | Path) -> GuidanceModule:
    """Load a guidance module from a folder or a hub id, ready to attach.

    Raises:
        ModelError: There is none, or its weights are absent, damaged or do not fit its config.
    """
    source = str(name_or_folder)
    if Path(source).exists() or looks_local(source):
        remedy = "Give the folder that `invdiff train` wrote."
    else:
        remedy = (
            "Give the folder that `invdiff train` wrote, or the hub id of a module; check the spelling, the network "
            "and, for a private module, that you are logged in (hf auth login)."
        )
    try:
        config: Any = GuidanceModule.load_config(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"Expected a guidance module at {source}, found none. {remedy}") from error
    found = config.get("_class_name")
    if found != GuidanceModule.__name__:
        raise ModelError(f"Expected a guidance module at {source}, found {found or 'something else'}. {remedy}")
    try:
        module = GuidanceModule.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelError(f"Could not load the guidance module at {source}: {error} {remedy}") from error
    return module.eval()
