"""Draw images of prompts, with or without a guidance module, from starting noise that follows from prompt and seed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .config import GenerateConfig
from .data.captioned import CaptionedImages, load_captioned_images
from .distributed import is_main, mine, wait
from .errors import ConfigError, ModelError, check_kinds
from .files import check_same_settings, fingerprint, recorded, save_image, weights_digest, write_json, write_text
from .guidance.attach import Attachment, check_fit, mix_for
from .guidance.base import Guidance
from .guidance.environments import WORDS, EnvironmentMix, Environments
from .models.families import family_of, family_that_draws
from .models.load import check_fused, check_plain, denoiser_of, note_cut
from .models.watch import check_finite, watched
from .options import command_options
from .progress import progress_bar
from .seeds import derived_seed

MANIFEST = "manifest.jsonl"
SETTINGS = "generate.json"
_CHUNK = "invdiff"  # the PNG text chunk that holds an image's row of the manifest


class Drawing:
    """The images of `generate`, in memory: `rows` of a manifest, and the images of any of them.

    Draw inside a `with` block, which may be entered several times; outside it the pipeline is as it was. Arguments and
    errors are those of `generate`; the model must have no module attached yet.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        module: Guidance | None = None,
        config: GenerateConfig | None = None,
        environments: Environments = "uniform",
    ) -> None:
        check_kinds(config=(config, GenerateConfig | None))
        check_plain(pipe)
        self.pipe, self.module, self._family = pipe, module, family_that_draws(pipe)
        if needed := [name for name in ("image", "mask_image") if name in inspect.signature(pipe.__call__).parameters]:
            raise ModelError(
                f"Expected a pipeline that draws from prompts alone, got a {type(pipe).__name__}, which starts from "
                f"{' and '.join(needed)}. Load the text-to-image pipeline of the same model."
            )
        self.config = config or GenerateConfig()
        if self.config.guidance_scale != 1 and not self._family.reads_guidance(denoiser_of(pipe)):
            of, scale = self._family.title, f"{self.config.guidance_scale:g}"
            raise ConfigError(f"Expected guidance_scale 1, as this model ({of}) reads none, got {scale}. Take 1.")
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(f"Expected a list of prompts, got {prompts!r}.")
        self.prompts = list(prompts) if prompts or self._family.needs_prompts else [""]
        if not self.prompts:
            raise ConfigError("Expected at least one prompt, got none.")
        if twice := [prompt for index, prompt in enumerate(prompts) if prompt in prompts[:index]]:
            raise ConfigError(f"Expected different prompts, got {twice[0]!r} again. Raise images_per_prompt instead.")
        self._family.check_drawn(pipe, self.prompts, self.config.resolution)
        calibrated = isinstance(environments, str) and environments == "calibrated"
        if module is not None:
            check_fit(pipe, module)
            module.check_scale(self.config.scale)
            if calibrated and not (module.sees_environment and self.config.scale == 1):
                raise ConfigError("Expected a balanced module at scale 1 for 'calibrated', got another. Leave it out.")
            self._mix = mix_for(module, "uniform" if calibrated else environments)
        elif not (isinstance(environments, str) and environments in WORDS):
            raise ConfigError(f"Expected a module beside environments, got {environments!r} and no module.")
        self.calibrated: list[list[list[float]]] = []  # of each prompt and factor, where each prompt has its own mix
        self.mix = self._mix if module is not None and module.sees_environment else None  # where groups have an effect
        each, total = self.config.images_per_prompt, len(self.prompts) * self.config.images_per_prompt
        self.rows: list[dict[str, Any]] = [
            {
                "file_name": f"{index:05d}/{image:06d}.png",
                "prompt": prompt,
                "seed": derived_seed("generate", self.config.seed, prompt, image) & 0xFFFFFFFF,
                "environment": None,
                "scale": self.config.scale if module is not None else 0.0,
                "guidance_scale": self.config.guidance_scale,
                "num_inference_steps": self.config.num_inference_steps,
            }
            for index, prompt in enumerate(self.prompts)
            for image in range(each)
        ]
        if self.mix is None:
            return
        if (groups := self.mix.given) is None:
            seeds = [str(row["seed"]) for row in self.rows]
            if calibrated and module is not None:
                self.calibrated = [module.calibrated(prompt, self.config.guidance_scale) for prompt in self.prompts]
            mixes = [EnvironmentMix(of, self.mix.num_groups) for of in self.calibrated] or [self.mix] * total
            groups = torch.cat([mixes[k // each].draw(seeds[k : k + each]) for k in range(0, total, each)])
        elif len(groups) not in (each, total):
            raise ConfigError(
                f"Expected groups for {each} images (of every prompt alike) or for all {total}, got {len(groups)}."
            )
        for row, group in zip(self.rows, groups.repeat(total // len(groups), 1).tolist(), strict=True):
            row["environment"] = group

    def __enter__(self) -> Drawing:
        self._attachment = Attachment(self.pipe, self.module, self.config.scale, self._mix) if self.module else None
        self._progress = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(disable=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.pipe.set_progress_bar_config(**self._progress)
        if self._attachment is not None:
            self._attachment.detach()

    def batches(self) -> list[range]:
        """The places in `rows` of each batch: the last bits of an image depend on the others of its batch."""
        places, size = range(len(self.rows)), self.config.batch_size
        return [places[start : start + size] for start in places[::size]]

    @torch.no_grad()
    def batch(self, places: Sequence[int]) -> list[Image.Image]:
        """Draw one batch: the images of these places in `rows`."""
        rows = [self.rows[place] for place in places]
        if self._attachment is not None and self.mix is not None:
            self._attachment.mix = torch.tensor([row["environment"] for row in rows])
        generators = [torch.Generator().manual_seed(row["seed"]) for row in rows]
        names = [f"prompt {row['prompt']!r}, seed {row['seed']}" for row in rows]
        with watched(self.pipe, generators, names):
            output = self._family.draw(
                self.pipe,
                [row["prompt"] for row in rows],
                guidance_scale=self.config.guidance_scale,
                resolution=self.config.resolution,
                generator=generators,
                num_inference_steps=self.config.num_inference_steps,
                output_type="pt",
            )
        check_finite(output.images, "pipeline", names)
        if any(getattr(output, "nsfw_content_detected", None) or ()):
            raise ModelError(
                "Expected images as the model draws them, but the safety checker blackened some. Load the pipeline "
                "with safety_checker=None."
            )
        return self.pipe.numpy_to_pil(output.images.cpu().permute(0, 2, 3, 1).float().numpy())


def generate(
    pipe: Any,
    prompts: Sequence[str],
    output_dir: str | Path,
    *,
    module: Guidance | None = None,
    config: GenerateConfig | None = None,
    environments: Environments = "uniform",
    progress: bool = True,
) -> Path:
    """Draw `config.images_per_prompt` images of each prompt into `output_dir` and return that folder.

    Writes `<prompt index>/<image index>.png`, `manifest.jsonl` with one row per image ("file_name", "prompt", "seed",
    "environment", "scale", "guidance_scale", "num_inference_steps"), and `generate.json` with the settings. An
    interrupted run continues where it stopped, to the same bytes; asked for more images of each prompt, a finished one
    draws those that are missing. Several processes share it by batches.

    The starting noise of image k of a prompt depends on the prompt, k and `config.seed` only, so images with
    and without a module can be compared one to one. So does "environment", its group of each factor: the target mix is
    spread over a prompt's images in order. It is null where it has no effect: without a module, or with an invariant
    one. "scale" is 0 without a module.

    Args:
        pipe: A diffusers pipeline that draws images of prompts, class names or nothing; it is left as it was.
        prompts: Different prompts, or class names; none for an unconditional model.
        output_dir: A new folder, or that of a run to continue.
        module: A guidance module made for this pipeline; None draws from the plain model.
        config: Numbers of images and steps, scales, seed.
        environments: `"uniform"`, `"calibrated"` (see `calibrate`), `"iid"`, proportions, also by factor, or groups as
            for `attach`; groups are given for each image, prompt by prompt (prompts x images_per_prompt), or for the
            images of every prompt alike (images_per_prompt).
        progress: Show a progress bar.

    Raises:
        ConfigError: Prompts or environments cannot be used, or `output_dir` holds something else, or images of other
            settings.
        ModelError: The module was trained for another model, a safety checker blackens images, images are not
            finite, or the scheduler draws noise that does not follow from the seeds.
        DataError: The disk is full or the folder cannot be written.
    """
    drawing = Drawing(pipe, prompts, module=module, config=config, environments=environments)
    note_cut(pipe, drawing.prompts)
    rows, output_dir = drawing.rows, Path(output_dir)
    if is_main():
        _open_folder(output_dir, drawing)
    wait()
    done = [_is_drawn(output_dir, row) for row in rows]
    # A batch is drawn whole or not at all.
    missing = [batch for batch in mine(drawing.batches()) if not all(done[place] for place in batch)]
    start = len(rows) - sum(map(len, missing))
    with drawing, progress_bar("generating", len(rows), start=start, enabled=progress) as bar:
        for batch in missing:
            for place, image in zip(batch, drawing.batch(batch), strict=True):
                chunk = PngInfo()
                chunk.add_text(_CHUNK, json.dumps(rows[place]))
                save_image(output_dir / rows[place]["file_name"], partial(image.save, format="PNG", pnginfo=chunk))
            bar.advance(len(batch))
    wait()
    if is_main():
        write_text(output_dir / MANIFEST, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    wait()
    return output_dir


def own_images(pipe: Any, audited: Mapping[str, Any], cache_dir: Path, *, progress: bool = True) -> CaptionedImages:
    """The images that the model itself draws for an audit with these settings, into the cache or read back from it.

    The same model and settings give the same bytes.
    """
    check_fused(pipe)
    prompts, family = audited["own_images_of"], family_of(pipe)
    if family.needs_prompts and not all(prompt.strip() for prompt in prompts):
        raise ConfigError("Expected prompts with words in them, got an empty one. Leave it out.")
    settings = {name: audited[name] for name in ("images_per_prompt", "guidance_scale", "seed")}
    settings["resolution"] = audited["resolution"] or family.resolution(pipe, denoiser_of(pipe))
    config = GenerateConfig(**settings)
    made_of = json.dumps(_settings(Drawing(pipe, prompts, config=config)), sort_keys=True)
    folder = generate(pipe, prompts, cache_dir / "own" / fingerprint(made_of), config=config, progress=progress)
    if is_main():
        write_text(folder / "metadata.jsonl", (folder / MANIFEST).read_text("utf-8"))
    wait()
    return load_captioned_images(folder, captions=family.needs_prompts)


def drawing_flags(pipe: Any, resolution: int, distilled_guidance: float = 0.0) -> list[str]:
    """The options that `invdiff generate` needs to draw as the module was trained: often none."""
    family, denoiser = family_of(pipe), cast(Any, denoiser_of(pipe))
    scale = GenerateConfig.guidance_scale if family.reads_guidance(denoiser) else 1.0
    if distilled_guidance and denoiser.config.get("guidance_embeds"):
        scale = distilled_guidance
    other = 0 if resolution == family.resolution(pipe, denoiser) else resolution
    return command_options(GenerateConfig, {"guidance_scale": scale, "resolution": other})


def _is_drawn(output_dir: Path, row: dict[str, Any]) -> bool:
    """Whether an earlier run drew the image of this row of the manifest, and it is whole."""
    try:
        with Image.open(output_dir / row["file_name"]) as image:
            image.verify()  # checksums, which Pillow skips where it reads the pixels
        with Image.open(output_dir / row["file_name"]) as image:
            image.load()
            return bool(json.loads(image.info[_CHUNK]) == row)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return False


def _open_folder(output_dir: Path, drawing: Drawing) -> None:
    """Make the folder and record in it all that images depend on, or check that it agrees with what is recorded."""
    path, settings = output_dir / SETTINGS, _settings(drawing)
    if (earlier := recorded(output_dir, "generate")) is None:
        write_json(path, earlier := settings)
    more = {"images_per_prompt": drawing.config.images_per_prompt}
    if earlier | more == settings and earlier.get("images_per_prompt", 0) < drawing.config.images_per_prompt:
        (output_dir / MANIFEST).unlink(missing_ok=True)  # a group that is spread over more images may be another
        write_json(path, settings)
    else:
        check_same_settings(output_dir, earlier, settings)
    for leftover in output_dir.glob("[0-9]*/.*.png"):  # of a run killed while it was writing
        leftover.unlink(missing_ok=True)


def _settings(drawing: Drawing) -> dict[str, Any]:
    """All that images depend on, in JSON types."""
    pipe, module, mix = drawing.pipe, drawing.module, drawing.mix
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    networks: dict[str, Any] = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    weights = fingerprint(*(name + weights_digest(network) for name, network in sorted(networks.items())))
    schedule = fingerprint(json.dumps(scheduler, sort_keys=True, default=str))
    targets: Any = mix and (drawing.calibrated or [shares.tolist() for shares in mix.proportions])
    targets = targets or (mix and [row["environment"] for row in drawing.rows])
    null = None if module is None else module.config["null_adapter"]
    return {
        "prompts": drawing.prompts,
        **drawing.config.to_dict(),
        "module": None if module is None else weights_digest(cast(torch.nn.Module, module)),
        "null_adapter": None if module is None or null == module.auto_null else null,
        "environments": targets,
        "draws": None if mix is None or mix.given is not None else "iid" if mix.iid else "stratified",
        "model": f"{type(pipe).__name__} {weights}",
        "scheduler": f"{type(pipe.scheduler).__name__} {schedule}",
    }
