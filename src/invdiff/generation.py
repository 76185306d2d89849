"""Draw images of prompts with or without a guidance module, from the same starting noise; resumable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .config import GenerateConfig
from .distributed import is_main, mine, wait
from .drawing import Drawing
from .errors import ConfigError
from .families import family_of
from .files import fingerprint, read_json, save_image, weights_digest, write_json, write_text
from .guidance.environments import Environments
from .guidance.module import GuidanceModule
from .pipelines import denoiser_of
from .progress import progress_bar

MANIFEST = "manifest.jsonl"
SETTINGS = "generate.json"
_CHUNK = "invdiff"  # the PNG text chunk that holds an image's row of the manifest


def generate(
    pipe: Any,
    prompts: Sequence[str],
    output_dir: str | Path,
    *,
    module: GuidanceModule | None = None,
    config: GenerateConfig | None = None,
    environments: Environments = "uniform",
    progress: bool = True,
) -> Path:
    """Draw `config.images_per_prompt` images of each prompt into `output_dir` and return that folder.

    Writes `<prompt index>/<image index>.png`, `manifest.jsonl` with one row per image ("file_name", "prompt",
    "seed", "environment", "scale", "guidance_scale", "num_inference_steps"), and `generate.json` with the
    settings. A run that was stopped goes on where it stopped, to the same bytes; several processes share it by
    batches.

    The starting noise of image k of a prompt depends on the prompt, k and `config.seed` only, so images with
    and without a module can be compared one to one. "environment" is the group of each factor, or null where
    none has a say: without a module, or with an invariant one. "scale" is 0 without a module.

    Args:
        pipe: A diffusers pipeline that draws images of prompts, class names or nothing; it is left as it was.
        prompts: Different prompts, or class names; none for an unconditional model.
        output_dir: A new folder, or that of a run to go on with.
        module: A guidance module made for this pipeline; None draws from the plain model.
        config: Numbers of images and steps, scales, seed.
        environments: `"uniform"`, proportions, or groups as for `attach`; groups are given for each image,
            prompt by prompt (prompts x images_per_prompt), or for the images of every prompt alike
            (images_per_prompt).
        progress: Show a progress bar.

    Raises:
        ConfigError: Prompts or environments cannot be used, or `output_dir` is no folder or holds images that
            were drawn otherwise.
        ModelError: The module was trained for another model, or a safety checker blackens images.
        DataError: The disk is full or the folder cannot be written.
    """
    drawing = Drawing(pipe, prompts, module=module, config=config, environments=environments)
    rows = drawing.rows
    output_dir = Path(output_dir)
    if is_main():
        _open_folder(output_dir, rows, _settings(pipe, drawing, module))
    wait()
    done = [_read_row(output_dir, row) for row in rows]
    # A batch is drawn whole or not at all.
    missing = [batch for batch in mine(drawing.batches()) if any(done[place] is None for place in batch)]
    start = len(rows) - sum(map(len, missing))
    with drawing, progress_bar("generating", len(rows), start=start, enabled=progress) as bar:
        for batch in missing:
            images, drawn = drawing.batch(batch)
            for place, image, row in zip(batch, images, drawn, strict=True):
                _save(output_dir / row["file_name"], image, row)
                done[place] = row
            bar.advance(len(batch))
    wait()
    if is_main():
        done = [row or _read_row(output_dir, planned) for row, planned in zip(done, rows, strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in done]
        write_text(output_dir / MANIFEST, "".join(lines))
    wait()
    return output_dir


def drawing_flags(pipe: Any, resolution: int) -> list[str]:
    """Return the options without which `invdiff generate` would not draw as the module was trained: often none."""
    family = family_of(pipe)
    own = family.resolution(pipe, denoiser_of(pipe))
    unguided = [] if family.needs_prompts else ["--guidance-scale", "1"]
    return unguided + (["--resolution", str(resolution)] if resolution not in (0, own) else [])


def _save(path: Path, image: Image.Image, row: dict[str, Any]) -> None:
    chunk = PngInfo()
    chunk.add_text(_CHUNK, json.dumps(row))
    save_image(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=chunk))


def _read_row(output_dir: Path, planned: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest's row of an image drawn before, or None where there is no whole one."""
    try:
        with Image.open(output_dir / planned["file_name"]) as image:
            image.load()
            row = json.loads(image.info[_CHUNK])
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return None
    return row if {**row, "environment": None} == planned else None


def _settings(pipe: Any, drawing: Drawing, module: GuidanceModule | None) -> dict[str, Any]:
    """Return all that the images depend on, as flat JSON."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    networks: dict[str, Any] = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    weights = fingerprint(*(name + weights_digest(network) for name, network in sorted(networks.items())))
    targets: Any = None
    mix = drawing.mix
    if mix is not None:
        targets = [row.tolist() for row in mix.proportions] if mix.given is None else mix.given.tolist()
    return {
        "prompts": drawing.prompts,
        **drawing.config.to_dict(),
        "module": None if module is None else weights_digest(cast(torch.nn.Module, module)),
        "environments": targets,
        "model": f"{type(pipe).__name__} {weights}",
        "scheduler": f"{type(pipe.scheduler).__name__} "
        + fingerprint(json.dumps(scheduler, sort_keys=True, default=str)),
    }


def _open_folder(output_dir: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Make `output_dir` and record the settings in it, or see that they agree with those recorded."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Expected a folder to write images to, got {output_dir} ({error.strerror}). Choose another."
        ) from error
    path = output_dir / SETTINGS
    if not path.exists():
        strangers = [row["file_name"] for row in rows if (output_dir / row["file_name"]).exists()]
        strangers += [MANIFEST] if (output_dir / MANIFEST).exists() else []
        if strangers:
            raise ConfigError(
                f"Expected a new folder or one with {SETTINGS}, got {output_dir} with {strangers[0]} of "
                "unknown settings. Choose another folder, or empty this one."
            )
        write_json(path, settings)
    stored = read_json(path)
    names = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
    if names:
        raise ConfigError(
            f"Expected to go on in {output_dir} with the settings it was started with, found others: "
            + "; ".join(f"{n} was {_short(stored.get(n))}, now {_short(settings.get(n))}" for n in names)
            + ". Use the same settings, or another output folder, or delete this one to start afresh."
        )
    for leftover in output_dir.glob("[0-9]*/.*.png"):  # of a run killed in the midst of writing
        leftover.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
