"""One error for whatever goes wrong while another library loads weights: which file or package, and what to do."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..errors import InvDiffError, ModelError, first_line

_POINTER = b"version https://git-lfs"


@contextmanager
def loading(kind: str, source: str, remedy: str = "") -> Iterator[None]:
    """Raise `ModelError` where `kind` cannot be loaded in the block from `source`, a folder or a hub id."""
    try:
        yield
    except InvDiffError:
        raise
    except Exception as error:  # libraries raise what they like: tokenizers a plain Exception
        reason, folder = first_line(error), Path(source).expanduser()
        if isinstance(error, ImportError):
            remedy = "Install that package (pip install), or choose a model that does without."
        elif isinstance(error, AttributeError):
            remedy = "Upgrade diffusers and transformers, which may know it by now, or choose another model."
        elif folder.exists() or looks_local(source):
            reason, remedy = _damage(folder) or reason, remedy or "Save it again, or download it again."
        else:
            taken = (
                f"There is no {source} in this folder, so it was taken for a hub id: check the spelling, the network"
            )
            remedy = f"{remedy} {taken} and, if it is gated, your login (hf auth login).".lstrip()
        raise ModelError(f"Expected {kind} at {source}, could not load it: {reason.rstrip('.')}. {remedy}") from error


def looks_local(name_or_folder: str) -> bool:
    """Whether it can only be meant as a folder: a hub id has one slash at most, between two names."""
    name = name_or_folder
    return name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1


def check_complete(missing: Any, part: str, source: str) -> None:
    """Raise `ModelError` where weights are `missing` in files: they would be drawn at random."""
    if names := sorted(missing):
        raise ModelError(
            f"Expected all weights of {part} at {source}, found none of {', '.join(names[:5])} ({len(names)} in all). "
            "Download it again, or give a model that was saved whole; a classifier often lacks a pooler."
        )


def load_complete(model: Any, source: str, **options: Any) -> Any:
    """Load one of our own models, a class of diffusers' `ModelMixin` or its `super()`, with all its weights."""
    loaded, report = model.from_pretrained(source, low_cpu_mem_usage=False, output_loading_info=True, **options)
    check_complete(report["missing_keys"], type(loaded).__name__, source)
    return loaded


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Raise `ModelError` where a tokenizer knows no word: transformers 5 makes up for absent files with this."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"Expected a tokenizer at {source}, found one that knows no word: its files are absent.")


@contextmanager
def complete_text_encoders(source: str) -> Iterator[None]:
    """Let `transformers` fail in the block where weights are missing; diffusers gives no way to ask for the report."""
    original: Any = vars(PreTrainedModel)["from_pretrained"]  # the classmethod itself, not bound to this class

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        model, report = original.__func__(cls, *arguments, **options, output_loading_info=True)
        check_complete(report["missing_keys"], f"the {cls.__name__}", source)
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


def _damage(folder: Path) -> str | None:
    """What is wrong with the first damaged file of weights, settings or words in a folder, if any is."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".safetensors", ".json", ".bin", ".model", ".txt") or not path.is_file():
            continue
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
        if start == _POINTER:
            return f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull there"
        try:
            if not start and path.suffix != ".txt":
                raise ValueError("it is empty")
            if path.suffix == ".safetensors":
                safe_open(path, "pt").__enter__()
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            return f"{path} is damaged or cut short ({first_line(error)})"
    return None
