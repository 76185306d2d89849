"""Turn captioned images into latents and prompt embeddings, once, and keep them on disk."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..distributed import is_main, mine, wait
from ..errors import ConfigError, DataError, ModelError
from ..files import default_cache_dir, fingerprint, read_tensors, weights_digest, write_tensors
from ..models.families import Condition, family_of, family_that_draws
from ..models.families.base import joined
from ..models.load import denoiser_of, note_cut
from ..models.watch import check_finite
from ..progress import note, progress_bar
from .captioned import CaptionedImages, check_readable
from .images import UnreadableImage, about_unreadable

SHARD_SIZE = 512  # rows (images, or captions) in one file of the cache; a killed run loses at most one such file
_FORMAT = "4"
_DECODERS = min(8, os.cpu_count() or 1)


class ShardedTensor:
    """The rows of one tensor in several parts, such as memory-mapped files: only rows asked for are read.

    Index it as a tensor's first dimension, with a list or LongTensor of rows in any order, or a slice.
    """

    def __init__(self, shards: Sequence[torch.Tensor]) -> None:
        self._shards = shards
        self._ends = torch.tensor([len(shard) for shard in shards], dtype=torch.long).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole, for latents (N, channels, height, width)."""
        return torch.Size((len(self), *self._shards[0].shape[1:]))

    def __getitem__(self, indices: slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        chosen = indices.cpu() if isinstance(indices, torch.Tensor) else indices
        rows = torch.arange(len(self))[chosen].contiguous()
        shard_of = torch.searchsorted(self._ends, rows, right=True)
        result = torch.empty((len(rows), *self.shape[1:]), dtype=self._shards[0].dtype)
        for number in shard_of.unique().tolist():
            here = shard_of == number
            result[here] = self._shards[number][rows[here] - self._ends[number]]  # counted from the shard's end
        return result

    def numpy(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows (n,), in any order, in 32 bits."""
        return self[torch.from_numpy(rows)].float().numpy()


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """The view of a data set that audit and training have: latents and prompt embeddings, no attributes."""

    latents: ShardedTensor
    """Scaled latents, float32 on the CPU; `latents[rows]` is (batch, channels, height, width)."""
    captions: list[str]
    """The different captions, in order of first appearance."""
    caption_ids: torch.Tensor
    """(N,) the caption of each image, as an index into `captions`."""
    conditions: Condition
    """The denoiser's condition for each caption, and in the last row (`null_id`) for none, on the CPU: tensors of
    num_captions + 1 rows. Empty for an unconditional model."""
    names: list[str]
    """The name of each image."""
    source_index: torch.Tensor
    """(N,) the row of each image in the `CaptionedImages` it came from."""
    model_fingerprint: str
    data_fingerprint: str
    resolution: int
    """Side of the squares that the images were cut to, in pixels."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Name to reason of the images that could not be read and were left out."""
    unrelated: Condition = field(default_factory=dict)
    """The condition of captions that have nothing to do with the images, on the CPU; empty where none is given."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def null_id(self) -> int:
        """The row of `conditions` for no caption."""
        return len(self.captions)

    def condition(self, captions: torch.Tensor) -> Condition:
        """Conditions of captions (rows,), given as indices into `captions`, or `null_id`."""
        return {name: values[captions] for name, values in self.conditions.items()}


@torch.no_grad()
def as_encoded(
    pipe: DiffusionPipeline,
    data: CaptionedImages | EncodedImages,
    cache_dir: str | Path | None = None,
    *,
    resolution: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> EncodedImages:
    """Encode every image and every different caption, unless `data` is encoded or an earlier run left its work.

    It is kept in files of `SHARD_SIZE` rows under `cache_dir`, or `default_cache_dir()`, which different models, data
    and resolutions share. Images are cut to a central square of `resolution` pixels, 0 for the model's own; unreadable
    ones are left out, up to the share that `data` allows, and named on the terminal. `ConfigError` where the model
    cannot have this resolution, or encoded images have another.
    """
    if isinstance(data, EncodedImages):
        if resolution not in (0, data.resolution):
            raise ConfigError(f"Expected images encoded at resolution {resolution}, got {data.resolution}.")
        return data
    family, denoiser = family_that_draws(pipe), denoiser_of(pipe)
    family.check_resolution(denoiser, resolution)
    resolution = resolution or family.resolution(pipe, denoiser)
    model = model_fingerprint(pipe)
    home = Path(cache_dir) if cache_dir else default_cache_dir()
    folder = home / "latents" / fingerprint(_FORMAT, model, data.fingerprint, str(resolution))
    lost: dict[Path, dict[str, str]] = {}  # name and reason of the images that cannot be read, by file

    def check() -> dict[str, str]:
        skipped = {name: reason for some in lost.values() for name, reason in some.items()}
        try:
            check_readable(data, skipped)
        except DataError:
            for path in (path for path, some in lost.items() if some):
                path.unlink(missing_ok=True)  # to be tried again, as where a plug-in for a format is installed
            raise
        return skipped

    def images(path: Path, rows: Sequence[int]) -> None:
        if not path.exists():
            _write_latents(path, pipe, data, rows, resolution, batch_size)
        lost[path] = _read_latents(path, data)[1]
        check()

    def prompts(path: Path, part: Sequence[str]) -> None:
        if not path.exists():
            write_tensors(path, joined([encode_captions(pipe, some) for some in _batches(part, batch_size)]))

    paths = in_files(folder / "latents", range(len(data)), images, "encoding images", progress=progress)
    shards, per_shard = zip(*(_read_latents(path, data) for path in paths), strict=True)
    lost = dict(zip(paths, per_shard, strict=True))
    if skipped := check():
        note(about_unreadable(skipped, len(data)))
    source_index = torch.cat([shard["rows"] for shard in shards])
    used = [data.captions[row] if family.needs_prompts else "" for row in source_index.tolist()]
    captions = list(dict.fromkeys(used))
    conditions: Condition = {}
    if family.needs_prompts:
        note_cut(pipe, captions)
        paths = in_files(folder / "prompts", captions, prompts, "encoding captions", progress=progress)
        null = folder / "null.safetensors"
        if is_main() and not null.exists():
            write_tensors(null, checked(family.null_condition(pipe), ["no caption"]))
        wait()
        conditions = joined([read_tensors(path) for path in (*paths, null)])
    number = {caption: index for index, caption in enumerate(captions)}
    return EncodedImages(
        latents=ShardedTensor([shard["latents"] for shard in shards if "latents" in shard]),
        captions=captions,
        caption_ids=torch.tensor([number[caption] for caption in used]),
        conditions=conditions,
        names=[data.names[row] for row in source_index.tolist()],
        source_index=source_index,
        model_fingerprint=model,
        data_fingerprint=data.fingerprint,
        resolution=resolution,
        unreadable=skipped,
    )


@torch.no_grad()
def encode_captions(pipe: DiffusionPipeline, captions: Sequence[str]) -> Condition:
    """Conditions of a few captions, one row each, on the CPU; nothing is cached."""
    encoded = family_of(pipe).encode_captions(pipe, captions)
    return {name: value.cpu() for name, value in checked(encoded, captions).items()}


def checked(condition: Condition, captions: Sequence[str]) -> Condition:
    """`condition` of `captions`, one row each; `ModelError` where it is not finite."""
    for values in condition.values():
        check_finite(values, "text encoder", [f"caption {caption!r}" for caption in captions])
    return condition


def model_fingerprint(pipe: Any) -> str:
    """16 hex digits of the weights of a pipeline's autoencoder and text encoders, not of its denoiser or scheduler.

    `ModelError` where they are not in memory (sequential offload).
    """
    family = family_of(pipe)
    parts: list[str] = [type(family).__name__, *family.encoding_key(pipe)]
    where_it_came_from = ("transformers_version", "dtype", "torch_dtype")
    for name, component in sorted(pipe.components.items()):
        if name.startswith("tokenizer") and component is not None:
            parts += [name, json.dumps(component.get_vocab(), sort_keys=True), str(component.model_max_length)]
        elif isinstance(component, torch.nn.Module) and name.startswith(("vae", "text_encoder")):
            if any(weight.is_meta for weight in component.parameters()):
                raise ModelError(f"Expected the weights of {name} in memory, found them offloaded. Encode before.")
            config: Any = component.config
            values = config.to_dict() if hasattr(config, "to_dict") else config
            kept = {k: v for k, v in values.items() if not k.startswith("_") and k not in where_it_came_from}
            parts += [name, json.dumps(kept, sort_keys=True, default=str), weights_digest(component)]
    return fingerprint(*parts)


def pixel_values(image: Image.Image, resolution: int) -> torch.Tensor:
    """Resize the shortest side and crop the centre: (3, resolution, resolution) in -1 to 1."""
    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1)
    return pixels / 127.5 - 1


def in_files(
    place: Path, items: Any, work: Callable[[Path, Any], None], label: str, *, progress: bool, size: int = 0
) -> list[Path]:
    """Files of `size` items each, such as `place-00000.safetensors`, that `work` makes and processes share."""
    parts = _batches(items, size or SHARD_SIZE)
    paths = [place.with_name(f"{place.name}-{number:05d}.safetensors") for number in range(len(parts))]
    share = mine(list(zip(paths, parts, strict=True)))
    with progress_bar(label, sum(len(part) for _, part in share), enabled=progress) as bar:
        for path, part in share:
            work(path, part)
            bar.advance(len(part))
    wait()
    return paths


def _write_latents(
    path: Path, pipe: Any, data: CaptionedImages, rows: Sequence[int], resolution: int, batch_size: int
) -> None:
    """Write the latents of the images that can be read, their rows, and row and reason of the others."""

    def load(row: int) -> tuple[int, torch.Tensor | UnreadableImage]:
        try:
            return row, pixel_values(data.image(row), resolution)
        except UnreadableImage as error:
            return row, error

    family = family_of(pipe)
    latents: list[torch.Tensor] = []
    read: list[int] = []
    skipped: dict[int, str] = {}
    with ThreadPoolExecutor(_DECODERS) as pool:
        for batch in _batches(rows, batch_size):
            loaded = dict(pool.map(load, batch))
            skipped |= {row: item.reason for row, item in loaded.items() if isinstance(item, UnreadableImage)}
            pixels = {row: item for row, item in loaded.items() if isinstance(item, torch.Tensor)}
            if pixels:
                read += pixels
                latents.append(family.encode_images(pipe, torch.stack([*pixels.values()])))
                check_finite(latents[-1], "autoencoder", [f"image {data.names[row]}" for row in pixels])
    tensors = {"rows": torch.tensor(read, dtype=torch.long)} | ({"latents": torch.cat(latents)} if latents else {})
    listed = json.dumps(list(skipped.items())).encode()  # a tensor too: entries of metadata are in no fixed order
    write_tensors(path, tensors | {"skipped": torch.tensor(list(listed), dtype=torch.uint8)})


def _read_latents(path: Path, data: CaptionedImages) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Rows and latents of one file, memory-mapped, and name and reason of the images that could not be read."""
    tensors = read_tensors(path)
    skipped = json.loads(bytes(tensors.pop("skipped").tolist()))
    return tensors, {data.names[row]: reason for row, reason in skipped}


def _batches(items: Any, size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]
