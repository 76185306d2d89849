"""The steps of a cell: each is done once, kept on disk under its settings' name, and taken up where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ..assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from ..data.birds import BirdsWorld
from ..data.captioned import CaptionedImages, load_captioned_images
from ..data.subsets import random_subset, with_severity
from ..errors import EvaluationError
from ..evaluation.annotators import load_annotator
from ..evaluation.describe import Described, Judge, describe_images, describe_reference
from ..evaluation.evaluate import evaluate
from ..evaluation.recovery import GroupQuality, group_quality
from ..evaluation.results import Measures, Results
from ..files import fingerprint, read_json, write_json
from ..generation import generate
from ..groups.audit import audit
from ..groups.result import Audit
from ..guidance.module import GuidanceModule
from ..pipelines import load_pipeline
from ..training.finetune import finetune
from ..training.train import train
from .config import BUNDLED, SweepConfig
from .plan import Cell

REFERENCE_IMAGES = 2000
REFERENCE_SEED = 424242
_Result = TypeVar("_Result")


class Workshop:
    """Does the steps of cells below one folder, several sweeps' if need be.

    Args:
        folder: Where work is kept.
        config: The sweep, for what all its cells share.
        progress: Show progress bars.
    """

    def __init__(self, folder: Path, config: SweepConfig, *, progress: bool = True) -> None:
        self.folder = folder
        self.config = config
        self.progress = progress
        self._kept: dict[str, Any] = {}

    def data(self, cell: Cell) -> CaptionedImages:
        """Return the cell's captioned images."""
        return self._once(f"data/{cell.data_name}", lambda folder: self._data(cell, folder))

    def pipeline(self, cell: Cell) -> Any:
        """Return the cell's plain model."""
        if cell.config.finetune is not None:
            return self._once(f"models/{cell.model_name}", lambda folder: self._finetune(cell, folder))
        return self._once(f"models/{cell.model_name}", lambda folder: load_pipeline(self._base(cell)))

    def audit(self, cell: Cell) -> Audit:
        """Return the cell's audit."""
        return self._once(f"audits/{cell.audit_name}", lambda folder: self._audit(cell, folder))

    def module(self, cell: Cell) -> GuidanceModule | None:
        """Return the cell's module; None where the audit found nothing to balance."""
        if not self.audit(cell).biased:
            return None
        return self._once(f"modules/{cell.module_name}", lambda folder: self._train(cell, folder))

    def images(self, cell: Cell, *, guided: bool) -> Path:
        """Return the folder of the cell's images."""
        folder = self.folder / "images" / cell.images_name(guided=guided)
        module = self.module(cell) if guided else None
        return generate(
            self.pipeline(cell),
            cell.config.prompts,
            folder,
            module=module,
            config=cell.drawing(guided=guided),
            progress=self.progress,
        )

    def measures(self, cell: Cell) -> dict[str, Measures]:
        """Return what is measured on the images of "base" and, where there is a module, "guided"."""
        folders = {"base": self.images(cell, guided=False)}
        if self.module(cell) is not None:
            folders["guided"] = self.images(cell, guided=True)
        shared = self.config
        judged = fingerprint(
            *(folder.name for folder in folders.values()),
            *(
                shared.annotator,
                shared.attribute,
                shared.subject_attribute,
                shared.reference,
                str(shared.min_confidence),
            ),
        )
        path = self.folder / "measures" / f"{folders[max(folders)].name}-{judged[:10]}.json"
        if not path.is_file():
            evaluate(
                folders,
                self.judge,
                attribute=shared.attribute,
                subject_attribute=shared.subject_attribute or None,
                reference=self.reference,
                min_confidence=shared.min_confidence,
                progress=self.progress,
            ).save(path)
        models = Results.load(path).models
        return {name: next(iter(by_scale.values())) for name, by_scale in models.items()}

    def group_quality(self, cell: Cell) -> GroupQuality | None:
        """Return how well the audit's groups agree with the hidden attribute; None where none is named."""
        column = cell.config.hidden_attribute
        if not column:
            return None
        data, found = self.data(cell), self.audit(cell)
        if column not in data.attributes:
            raise EvaluationError(
                f"Expected the hidden attribute {column!r} in the data, found {', '.join(data.attributes) or 'none'}."
            )
        row_of = {name: row for row, name in enumerate(data.names)}
        classes = [str(data.attributes[column][row_of[name]]) for name in found.names]
        groups = found.group_weights[0].argmax(dim=1)
        return group_quality(found.prompt_ids.numpy(), found.scores.numpy(), groups.numpy(), classes)

    def seconds(self, cell: Cell) -> dict[str, float | None]:
        """Return how long audit and training took, None where a step was not timed in one go."""
        places = {"audit_seconds": f"audits/{cell.audit_name}", "train_seconds": f"modules/{cell.module_name}"}
        found: dict[str, float | None] = {}
        for name, place in places.items():
            path = self.folder / place / "seconds.json"
            found[name] = read_json(path)["seconds"] if path.is_file() else None
        return found

    @cached_property
    def judge(self) -> Judge:
        """What names the classes."""
        spec = str(BIRDS_ANNOTATOR) if self.config.annotator == BUNDLED else self.config.annotator
        return load_annotator(spec, attribute=self.config.attribute)

    @cached_property
    def reference(self) -> Described | None:
        """What is known of the reference images."""
        if not self.config.reference:
            return None
        if self.config.reference == BUNDLED:
            world = BirdsWorld(REFERENCE_IMAGES, severity=0.5, seed=REFERENCE_SEED)
            return describe_images((world.row(index)["image"] for index in range(len(world))), self.judge)
        return describe_reference(load_captioned_images(self.config.reference), self.judge, progress=self.progress)

    def _once(self, place: str, make: Callable[[Path], _Result]) -> _Result:
        if place not in self._kept:
            self._kept[place] = make(self.folder / place)
        result: _Result = self._kept[place]
        return result

    def _base(self, cell: Cell) -> str | Path:
        return BIRDS_MODEL if cell.config.model == BUNDLED else cell.config.model

    def _data(self, cell: Cell, folder: Path) -> CaptionedImages:
        config = cell.config
        if config.data == BUNDLED:
            assert config.severity is not None
            world = BirdsWorld(config.num_images, severity=config.severity, seed=config.data_seed)
            return load_captioned_images(world.write(folder, progress=self.progress))
        data = load_captioned_images(config.data)
        if config.severity is not None:
            data = with_severity(data, config.hidden_attribute, config.severity, seed=config.data_seed)
        return random_subset(data, config.num_images, seed=config.data_seed) if config.num_images else data

    def _finetune(self, cell: Cell, folder: Path) -> Any:
        return finetune(
            self.data(cell), folder, base=self._base(cell), config=cell.config.finetune, progress=self.progress
        )

    def _audit(self, cell: Cell, folder: Path) -> Audit:
        if (folder / "audit.json").is_file():
            return Audit.load(folder)
        pipe, data = self.pipeline(cell), self.data(cell)
        start = time.perf_counter()
        # No cache: what one audit measured would make the next one look cheap.
        found = audit(pipe, data, config=cell.config.audit, cache_dir=folder / "cache", progress=self.progress)
        write_json(folder / "seconds.json", {"seconds": time.perf_counter() - start})
        found.save(folder)
        return found

    def _train(self, cell: Cell, folder: Path) -> GuidanceModule:
        pipe, data, found = self.pipeline(cell), self.data(cell), self.audit(cell)
        fresh = not folder.exists()
        start = time.perf_counter()
        module = train(
            pipe,
            data,
            found,
            folder,
            config=cell.config.train,
            cache_dir=self.folder / "audits" / cell.audit_name / "cache",
            progress=self.progress,
        )
        if fresh:
            write_json(folder / "seconds.json", {"seconds": time.perf_counter() - start})
        return module
