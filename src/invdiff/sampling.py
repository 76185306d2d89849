"""Draw images of prompts, with or without a guidance module, from starting noise that follows from prompt and seed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .config import GenerateConfig
from .distributed import is_main, mine, wait
from .errors import ConfigError, ModelError
from .files import fingerprint, read_json, save_image, weights_digest, write_json, write_text
from .guidance.attach import Attachment, attach, check_fit, mix_for
from .guidance.environments import EnvironmentMix, Environments
from .guidance.module import GuidanceModule
from .models.families import Family, family_of
from .models.load import check_plain, denoiser_of
from .progress import progress_bar
from .seeds import derived_seed
from .training.checkpoint import check_same_settings

MANIFEST = "manifest.jsonl"
SETTINGS = "generate.json"
_CHUNK = "invdiff"  # the PNG text chunk that holds an image's row of the manifest


class Drawing:
    """The images of `generate`, in memory: rows of a manifest, and the images of any of them.

    Draw inside a `with` block, which may be entered several times; outside it the pipeline is as it was::

        drawing = Drawing(pipe, ["a photo of a waterbird"], module=module)
        with drawing:
            images, rows = drawing.batch(range(8))

    Args:
        pipe: A diffusers pipeline that draws images of prompts, class names or nothing.
        prompts: Different prompts, or class names; none for an unconditional model.
        module: A guidance module made for this pipeline; None draws from the plain model.
        config: Numbers of images and steps, scales, seed.
        environments: As for `generate`.

    Attributes:
        rows: Each image's row of the manifest; its "environment" is None until the image is drawn.
        mix: The target mix; None where groups have no effect.

    Raises:
        ConfigError: Prompts or environments cannot be used.
        ModelError: The module was trained for another model, or a module is attached to the pipeline already.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        module: GuidanceModule | None = None,
        config: GenerateConfig | None = None,
        environments: Environments = "uniform",
    ) -> None:
        check_plain(pipe)
        self._pipe, self._module, self._environments = pipe, module, environments
        self._family: Family = family_of(pipe)
        self.config = config or GenerateConfig()
        if not prompts and not self._family.needs_prompts:
            prompts = [""]
        _check_prompts(prompts)
        if module is not None:
            check_fit(pipe, module)
        self.prompts = list(prompts)
        self.mix = self._target_mix()
        self.rows: list[dict[str, Any]] = [
            {
                "file_name": f"{index:05d}/{image:06d}.png",
                "prompt": prompt,
                "seed": image_seed(prompt, image, self.config.seed),
                "environment": None,
                "scale": self.config.scale if module is not None else 0.0,
                "guidance_scale": self.config.guidance_scale,
                "num_inference_steps": self.config.num_inference_steps,
            }
            for index, prompt in enumerate(prompts)
            for image in range(self.config.images_per_prompt)
        ]
        self._stack = contextlib.ExitStack()
        self._attachment: Attachment | None = None

    def _target_mix(self) -> EnvironmentMix | None:
        """The target mix, given groups repeated for every prompt; None where groups have no effect."""
        if self._module is None:
            if not (isinstance(self._environments, str) and self._environments == "uniform"):
                raise ConfigError(
                    f"Expected a module beside environments, got environments={self._environments!r} and no module."
                )
            return None
        mix = mix_for(self._module, self._environments)
        if mix.given is not None:
            each, total = self.config.images_per_prompt, len(self.prompts) * self.config.images_per_prompt
            if len(mix.given) not in (each, total):
                raise ConfigError(
                    f"Expected groups for {each} images (of every prompt alike) or for all {total}, got "
                    f"{len(mix.given)}."
                )
            mix.given = mix.given.repeat(total // len(mix.given), 1)
        return mix if self._module.sees_environment else None

    def __enter__(self) -> Drawing:
        # Without the pipeline's own progress bar.
        before = dict(getattr(self._pipe, "_progress_bar_config", {}))
        self._stack.callback(lambda: self._pipe.set_progress_bar_config(**before))
        self._pipe.set_progress_bar_config(disable=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._attachment = None
        self._stack.__exit__(*exception)

    def batches(self) -> list[range]:
        """The places in `rows` of each batch: the last bits of an image depend on the others of its batch."""
        size = self.config.batch_size
        return [range(start, min(start + size, len(self.rows))) for start in range(0, len(self.rows), size)]

    @torch.no_grad()
    def batch(self, places: Sequence[int]) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        """Draw one batch: its images, and their rows with the groups drawn.

        Raises:
            ModelError: A safety checker blackens images.
        """
        rows = [self.rows[place] for place in places]
        given = None if self.mix is None else self.mix.given
        if self._module is not None and self._attachment is None:
            target = self._environments if given is None else "uniform"  # given groups follow batch by batch
            self._attachment = self._stack.enter_context(attach(self._pipe, self._module, self.config.scale, target))
        if self._attachment is not None and given is not None:
            self._attachment.mix = EnvironmentMix(given[list(places)], self._attachment.mix.num_groups)
        images = self._draw(rows)
        if self._attachment is not None and self.mix is not None:
            assert self._attachment.environments is not None
            groups = self._attachment.environments[: len(rows)].tolist()  # further rows are those of guidance
            rows = [{**row, "environment": group} for row, group in zip(rows, groups, strict=True)]
        return images, rows

    def _draw(self, rows: Sequence[dict[str, Any]]) -> list[Image.Image]:
        output = self._family.draw(
            self._pipe,
            [row["prompt"] for row in rows],
            guidance_scale=self.config.guidance_scale,
            resolution=self.config.resolution,
            generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
            num_inference_steps=self.config.num_inference_steps,
            output_type="pil",
        )
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise ModelError(
                "Expected images as the model draws them, but the pipeline's safety checker blackened some, "
                "which would count as images in a comparison. Load the pipeline with safety_checker=None."
            )
        return output.images


def image_seed(prompt: str, image: int, seed: int = 0) -> int:
    """The 32-bit seed of image number `image` of `prompt`."""
    return derived_seed("generate", seed, prompt, image) & 0xFFFFFFFF


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"Expected a list of prompts, got {prompts!r}.")
    if not prompts:
        raise ConfigError("Expected at least one prompt, got none.")
    twice = [prompt for index, prompt in enumerate(prompts) if prompt in prompts[:index]]
    if twice:
        raise ConfigError(
            f"Expected different prompts, got {twice[0]!r} again, which would give the same images. For more "
            "images of a prompt raise images_per_prompt."
        )


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
    settings. An interrupted run continues where it stopped, to the same bytes; several processes share it by
    batches.

    The starting noise of image k of a prompt depends on the prompt, k and `config.seed` only, so images with
    and without a module can be compared one to one. "environment" is the group of each factor, or null where
    it has no effect: without a module, or with an invariant one. "scale" is 0 without a module.

    Args:
        pipe: A diffusers pipeline that draws images of prompts, class names or nothing; it is left as it was.
        prompts: Different prompts, or class names; none for an unconditional model.
        output_dir: A new folder, or that of a run to continue.
        module: A guidance module made for this pipeline; None draws from the plain model.
        config: Numbers of images and steps, scales, seed.
        environments: `"uniform"`, proportions, or groups as for `attach`; groups are given for each image,
            prompt by prompt (prompts x images_per_prompt), or for the images of every prompt alike
            (images_per_prompt).
        progress: Show a progress bar.

    Raises:
        ConfigError: Prompts or environments cannot be used, or `output_dir` is no folder or holds images of other
            settings.
        ModelError: The module was trained for another model, or a safety checker blackens images.
        DataError: The disk is full or the folder cannot be written.
    """
    drawing = Drawing(pipe, prompts, module=module, config=config, environments=environments)
    rows, output_dir = drawing.rows, Path(output_dir)
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
    """The options that `invdiff generate` needs to draw as the module was trained: often none."""
    family = family_of(pipe)
    own = family.resolution(pipe, denoiser_of(pipe))
    unguided = [] if family.needs_prompts else ["--guidance-scale", "1"]
    return unguided + (["--resolution", str(resolution)] if resolution not in (0, own) else [])


def _save(path: Path, image: Image.Image, row: dict[str, Any]) -> None:
    chunk = PngInfo()
    chunk.add_text(_CHUNK, json.dumps(row))
    save_image(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=chunk))


def _read_row(output_dir: Path, planned: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest's row of an image that an earlier run drew; None where it is absent or damaged."""
    try:
        with Image.open(output_dir / planned["file_name"]) as image:
            image.load()
            row = json.loads(image.info[_CHUNK])
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return None
    return row if {**row, "environment": None} == planned else None


def _settings(pipe: Any, drawing: Drawing, module: GuidanceModule | None) -> dict[str, Any]:
    """Everything that the images depend on, as flat JSON."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    networks: dict[str, Any] = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    weights = fingerprint(*(name + weights_digest(network) for name, network in sorted(networks.items())))
    schedule = fingerprint(json.dumps(scheduler, sort_keys=True, default=str))
    targets: Any = None
    if drawing.mix is not None:
        given = drawing.mix.given
        targets = [row.tolist() for row in drawing.mix.proportions] if given is None else given.tolist()
    return {
        "prompts": drawing.prompts,
        **drawing.config.to_dict(),
        "module": None if module is None else weights_digest(cast(torch.nn.Module, module)),
        "environments": targets,
        "model": f"{type(pipe).__name__} {weights}",
        "scheduler": f"{type(pipe.scheduler).__name__} {schedule}",
    }


def _open_folder(output_dir: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Make `output_dir` and record the settings in it, or check that they agree with those recorded."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Expected a folder to write images to, got {output_dir} ({error.strerror}). Choose another."
        ) from error
    path = output_dir / SETTINGS
    if not path.exists():
        unknown = [name for name in (*(row["file_name"] for row in rows), MANIFEST) if (output_dir / name).exists()]
        if unknown:
            raise ConfigError(
                f"Expected a new folder or one with {SETTINGS}, got {output_dir} with {unknown[0]} of "
                "unknown settings. Choose another folder, or empty this one."
            )
        write_json(path, settings)
    check_same_settings(output_dir, read_json(path), settings)
    for leftover in output_dir.glob("[0-9]*/.*.png"):  # of a run killed while it was writing
        leftover.unlink(missing_ok=True)
