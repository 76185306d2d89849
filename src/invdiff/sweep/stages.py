"""The steps of a cell: each is done once, kept on disk under its settings' name, and taken up where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ..assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from ..auditing.result import Audit
from ..auditing.run import audit
from ..data.birds import BirdsWorld
from ..data.captioned import CaptionedImages, load_captioned_images
from ..data.subsets import random_subset, with_severity
from ..errors import AuditError, ConfigError, EvaluationError
from ..evaluation.annotators.annotations import Annotator
from ..evaluation.annotators.given_labels import GivenLabels
from ..evaluation.annotators.load import load_annotator
from ..evaluation.annotate import Described, describe_images, describe_reference
from ..evaluation.evaluate import check_attributes, evaluate
from ..evaluation.recovery import GroupQuality, group_quality
from ..evaluation.results import Measures, Results
from ..files import fingerprint, read_json, write_json
from ..guidance.module import GuidanceModule
from ..models.load import load_pipeline
from ..sampling import generate
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

    def measures(self, cell: Cell, *, guided: bool) -> Measures:
        """Return what is measured on the cell's images, of the guided model beside those of the plain one.

        What was measured is kept under a digest of all that it depends on, contents included.
        """
        folders = {"base": self.images(cell, guided=False)}
        if guided:
            folders["guided"] = self.images(cell, guided=True)
        judged = [
            str(part) for part in (self.config.attribute, self.config.subject_attribute, self.config.min_confidence)
        ]
        images = [digest_of(folder, "generate.json", "manifest.jsonl") for folder in folders.values()]
        name = fingerprint(*judged, *images, self._judge_digest, self._reference_digest)[:10]
        path = self.folder / "measures" / f"{folders[max(folders)].name}-{name}.json"
        if not path.is_file():
            evaluate(
                folders,
                self.judge,
                attribute=self.config.attribute,
                subject_attribute=self.config.subject_attribute or None,
                reference=self.reference,
                min_confidence=self.config.min_confidence,
                progress=self.progress,
            ).save(path)
        by_scale = Results.load(path).models[max(folders)]
        return next(iter(by_scale.values()))

    def check(self) -> None:
        """Find out before any work whether what judges is there and knows the attributes.

        Raises:
            EvaluationError: It does not know one.
            ModelError: There is no annotator.
            DataError: There is no reference.
        """
        names = [name for name in (self.config.attribute, self.config.subject_attribute) if name]
        check_attributes(self.judge, names)
        _ = self._reference_data  # opened here, if there is one

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
        groups = found.group_weights[0].argmax(axis=1)
        return group_quality(found.prompt_ids, found.scores, groups, classes)

    def seconds(self, cell: Cell) -> dict[str, float | None]:
        """Return how long audit and training took, None where a step was not timed in one go."""
        places = {"audit_seconds": f"audits/{cell.audit_name}", "train_seconds": f"modules/{cell.module_name}"}
        found: dict[str, float | None] = {}
        for name, place in places.items():
            path = self.folder / place / "seconds.json"
            found[name] = read_json(path)["seconds"] if path.is_file() else None
        return found

    @cached_property
    def judge(self) -> Annotator:
        """What names the classes."""
        judge = load_annotator(self._annotator, attribute=self.config.attribute)
        if isinstance(judge, GivenLabels):
            raise ConfigError("SweepConfig.annotator: expected one that looks at images, got labels.")
        return judge

    @cached_property
    def reference(self) -> Described | None:
        """What is known of the reference images."""
        confidence = self.config.min_confidence
        if self.config.reference == BUNDLED:
            world = BirdsWorld(REFERENCE_IMAGES, severity=0.5, seed=REFERENCE_SEED)
            images = (world.row(index)["image"] for index in range(len(world)))
            return describe_images(images, self.judge, min_confidence=confidence)
        if self._reference_data is None:
            return None
        return describe_reference(self._reference_data, self.judge, min_confidence=confidence, progress=self.progress)

    @property
    def _annotator(self) -> str:
        return str(BIRDS_ANNOTATOR) if self.config.annotator == BUNDLED else self.config.annotator

    @cached_property
    def _reference_data(self) -> CaptionedImages | None:
        if self.config.reference in ("", BUNDLED):
            return None
        return load_captioned_images(self.config.reference)

    @cached_property
    def _judge_digest(self) -> str:
        folder = Path(self._annotator)
        if not folder.is_dir():
            return self._annotator
        return digest_of(folder, *sorted(path.name for path in folder.iterdir() if path.is_file()))

    @cached_property
    def _reference_digest(self) -> str:
        if self._reference_data is None:
            return f"{self.config.reference} {REFERENCE_IMAGES} {REFERENCE_SEED}"
        return self._reference_data.fingerprint

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
        pipe, data = self.pipeline(cell), self.data(cell)
        if (folder / "audit.json").is_file():
            found = Audit.load(folder, edited=False)  # a sweep compares settings, not what people made of one
            if found.settings["data_fingerprint"] != data.fingerprint:
                raise AuditError(
                    f"Expected the images that the audit in {folder} was made on, found others: they have changed. "
                    "Delete that folder, or sweep in another one."
                )
            return found
        fresh = not folder.exists()
        start = time.perf_counter()
        # A cache of its own: what one audit measured would make the next one look cheap.
        found = audit(pipe, data, config=cell.config.audit, cache_dir=folder / "cache", progress=self.progress)
        if fresh:
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


def digest_of(folder: Path, *names: str) -> str:
    """Return a digest of the contents of some files of a folder."""
    return fingerprint(*(part for name in names for part in (name, (folder / name).read_bytes())))
