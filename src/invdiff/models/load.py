"""Load a diffusers pipeline and find the parts that invdiff works with."""

from __future__ import annotations

import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import Version

from ..distributed import num_processes, state
from ..errors import ModelError
from .loading import check_complete, check_tokenizer, complete_text_encoders, loading, looks_local

_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


def default_device() -> torch.device:
    """The best device of this machine: cuda, mps or cpu, in this order; each process has one of its own."""
    if num_processes() > 1:
        return state().device
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device("cuda" if torch.cuda.is_available() else mps)


def load_pipeline(
    name_or_folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """Load a text-to-image pipeline, ready to run: progress bars off, safety checker off.

    The safety checker replaces what it refuses by black images, which would pass for images in a comparison.

    Args:
        name_or_folder: A folder that `save_pretrained` wrote, or a hub id such as "org/name".
        device: Where to put the pipeline; `default_device()` unless given.
        dtype: The type of the weights; float32 unless given.

    Raises:
        ModelError: There is no diffusers pipeline at `name_or_folder`.
    """
    source = str(name_or_folder)
    path = Path(source).expanduser()
    if path.is_file():
        raise ModelError(
            f"Expected a diffusers pipeline folder or a hub id, got the single file {source}. Convert it: "
            f"StableDiffusionPipeline.from_single_file({source!r}).save_pretrained('my-model')."
        )
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"Expected a diffusers pipeline in {source}, found no model_index.json there. Give the "
                "folder that pipeline.save_pretrained wrote (not that of one component or of a LoRA)."
            )
        source = str(path.resolve())  # so that a relative path is never taken for a hub id
    elif looks_local(source):
        raise ModelError(f"Expected a diffusers pipeline folder at {source}, found nothing there.")
    with loading("a whole diffusers pipeline" if path.is_dir() else "a diffusers pipeline", source):
        with warnings.catch_warnings():  # diffusers passes huggingface_hub an argument it no longer has
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            index = DiffusionPipeline.load_config(source)
        # A part saved as None must be passed as None again, or from_pretrained looks for it.
        options: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
        if "safety_checker" in index:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        pipe = _from_pretrained(source, options | {_DTYPE: dtype or torch.float32})
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                check_complete([key for key, weight in part.named_parameters() if weight.is_meta], name, source)
            elif name.startswith("tokenizer") and part is not None:
                check_tokenizer(part, source)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or default_device())


def _from_pretrained(source: str, options: dict[str, Any]) -> Any:
    """Load the plain weights, or where files are missing those of a variant."""
    with complete_text_encoders(source):
        try:
            return DiffusionPipeline.from_pretrained(source, **options)
        except (OSError, ValueError):
            for variant in ("fp16", "bf16"):
                with suppress(OSError, ValueError):
                    return DiffusionPipeline.from_pretrained(source, **options, variant=variant)
            raise


def dtype_named(name: str) -> torch.dtype:
    """The type of weights called "fp32", "fp16" or "bf16"."""
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


GUIDED: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
"""Denoisers that have guidance modules attached, and the hook that adds their shifts."""


def check_plain(pipe: DiffusionPipeline) -> None:
    """Raise `ModelError` where a guidance module is attached to a model that is to be measured or drawn from."""
    denoiser = denoiser_of(pipe)
    if getattr(denoiser, "_orig_mod", denoiser) in GUIDED:  # torch.compile wraps what was guided before
        raise ModelError(
            "Expected the plain model, found a guidance module attached to it, which would take part. Call detach() "
            "on what attach returned."
        )


def public_name(name_or_folder: str) -> str:
    """A hub id as it is, and only the last name of a local folder: its path is private."""
    if name_or_folder and (looks_local(name_or_folder) or Path(name_or_folder).exists()):
        return Path(name_or_folder).expanduser().resolve().name
    return name_or_folder


def denoiser_of(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The frozen network that invdiff guides: `pipe.unet` or `pipe.transformer`; `ModelError` without either."""
    for denoiser in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)):
        if denoiser is not None:
            return denoiser
    raise ModelError(
        f"Expected a pipeline with a unet or a transformer, got a {type(pipe).__name__} with neither. "
        "Use a text-to-image diffusion pipeline."
    )
