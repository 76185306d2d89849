"""Write files so that a killed run never leaves half of one behind, and read them back safely."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from .errors import DataError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it on success and vanishes on any failure.

    Raises:
        DataError: The disk is full or the folder cannot be written; what stood at `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"Could not write {path}: {error.strerror or error}. Free some space or choose another folder, "
            "then run the same command again: finished work is kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `folder` that becomes it on success and vanishes on any failure.

    Where another process has made `folder` meanwhile, that one stays.

    Raises:
        DataError: The disk is full or the place cannot be written.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(folder)
    except OSError as error:
        if folder.is_dir():  # made by another process in the meantime
            return
        raise DataError(
            f"Could not write {folder}: {error.strerror or error}. Free some space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: The file is absent or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"Expected a file at {path}, found none.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"Expected JSON in {path}, found something else ({error}).") from error


def typed(kind: Any, value: Any) -> Any:
    """A value read from JSON, as the type it should have.

    Args:
        kind: str, int, bool, float (a finite one), a dataclass of such types, or list[T], tuple[T, ...], T | None of
            them; dict[str, Any] is any object.
        value: As `read_json` returns it.

    Raises:
        TypeError: It is of another type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = _type_hints(kind)
        return kind(**{name: typed(hints.get(name, str), item) for name, item in value.items()})
    if origin in (list, tuple) and isinstance(value, list):
        return origin(typed(arguments[0], item) for item in value)
    if origin is types.UnionType:
        return None if value is None else typed(arguments[0], value)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is not float and type(value) is (origin or kind):
        return value
    name = "a finite number" if kind is float else getattr(kind, "__name__", str(kind))
    raise TypeError(f"expected {name}, got {repr(value)[:40]}")


_type_hints = functools.cache(get_type_hints)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors.torch import save_file  # imports torch, which reports do without

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_safetensors(path, lambda temporary: save_file(contiguous, temporary, metadata=dict(metadata or {})))


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write numpy arrays as safetensors, atomically."""
    from safetensors.numpy import save_file

    contiguous = {name: array.copy(order="C") for name, array in arrays.items()}  # the file has no strides
    _write_safetensors(path, lambda temporary: save_file(contiguous, temporary, metadata={}))


def _write_safetensors(path: Path, save: Callable[[Path], object]) -> None:
    with atomic_path(path) as temporary:
        try:
            save(temporary)
        except SafetensorError as error:  # safetensors hides the operating system's error in its own
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        DataError: The file is absent or damaged.
    """
    from safetensors.torch import load_file

    return _read_safetensors(path, load_file)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read a safetensors file as numpy arrays.

    Raises:
        DataError: The file is absent or damaged.
    """
    from safetensors.numpy import load_file

    return _read_safetensors(path, load_file)


def _read_safetensors(path: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return load(path)
    except FileNotFoundError as error:
        raise DataError(f"Expected a file at {path}, found none.") from error
    except SafetensorError as error:
        raise DataError(
            f"Expected safetensors in {path}, found something else ({error}). Delete it and run again."
        ) from error


def save_image(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` (for example `figure.savefig`) write a picture, atomically."""
    with atomic_path(path) as temporary:
        save(temporary)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file truly lies in a folder, links followed, so that what the folder's owner names stays in it.

    A snapshot in the hub's cache consists of links to blobs beside it: these count as inside.
    """
    real, home = (Path(os.path.realpath(place)) for place in (path, folder))
    snapshots = next((place for place in home.parents if place.name == "snapshots"), None)
    homes = [home] if snapshots is None else [home, snapshots.parent / "blobs"]
    return any(real.is_relative_to(place) for place in homes)


def fingerprint(*parts: str | bytes) -> str:
    """A 16-hex-digit digest of `parts`, sensitive to where one part ends and the next begins."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


def weights_digest(module: torch.nn.Module) -> str:
    """16 hex digits that identify all weights of a module, their names, types and shapes.

    Adapters (LoRAs) count with their weights, their strengths and whether they are on, and so does FreeU. Weights that
    are offloaded to nowhere (sequential offload) count by name and shape only.
    """
    import torch

    switches = ("active_adapters", "scaling", "disable_adapters", "merged", "b1", "b2", "s1", "s2")
    parts: list[str] = []
    for name, part in sorted(module.named_modules()):
        states = {switch: getattr(part, switch, None) for switch in switches}
        kept = {switch: state for switch, state in states.items() if isinstance(state, dict | list | float | int)}
        if kept:
            parts.append(f"{name} {kept!r}")
    for name, tensor in sorted(module.state_dict().items()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        if not tensor.is_meta:
            raw = tensor.detach().cpu().contiguous().flatten()
            parts.append(hashlib.sha256(raw.view(torch.uint8).numpy()).hexdigest())
    return fingerprint(*parts)


def default_cache_dir() -> Path:
    """The folder where latents and measurements are kept: `$INVDIFF_CACHE`, or `~/.cache/invdiff`."""
    return Path(os.environ.get("INVDIFF_CACHE") or Path.home() / ".cache" / "invdiff")
