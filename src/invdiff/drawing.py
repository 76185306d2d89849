"""Draw images of prompts from starting noise that follows from prompt, number and seed, a batch at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from .config import GenerateConfig
from .errors import ConfigError, ModelError
from .families import Family, family_of
from .guidance.attach import Attachment, attach, check_fit, mix_for
from .guidance.environments import EnvironmentMix, Environments
from .guidance.module import GuidanceModule
from .pipelines import check_plain
from .seeds import derived_seed


class Drawing:
    """What `generate` draws, in memory: rows of a manifest, and the images of any of them.

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
        rows: Each image's row of the manifest, as far as it is known before the image is drawn: its group is not.
        mix: The target mix; None where groups have no say.

    Raises:
        ConfigError: Prompts or environments cannot be used.
        ModelError: The module was trained for another model, or the pipeline is changed so that it cannot be compared.
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
        self.mix = _mix(module, environments, len(prompts), self.config.images_per_prompt)
        self.rows = _planned_rows(prompts, self.config, guided=module is not None)
        self._stack = contextlib.ExitStack()
        self._attachment: Attachment | None = None

    def __enter__(self) -> Drawing:
        self._stack.enter_context(_no_progress_bar(self._pipe))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._attachment = None
        self._stack.__exit__(*exception)

    def batches(self) -> list[range]:
        """Return the places in `rows` of each batch: the last bits of an image depend on those drawn beside it."""
        size = self.config.batch_size
        return [range(start, min(start + size, len(self.rows))) for start in range(0, len(self.rows), size)]

    @torch.no_grad()
    def batch(self, places: Sequence[int]) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        """Draw one batch; return its images, and their rows with the groups drawn.

        Raises:
            ModelError: A safety checker blackens images.
        """
        rows = [self.rows[place] for place in places]
        if self._module is not None and self._attachment is None:
            # The groups of single images are handed over batch by batch.
            target = self._environments if self.mix is None or self.mix.given is None else "uniform"
            self._attachment = self._stack.enter_context(attach(self._pipe, self._module, self.config.scale, target))
        if self._attachment is not None and self.mix is not None and self.mix.given is not None:
            self._attachment.mix = EnvironmentMix(self.mix.given[list(places)], self.mix.num_groups)
        images = self._call(rows)
        if self._attachment is not None and self.mix is not None:
            rows = _with_environments(rows, self._attachment)
        return images, rows

    def _call(self, rows: Sequence[dict[str, Any]]) -> list[Image.Image]:
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
    """Return the 32-bit seed of image number `image` of `prompt`."""
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


def _mix(
    module: GuidanceModule | None, environments: Environments, num_prompts: int, images_per_prompt: int
) -> EnvironmentMix | None:
    """Return the target mix, its `given` repeated for every prompt; None where groups have no say."""
    if module is None:
        if not (isinstance(environments, str) and environments == "uniform"):
            raise ConfigError(
                f"Expected a module beside environments, got environments={environments!r} and no module."
            )
        return None
    mix = mix_for(module, environments)
    if not module.sees_environment:
        return None
    if mix.given is not None:
        total = num_prompts * images_per_prompt
        if len(mix.given) not in (images_per_prompt, total):
            raise ConfigError(
                f"Expected groups for {images_per_prompt} images (of every prompt alike) or for all {total}, "
                f"got {len(mix.given)}."
            )
        mix.given = mix.given.repeat(total // len(mix.given), 1)
    return mix


def _planned_rows(prompts: Sequence[str], config: GenerateConfig, *, guided: bool) -> list[dict[str, Any]]:
    """Return the manifest's rows; the environments are not known before the images are drawn."""
    return [
        {
            "file_name": f"{index:05d}/{image:06d}.png",
            "prompt": prompt,
            "seed": image_seed(prompt, image, config.seed),
            "environment": None,
            "scale": float(config.scale) if guided else 0.0,
            "guidance_scale": float(config.guidance_scale),
            "num_inference_steps": config.num_inference_steps,
        }
        for index, prompt in enumerate(prompts)
        for image in range(config.images_per_prompt)
    ]


def _with_environments(rows: Sequence[dict[str, Any]], attachment: Attachment) -> list[dict[str, Any]]:
    assert attachment.environments is not None
    groups = attachment.environments[: len(rows)].tolist()  # further rows are those of guidance
    return [{**row, "environment": group} for row, group in zip(rows, groups, strict=True)]


@contextlib.contextmanager
def _no_progress_bar(pipe: Any) -> Iterator[None]:
    """Silence the pipeline's own bar while the block runs."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
