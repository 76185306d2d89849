"""Turn captioned images into latents and prompt embeddings, once, and keep them on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open

from ..errors import ConfigError, DataError, ModelError
from ..files import default_cache_dir, fingerprint, read_tensors, weights_digest, write_json, write_tensors
from ..pipelines import denoiser_of
from ..progress import progress_bar
from .captioned import CaptionedImages, UnreadableImage

SHARD_SIZE = 512
"""Rows (images, or captions) in one file of the cache; a killed run loses at most one such file."""
_FORMAT = "1"
_NULL_CAPTION = ""
_DECODERS = min(8, os.cpu_count() or 1)


class ShardedTensor:
    """The rows of one tensor spread over safetensors files, memory-mapped: only rows asked for are read.

    Index it with a list or LongTensor of rows in any order, a slice, or one row number.
    """

    def __init__(self, paths: Sequence[Path], key: str, lengths: Sequence[int]) -> None:
        self._paths, self._key = list(paths), key
        self._ends = torch.tensor(lengths, dtype=torch.long).cumsum(0)
        self._shards: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole, for latents (N, channels, height, width)."""
        return torch.Size((len(self), *self._shard(0).shape[1:]))

    def __getitem__(self, indices: int | slice | Iterable[int] | torch.Tensor) -> torch.Tensor:
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        rows = torch.as_tensor(indices if isinstance(indices, int | torch.Tensor) else list(indices))
        if rows.dtype == torch.bool:
            raise TypeError("expected row numbers, got a mask; use mask.nonzero().flatten()")
        rows = rows.long().cpu()
        flat = torch.where(rows < 0, rows + len(self), rows).flatten()
        if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= len(self)):
            raise IndexError(f"expected rows below {len(self)}, got {int(rows.min())} to {int(rows.max())}")
        shard_of = torch.searchsorted(self._ends, flat, right=True)
        result = torch.empty((len(flat), *self.shape[1:]), dtype=self._shard(0).dtype)
        for number in shard_of.unique().tolist():
            here = shard_of == number
            shard = self._shard(number)
            result[here] = shard[flat[here] - (self._ends[number] - len(shard))]
        return result.reshape(*rows.shape, *result.shape[1:])

    def _shard(self, number: int) -> torch.Tensor:
        if number not in self._shards:
            self._shards[number] = read_tensors(self._paths[number])[self._key]
        return self._shards[number]


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """What audit and training see of a data set: latents and prompt embeddings, no attributes."""

    latents: ShardedTensor
    """Scaled latents, float32 on the CPU; `latents[rows]` is (batch, channels, height, width)."""
    captions: list[str]
    """The different captions, in order of first appearance."""
    caption_ids: torch.Tensor
    """(N,) the caption of each image, as an index into `captions`."""
    prompt_embeds: torch.Tensor
    """(num_captions, length, dim) in the type of the text encoder, on the CPU."""
    null_embeds: torch.Tensor
    """(length, dim) of the empty caption."""
    names: list[str]
    """The name of each image."""
    source_index: torch.Tensor
    """(N,) the row of each image in the `CaptionedImages` it came from."""
    skipped: list[tuple[str, str]]
    """Name and reason of every image that could not be read."""
    model_fingerprint: str
    data_fingerprint: str

    def __len__(self) -> int:
        return len(self.names)


def encode(
    pipe: DiffusionPipeline,
    data: CaptionedImages,
    cache_dir: str | Path,
    *,
    resolution: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> EncodedImages:
    """Encode every image and every different caption, or read them back where an earlier run left them.

    Work is kept in files of `SHARD_SIZE` rows under `cache_dir`; a run that was stopped goes on where it was.
    Images that cannot be read are skipped and listed in the cache's index.json.

    Args:
        pipe: The pipeline, on the device that shall do the work.
        data: From `load_captioned_images`.
        cache_dir: Different models, data and resolutions share it without meeting.
        resolution: Pixels; images are cut to a central square and resized. The model's own unless given.
        batch_size: Images or captions encoded at once.
        progress: Show progress bars.

    Raises:
        DataError: More than `data.max_unreadable` of the images cannot be read, or the cache not written.
        ConfigError: `resolution` does not fit the pipeline's autoencoder.
        ModelError: The pipeline is of a family that has no prompt encoder here yet.
    """
    encode_prompts = _prompt_encoder(pipe)
    resolution = _resolution(pipe, resolution)
    model, dataset = model_fingerprint(pipe), data.fingerprint
    folder = Path(cache_dir) / fingerprint(_FORMAT, model, dataset, str(resolution))

    images = _encode_images(pipe, data, folder, resolution, batch_size, progress)
    source_index = torch.cat([shard.rows for shard in images])
    used = [data.captions[row] for row in source_index.tolist()]
    captions = list(dict.fromkeys(used))
    caption_index = {caption: index for index, caption in enumerate(captions)}
    embeds = _encode_captions([_NULL_CAPTION, *captions], encode_prompts, folder, batch_size, progress)

    skipped = [item for shard in images for item in shard.skipped]
    index = {
        "model_fingerprint": model,
        "data_fingerprint": dataset,
        "resolution": resolution,
        "num_images": len(used),
        "captions": captions,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
    }
    write_json(folder / "index.json", index)
    filled = [shard for shard in images if len(shard.rows)]
    return EncodedImages(
        latents=ShardedTensor([s.path for s in filled], "latents", [len(s.rows) for s in filled]),
        captions=captions,
        caption_ids=torch.tensor([caption_index[caption] for caption in used]),
        prompt_embeds=embeds["prompt_embeds"][1:],
        null_embeds=embeds["prompt_embeds"][0],
        names=[data.names[row] for row in source_index.tolist()],
        source_index=source_index,
        skipped=skipped,
        model_fingerprint=model,
        data_fingerprint=dataset,
    )


def as_encoded(
    pipe: DiffusionPipeline,
    data: CaptionedImages | EncodedImages,
    cache_dir: str | Path | None = None,
    *,
    progress: bool = True,
) -> EncodedImages:
    """Return `data` encoded, by `encode` unless it is already."""
    if isinstance(data, EncodedImages):
        return data
    return encode(pipe, data, (Path(cache_dir) if cache_dir else default_cache_dir()) / "latents", progress=progress)


@torch.no_grad()
def encode_captions(pipe: DiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """Return the embeddings of a few captions, (captions, length, dim), on the CPU; nothing is cached."""
    return _prompt_encoder(pipe)(list(captions))["prompt_embeds"].cpu()


def model_fingerprint(pipe: DiffusionPipeline) -> str:
    """Return 16 hex digits that name what encodes images and captions: the autoencoder and the text encoders.

    Their weights are hashed whole, since a fine-tune may change a single row of an embedding table. The
    denoiser and the scheduler do not matter here, so models that differ only there share one cache.

    Raises:
        ModelError: The weights are not in memory (sequential offload).
    """
    components: dict[str, Any] = pipe.components  # type: ignore[attr-defined]
    parts: list[str] = []
    for name, component in sorted(components.items()):
        if name.startswith("tokenizer") and component is not None:
            parts += [
                name,
                json.dumps(component.get_vocab(), sort_keys=True),
                str(component.model_max_length),
            ]
        elif isinstance(component, torch.nn.Module) and name.startswith(("vae", "text_encoder")):
            parts += [name, json.dumps(_config_of(component), sort_keys=True, default=str)]
            if any(weight.is_meta for weight in component.parameters()):
                raise ModelError(f"Expected the weights of {name} in memory, found them offloaded. Encode before.")
            parts.append(weights_digest(component))
    return fingerprint(*parts)


def to_pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """Resize the shortest side and crop the centre: (3, resolution, resolution) in -1 to 1."""
    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1)
    return pixels / 127.5 - 1


@dataclass(frozen=True)
class _ImageShard:
    path: Path

    @cached_property
    def rows(self) -> torch.Tensor:
        with self._open() as file:
            return file.get_tensor("rows")

    @cached_property
    def skipped(self) -> list[tuple[str, str]]:
        with self._open() as file:
            return [(name, reason) for name, reason in json.loads(file.metadata()["skipped"])]

    def _open(self) -> Any:
        try:
            return safe_open(self.path, "pt")
        except SafetensorError as error:
            raise DataError(
                f"Expected safetensors in {self.path}, found something else ({error}). Delete it and run again."
            ) from error


def _encode_images(
    pipe: DiffusionPipeline,
    data: CaptionedImages,
    folder: Path,
    resolution: int,
    batch_size: int,
    progress: bool,
) -> list[_ImageShard]:
    shards: list[_ImageShard] = []
    num_skipped = 0
    with progress_bar("encoding images", len(data), enabled=progress) as bar:
        for start in range(0, len(data), SHARD_SIZE):
            rows = range(start, min(start + SHARD_SIZE, len(data)))
            shard = _ImageShard(folder / f"latents-{start // SHARD_SIZE:05d}.safetensors")
            if not shard.path.exists():
                _write_image_shard(pipe, data, rows, shard.path, resolution, batch_size)
            shards.append(shard)
            num_skipped += len(shard.skipped)
            bar.advance(len(rows))
            if num_skipped > data.max_unreadable * len(data) or num_skipped == len(data):
                first = [f"{name} ({reason})" for one in shards for name, reason in one.skipped][:5]
                raise DataError(
                    f"Expected at most {data.max_unreadable:.1%} of {len(data)} images to be unreadable, found "
                    f"{num_skipped} ({num_skipped / len(data):.1%}) among the first {rows.stop}: "
                    f"{', '.join(first)}. "
                    "Repair them, remove their rows, or raise max_unreadable."
                )
    return shards


def _write_image_shard(
    pipe: DiffusionPipeline,
    data: CaptionedImages,
    rows: Sequence[int],
    path: Path,
    resolution: int,
    batch_size: int,
) -> None:
    def load(row: int) -> torch.Tensor | UnreadableImage:
        try:
            return to_pixels(data.image(row), resolution)
        except UnreadableImage as error:
            return error

    latents: list[torch.Tensor] = []
    read: list[int] = []
    skipped: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_DECODERS) as pool:
        for batch in _batches(rows, batch_size):
            loaded = list(zip(batch, pool.map(load, batch), strict=True))
            skipped += [(item.name, item.reason) for _, item in loaded if isinstance(item, UnreadableImage)]
            pixels = [(row, item) for row, item in loaded if isinstance(item, torch.Tensor)]
            if pixels:
                read += [row for row, _ in pixels]
                latents.append(_to_latents(pipe, torch.stack([item for _, item in pixels])))
    tensors = {"rows": torch.tensor(read, dtype=torch.long)}
    if latents:
        tensors["latents"] = torch.cat(latents)
    write_tensors(path, tensors, metadata={"skipped": json.dumps(skipped)})


@torch.no_grad()
def _to_latents(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode (batch, 3, height, width) in -1 to 1, by the mode, so that each run gives the same bytes."""
    vae = pipe.vae
    output = vae.encode(pixels.to(pipe._execution_device, vae.dtype))
    latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((latents.float() - shift) * vae.config.scaling_factor).cpu()


PromptEncoder = Callable[[list[str]], dict[str, torch.Tensor]]
"""Captions to tensors of one row per caption, among them `prompt_embeds` (batch, length, dim)."""


def _prompt_encoder(pipe: DiffusionPipeline) -> PromptEncoder:
    """Return what encodes captions for this family of pipelines; another family is one more branch."""
    if isinstance(pipe, StableDiffusionPipeline):
        return lambda captions: _stable_diffusion_prompts(pipe, captions)
    raise ModelError(
        f"Expected a Stable Diffusion 1.x or 2.x pipeline, got a {type(pipe).__name__}, whose captions "
        "invdiff cannot encode yet. Use a StableDiffusionPipeline."
    )


def _stable_diffusion_prompts(pipe: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    embeds = pipe.encode_prompt(
        prompt=captions,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )[0]
    return {"prompt_embeds": embeds}


@torch.no_grad()
def _encode_captions(
    captions: list[str], encode_prompts: PromptEncoder, folder: Path, batch_size: int, progress: bool
) -> dict[str, torch.Tensor]:
    shards: list[dict[str, torch.Tensor]] = []
    with progress_bar("encoding captions", len(captions), enabled=progress) as bar:
        for start in range(0, len(captions), SHARD_SIZE):
            path = folder / f"prompts-{start // SHARD_SIZE:05d}.safetensors"
            chunk = captions[start : start + SHARD_SIZE]
            if not path.exists():
                batches = [encode_prompts(list(batch)) for batch in _batches(chunk, batch_size)]
                write_tensors(path, _joined([{k: v.cpu() for k, v in batch.items()} for batch in batches]))
            shards.append(read_tensors(path))
            bar.advance(len(chunk))
    return _joined(shards)


def _joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _resolution(pipe: Any, resolution: int | None) -> int:
    factor = pipe.vae_scale_factor
    if resolution is None:
        config: Any = denoiser_of(pipe).config
        sample_size = config.sample_size
        if not isinstance(sample_size, int):
            raise ConfigError(f"Expected a square model, got sample_size {sample_size!r}. Pass resolution=... .")
        return sample_size * factor
    if resolution < factor or resolution % factor:
        raise ConfigError(f"Expected a resolution that is a multiple of {factor}, got {resolution}.")
    return resolution


def _config_of(component: torch.nn.Module) -> dict[str, Any]:
    config: Any = component.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    where_it_came_from = ("transformers_version", "dtype", "torch_dtype")
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in where_it_came_from}


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
