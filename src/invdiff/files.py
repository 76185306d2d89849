"""Write files so that a killed run never leaves half of one behind, and read them back safely."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .errors import ConfigError, DataError, found_else

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_DIGEST = "digest"  # of the contents, in the metadata of safetensors
_LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")
JUDGES, CURATION = "judges.safetensors", "curation.json"
"""Beside audit.json: the linear judge of each hidden factor with how it errs, and what people changed."""
_CHECKED = ("finetune", "train", "generate", "audit", "annotator train", "export")  # as `check_own` does
_HELD = {
    "model_index.json": "a pipeline",
    "audit.json": "an audit",
    "confusion.json": "an annotator",
    "config.json": "a module or another model",
    "manifest.jsonl": "generated images",
    "00000/000000.png": "generated images",
    "metadata.*": "data",
    "*.parquet": "data",
}
LOCK = ".lock"  # in an output folder while a run writes to it, empty; the kernel releases that of a killed run


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it on success and vanishes on any failure.

    `DataError` where the disk is full or the folder cannot be written; what stood at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode & 0o777
            yield temporary
            temporary.chmod(mode)  # of the umask: safetensors puts a file of its own there, for its owner alone
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder for libraries to write to; it becomes `folder` on success and vanishes on any failure.

    Where `folder` exists, the new files join it or replace their namesakes, one by one. Where another process has made
    it meanwhile, that one stays. `DataError` where the disk is full or the place cannot be written.
    """
    with _writing(folder):
        home = folder if folder.is_dir() else folder.parent
        hidden = home / f".{folder.name}.{secrets.token_hex(4)}"
        temporary = hidden / folder.name
        try:
            temporary.mkdir(parents=True)
            mode = temporary.stat().st_mode & 0o777
            yield temporary
            made = sorted(temporary.rglob("*"))
            for path in (temporary, *made):  # libraries choose modes of their own
                path.chmod(mode if path.is_dir() else mode & 0o666)
            if home != folder:
                try:
                    temporary.replace(folder)
                except OSError:
                    if not folder.is_dir():
                        raise
                return
            for path in made:
                place = folder / path.relative_to(temporary)
                if path.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    path.replace(place)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says while `path` is written into a `DataError`."""
    try:
        yield
    except Exception as error:
        hidden = isinstance(error, SafetensorError) or "(os error " in str(error)  # safetensors' and tokenizers' own
        if not (hidden or isinstance(error, OSError)) or hasattr(error, "response"):  # which errors of the hub have
            raise
        told = getattr(error, "strerror", None) or error
        remedy = "Free some space or choose another folder, then run the same command again: finished work is kept."
        raise DataError(f"Could not write {path}: {told}. {remedy}") from error


def check_writable(folder: Path, option: str) -> None:
    """Make a folder and try to write in it, before any work; `ConfigError` that names `option` where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = f"found none: {error.strerror or error}. Choose another with {option}."
        raise ConfigError(f"Expected a folder that can be written at {folder}, {found}") from error


def check_own(folder: Path, command: str) -> None:
    """Raise `ConfigError` where a folder that `command` would write to holds what another command or tool wrote."""
    own = any((folder / name).exists() for name in (f"{command}.json", ".work"))
    if command in _CHECKED and (kind := held(folder)) and not own:
        wanted = f"Expected an empty folder to write to, or one of `invdiff {command}`"
        raise ConfigError(f"{wanted}, found {kind} in {folder}. Choose another with --output.")


def held(folder: Path) -> str:
    """What kind of thing a folder holds, in words, such as "a pipeline"; "" where it is none that we know."""
    return next((kind for name, kind in _HELD.items() if any(folder.glob(name))), "")


def recorded(folder: Path, command: str) -> Any:
    """What `command` recorded in a folder of its own, None in a new one; raises as `check_own` and `read_json` do."""
    check_own(folder, command)
    path = folder / f"{command}.json"
    return read_json(path) if path.is_file() else None


@contextlib.contextmanager
def owned(output: Path, command: str = "", *, is_file: bool = False) -> Iterator[None]:
    """Keep other runs out of an output folder, or off an output file, while the block runs.

    `ConfigError` where another run is at work there, or the place cannot be written. A folder made here that is still
    empty afterwards is removed.
    """
    from filelock import FileLock, Timeout  # takes a fifth of a second

    check_own(output, command)
    folder = output.parent if is_file else output
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    check_writable(folder, "--output")
    if is_file and output.is_dir():
        raise ConfigError(f"Expected a file to write at {output}, found a folder. Choose another with --output.")
    path = folder / (f".{output.name}{LOCK}" if is_file else LOCK)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        remedy = "Wait until it has ended, or choose another place with --output."
        raise ConfigError(f"Expected to be the only run that writes to {output}, found another. {remedy}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # an open file cannot be removed on Windows
            path.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds; `DataError` where it is absent or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"Expected a file at {path}, found none.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"Expected JSON in {path}, found something else ({error}).") from error


def check_same_settings(
    folder: Path,
    found: Any,
    settings: dict[str, Any],
    remedy: str = "Use the same, or another output folder, or delete this one to start afresh.",
) -> None:
    """Raise `ConfigError` that names each difference, unless work in `folder` was started with these settings."""
    found = found if isinstance(found, dict) else {}  # of a file that holds something else
    changed = [
        f"{name} was {found.get(name)!r:.80}, now {settings.get(name)!r:.80}"
        for name in found | settings
        if found.get(name) != settings.get(name)
    ]
    if changed:
        raise ConfigError(f"Expected the settings {folder} began with, got others: {'; '.join(changed)}. {remedy}")


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically, with a digest that `read_tensors` checks, and further metadata."""
    from safetensors.torch import save_file  # imports torch, which reports do without

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata={**(metadata or {}), _DIGEST: arrays_digest(contiguous)})


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write numpy arrays as safetensors, atomically, with a digest that `read_arrays` checks."""
    from safetensors.numpy import save_file

    contiguous = {name: array.copy(order="C") for name, array in arrays.items()}  # the file has no strides
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata={_DIGEST: arrays_digest(contiguous)})


def read_arrays(path: Path, framework: str = "np") -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file; `DataError` where it is absent, or its contents are not those written."""
    try:
        with safe_open(path, framework=framework) as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            if (file.metadata() or {}).get(_DIGEST) not in (None, arrays_digest(arrays)):
                raise SafetensorError("its digest is another")
            return arrays
    except FileNotFoundError as error:
        raise DataError(f"Expected a file at {path}, found none.") from error
    except SafetensorError as error:
        raise DataError(found_else(f"safetensors in {path}", error, "Delete it and run again.")) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of a safetensors file into memory, on the CPU, checked; raises as `read_arrays` does."""
    return read_arrays(path, "pt")  # type: ignore[return-value]


def arrays_digest(arrays: Mapping[str, Any]) -> str:
    """16 hex digits that depend on names, shapes and bytes of arrays, or of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {tuple(array.shape)}".encode())
        flat = array.reshape(-1)
        if not hasattr(flat, "tobytes"):  # a tensor; numpy has no 16-bit brain floats
            import torch

            flat = flat.view(torch.uint8).numpy()
        digest.update(flat.view("uint8"))
    return digest.hexdigest()[:16]


def save_image(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` (for example `figure.savefig`) write a picture, atomically."""
    with atomic_path(path) as temporary:
        save(temporary)


def visible(folder: Path, pattern: str) -> list[Path]:
    """Files and folders below `folder` that match `pattern`, sorted, but for those that are never data.

    Never data are names that begin with a dot, what Windows and macOS leave behind, and whatever lies in such folders.
    """

    def is_hidden(name: str) -> bool:
        return name.startswith(".") or name.lower() in _LEFT_BEHIND

    return sorted(path for path in folder.glob(pattern) if not any(map(is_hidden, path.relative_to(folder).parts)))


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

    Adapters (LoRAs) count with their weights, their strengths and whether they are on, and so does FreeU.
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
        tensor = fetched(module, name, tensor)
        if not tensor.is_meta:
            raw: Any = tensor.detach().cpu().contiguous().flatten()
            parts.append(hashlib.sha256(raw.view(torch.uint8).numpy()).hexdigest())
    return fingerprint(*parts)


def fetched(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight of a module, from where accelerate keeps it while sequential offload leaves none in its place."""
    owner, _, leaf = name.rpartition(".")
    hook: Any = getattr(module.get_submodule(owner), "_hf_hook", None) if tensor.is_meta else None
    for each in getattr(hook, "hooks", [hook]):
        if (weights := getattr(each, "weights_map", None)) is not None:
            return weights[leaf]
    return tensor


def default_cache_dir() -> Path:
    """The folder where latents and measurements are kept: `$INVDIFF_CACHE`, or `~/.cache/invdiff`."""
    try:
        return Path(os.environ.get("INVDIFF_CACHE") or "~/.cache/invdiff").expanduser()
    except RuntimeError as error:
        raise ConfigError("Expected a home folder to keep the cache in, found none. Set INVDIFF_CACHE.") from error
