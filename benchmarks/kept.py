"""What benchmarks share: command lines, images of several models, tables, and how figures are kept in results/."""

import argparse
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invdiff import GenerateConfig, Results, generate
from invdiff.files import write_json

RESULTS = Path(__file__).parent / "results"


def four_decimals(number: float) -> float:
    """As most figures are kept."""
    return round(number, 4)


def rounded(value: Any, shorten: Callable[[float], float] = four_decimals) -> Any:
    """Return plain JSON types, numbers shortened."""
    if isinstance(value, dict):
        return {key: rounded(item, shorten) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, shorten) for item in value]
    return shorten(float(value)) if isinstance(value, float | np.floating) else value


def keep(
    path: Path, command: str, figures: Any, *, shorten: Callable[[float], float] = four_decimals, **about: Any
) -> None:
    """Write figures and what is to be said `about` them to `path`, and print where they are."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    write_json(path, {"command": command, "versions": versions, **about, "figures": rounded(figures, shorten)})
    print(path)


def device() -> str:
    """What this runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU core"


def drawn(
    work: Path, pipe: Any, prompts: Sequence[str], models: Mapping[str, Any], scales: Iterable[float], **settings: Any
) -> dict[str, list[Path]]:
    """Model to the folders of its images, groups drawn independently; `models` are guidance by name, None for none."""
    folders: dict[str, list[Path]] = {name: [] for name in models}
    for scale in scales:
        config = GenerateConfig(guidance_scale=scale, **settings)
        for name, of in folders.items():
            options = {"module": models[name], "config": config, "environments": "iid"}
            of.append(generate(pipe, prompts, work / f"{name}-cfg-{scale:g}", **options))
    return folders


def headline(results: Results) -> dict[str, Any]:
    """Model to guidance scale to the figures of an evaluation that are kept, and the shares they are of."""
    names = ("bias", "bias_floor", "bias_ci", "accuracy", "frechet", "images_per_prompt", "shares")
    return {
        model: {scale: {name: measures[name] for name in names} for scale, measures in by_scale.items()}
        for model, by_scale in results.to_dict()["models"].items()
    }


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, of cells that are text."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def parser_of(description: str) -> argparse.ArgumentParser:
    """A command line whose help is a module's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_part(benchmark: str, description: str, parts: Mapping[str, Callable[[Path], Any]], *, work: str) -> None:
    """Run the part that the command line names, in --work, and keep its figures."""
    parser = parser_of(description)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--work", type=Path, default=Path(work))
    arguments = parser.parse_args()
    figures = parts[arguments.part](arguments.work)
    keep(RESULTS / f"{benchmark}-{arguments.part}.json", f"python benchmarks/{benchmark}.py {arguments.part}", figures)
