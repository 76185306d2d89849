"""Load a diffusers pipeline and find the parts that invdiff works with.

Whatever goes wrong while another library loads weights is one error: which file or package, and what to do.
"""

import inspect
import json
import logging
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import constants
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..distributed import num_processes, state
from ..errors import InvDiffError, ModelError, first_line
from ..files import arrays_digest, fingerprint
from ..progress import note

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Types of a model's weights by the names of `--dtype`."""
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
_POINTER = b"version https://git-lfs"


def default_device() -> torch.device:
    """The best device of this machine: cuda, mps or cpu, in this order; each process has one of its own."""
    if num_processes() > 1:
        return state().device
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device("cuda" if torch.cuda.is_available() else mps)


def load_pipeline(
    name_or_folder: str | Path,
    *,
    loras: Sequence[str] = (),
    config: str | Path = "",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline, ready to run: progress bars off, safety checker off.

    The safety checker replaces what it refuses by black images, which would pass for images in a comparison.

    Args:
        name_or_folder: A folder that `save_pretrained` wrote, a hub id such as "org/name", or a single `.safetensors`
            file with all weights.
        loras: LoRAs to fuse into the weights: files, folders or hub ids, with ":0.8" for a weight other than 1.
        config: For a single file, a pipeline (folder or hub id) that its settings and tokenizer are taken from. Unless
            given, the one on the hub that diffusers knows for such weights.
        device: Where to put the pipeline; `default_device()` unless given.
        dtype: The type of the weights; float32 unless given.

    Raises:
        ModelError: There is no diffusers pipeline at `name_or_folder`, or a LoRA does not fit it.
    """
    source = str(name_or_folder)
    path = Path(source).expanduser()
    single = path.is_file()
    if single and path.suffix != ".safetensors":
        raise ModelError(f"Expected a .safetensors file, got {source}: other kinds can run code when they are opened.")
    if config and not single:
        raise ModelError(f"Expected no config beside {source}, which has its own, got {config}: leave it out.")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(
            f"Expected a diffusers pipeline in {source}, found no model_index.json there. Give the folder that "
            "pipeline.save_pretrained wrote (not that of one component or of a LoRA)."
        )
    if path.exists():
        source = str(path.resolve())  # so that a relative path is never taken for a hub id
    elif looks_local(source) or path.suffix == ".safetensors":
        raise ModelError(f"Expected a .safetensors file or pipeline folder at {source}, found nothing there.")
    with loading("a whole diffusers pipeline" if path.exists() else "a diffusers pipeline", source):
        settings = str(config) or source
        if single and not config:  # as the pipeline on the hub, by the names and shapes of the weights
            weights = load_single_file_checkpoint(source)
            if any("lora" in name for name in weights):
                raise ModelError(f"Expected all of a model in {source}, found a LoRA. Give its model and --lora FILE.")
            settings = fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
            if settings.endswith("/stable-diffusion-2-1"):
                note(
                    f"{path.name} is read as Stable Diffusion 2.1, which predicts v; of a -base, give --model-config."
                )
        with warnings.catch_warnings():  # diffusers passes huggingface_hub an argument it no longer has
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            remedy = "Without network, give --model-config (config=), a pipeline of this kind."
            with loading(f"settings and tokenizer for {source}", settings, remedy) if single else nullcontext():
                index = DiffusionPipeline.load_config(settings)
        # A part saved as None must be passed as None again, or from_pretrained looks for it.
        options: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
        if "safety_checker" in index:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        options[_DTYPE] = dtype or torch.float32
        if single:
            pipe = getattr(diffusers, index["_class_name"]).from_single_file(source, config=settings, **options)
            pipe.register_to_config(_name_or_path=source)
            with safe_open(path, "pt") as file:
                names = set(file.keys())  # two of which are without weight, and say what it predicts
            if "v_pred" in names:
                predicts = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names}
                pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **predicts)
        else:
            pipe = _from_pretrained(source, options)
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                check_complete([key for key, weight in part.named_parameters() if weight.is_meta], name, source)
            elif name.startswith("tokenizer") and part is not None:
                check_tokenizer(part, source)
    denoiser: Any = denoiser_of(pipe)
    denoiser.fused_loras = [_fuse(pipe, lora) for lora in loras]
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or default_device())


def _fuse(pipe: Any, lora: str) -> tuple[str, str]:
    """Add a LoRA, such as "org/name:0.8", to the weights; its name for people and its fingerprint."""
    source, _, number = lora.rpartition(":")
    if not source or Path(lora).expanduser().exists():
        source, number = lora, "1"
    if not number.removeprefix("-").replace(".", "", 1).isdecimal():
        raise ModelError(f"Expected a LoRA, or one with its weight such as {source}:0.8, got {lora}.")
    scale, path = float(number), Path(source).expanduser()
    if not path.exists() and (looks_local(source) or path.suffix == ".safetensors"):
        raise ModelError(f"Expected a LoRA at {source}, found nothing there.")
    place, before = str(path.resolve()) if path.exists() else source, logging.root.manager.disable
    logging.disable(logging.ERROR)  # diffusers would list every weight that does not fit
    try:
        with loading(f"a LoRA for a {type(pipe).__name__}", source, "Is it of this kind?"):
            found = pipe.lora_state_dict(place, use_safetensors=True)
            weights = found[0] if isinstance(found, tuple) else found
            pipe.load_lora_weights(place, adapter_name="lora", use_safetensors=True)
            parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
            matrices = [name for part in parts for name, value in part.named_parameters() if value.ndim > 1]
            placed = sum("lora_" in name for name in matrices)
            given = sum("lora" in name for name, value in weights.items() if value.ndim > 1)
            if placed < given:  # diffusers leaves out what has no place, and says nothing
                raise ValueError(f"only {placed} of its {given} matrices have a place in the model")
            pipe.fuse_lora(components=list(pipe._lora_loadable_modules), lora_scale=scale, safe_fusing=True)
            pipe.unload_lora_weights()
    finally:
        logging.disable(before)
    name = public_name(source) + (f":{scale:g}" if scale != 1 else "")
    return name, fingerprint(arrays_digest(weights), str(scale))


def _from_pretrained(source: str, options: dict[str, Any]) -> Any:
    """Load the plain weights, or where files are missing those of a variant; all of a text encoder's, or none."""
    original: Any = vars(PreTrainedModel)["from_pretrained"]  # the classmethod itself, not bound to this class

    def complete(cls: Any, *arguments: Any, **keywords: Any) -> Any:
        model, report = original.__func__(cls, *arguments, **keywords, output_loading_info=True)
        check_complete(report["missing_keys"], f"the {cls.__name__}", source)
        return model

    # Meanwhile `transformers` itself fails: diffusers passes on no report.
    PreTrainedModel.from_pretrained = classmethod(complete)  # type: ignore[assignment]
    try:
        return DiffusionPipeline.from_pretrained(source, **options)
    except (OSError, ValueError):
        for variant in ("fp16", "bf16"):
            with suppress(OSError, ValueError):
                return DiffusionPipeline.from_pretrained(source, **options, variant=variant)
        raise
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


GUIDED: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
"""Denoisers that have guidance modules attached, and the hook that adds their shifts."""


def loras_of(pipe: Any) -> list[tuple[str, str]]:
    """The LoRAs that `load_pipeline` has fused into a pipeline: each one's name for people and its fingerprint."""
    return getattr(denoiser_of(pipe), "fused_loras", [])


def check_fused(pipe: Any) -> None:
    """Raise `ModelError` where a LoRA is at work beside the weights: a module could not tell who attaches without."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    layers = [layer for part in parts for layer in part.modules() if hasattr(layer, "base_layer")]
    if any(layer.active_adapters and not layer.merged and not layer.disable_adapters for layer in layers):
        raise ModelError(
            "Expected LoRAs to be fused into the weights before audit and training, found one beside them. Call "
            "pipe.fuse_lora() and pipe.unload_lora_weights(), or load_pipeline(name, loras=[...])."
        )


def check_plain(pipe: DiffusionPipeline) -> None:
    """Raise `ModelError` where a guidance module is attached to a model that is to be measured or drawn from."""
    denoiser = denoiser_of(pipe)
    if getattr(denoiser, "_orig_mod", denoiser) in GUIDED:  # torch.compile wraps what was guided before
        raise ModelError("Expected the plain model, found a guidance module attached. Call detach() on it.")


def public_name(name_or_folder: str) -> str:
    """A hub id as it is, and only the last name of a local folder: its path is private."""
    if name_or_folder and (looks_local(name_or_folder) or Path(name_or_folder).exists()):
        return Path(name_or_folder).expanduser().resolve().name
    return name_or_folder


def note_cut(pipe: Any, captions: Sequence[str]) -> None:
    """Say which captions are longer than any text encoder of the pipeline reads: diffusers cuts them."""
    tokenizers = [each for name, each in pipe.components.items() if name.startswith("tokenizer") and each is not None]
    if not tokenizers or not captions:
        return
    tokenizer: Any = max(tokenizers, key=lambda each: each.model_max_length)
    reads = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")  # of T5, fewer by default
    most = min([tokenizer.model_max_length, *([reads.default] if reads else [])])
    lengths = map(len, tokenizer(list(captions), verbose=False).input_ids)
    cut = [caption for caption, length in zip(captions, lengths, strict=True) if length > most]
    if cut:
        of = f"{len(cut):,} of {len(captions):,} texts are"
        note(f"{of} longer than the {most} tokens that the model reads, and cut: {cut[0]!r:.120}")


def denoiser_of(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The frozen network that invdiff guides: `pipe.unet` or `pipe.transformer`; `ModelError` without either."""
    for denoiser in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)):
        if denoiser is not None:
            return denoiser
    raise ModelError(f"Expected a pipeline with a unet or a transformer, got a {type(pipe).__name__}.")


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
            reason = (_damage(folder) or reason) if folder.exists() else "there is no such folder"
            remedy = remedy or "Save it again, or download it again."
        else:
            checks = "the network and, if it is gated, your login (hf auth login)."
            if constants.HF_HUB_OFFLINE:
                checks = "unset HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE), with which nothing is downloaded."
            taken = f"There is no {source} in this folder, so it was taken for a hub id"
            remedy = f"{remedy} {taken}: check the spelling, and {checks}".lstrip()
        raise ModelError(f"Expected {kind} at {source}, could not load it: {reason.rstrip('.')}. {remedy}") from error


def looks_local(name: str) -> bool:
    """Whether it can only be meant as a folder: a hub id has one slash at most, between two names."""
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
