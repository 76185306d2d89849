"""Find and read what a report is made from: an audit with its groups, data, results, images and a module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..auditing.asked import known_rows
from ..auditing.clicks import labels_of
from ..auditing.edits import ladder
from ..auditing.result import Audit, PromptAudit, PromptSplit
from ..data.tables import MANIFESTS, METADATA
from ..errors import AuditError, ConfigError, InvDiffError
from ..evaluation.images import Folders, Row, read_images, resolve_folders
from ..evaluation.results import Results
from ..files import fingerprint, read_json, visible
from .figures import Share
from .plots import colour_of

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

GENERATED = MANIFESTS[0]
MOST_PROMPTS = 8  # prompts that pictures and reports show in detail
TYPICAL, UNCERTAIN = 12, 8  # images of a group that they show at most
_Array = NDArray[Any]


@dataclass(frozen=True)
class Parts:
    """Where the parts of a report lie."""

    audit: Path | None = None
    data: Any = None  # a folder or `CaptionedImages`
    results: Path | None = None
    images: Mapping[str, Folders] = field(default_factory=dict)
    module: Path | None = None
    run: Path | None = None  # the folder they lie in, where they lie in one
    data_words: Sequence[str] = ()  # the data on the command line, and the options to read it with


@dataclass(frozen=True)
class Generated:
    """The images of one model."""

    rows: Sequence[Row]
    folders: Sequence[str]  # where they lie, as commands name it
    settings: Sequence[Mapping[str, Any]]  # `generate.json` of each of these folders, empty where there is none


@dataclass(frozen=True)
class Group:
    """One group of one prompt's images, as positions in the audit."""

    index: int  # the column of W
    name: str  # the name that people gave it, or its number in words
    share: float
    size: int
    typical: list[int]  # highest weight first, then the most extreme score on the group's side
    uncertain: list[int]  # lowest weight first, then closest to another group's scores

    @property
    def shown(self) -> tuple[list[int], list[int]]:
        """Images that reports and their pictures show: the most typical, and the least certain of the others."""
        typical = self.typical[:TYPICAL]
        return typical, [at for at in self.uncertain if at not in typical][:UNCERTAIN]


@dataclass(frozen=True)
class Split:
    """One prompt's images, split into groups by one hidden factor."""

    index: int  # of the prompt, in the audit
    prompt: PromptAudit
    factor_index: int  # of the hidden factor, from 0
    factor: str  # its name before that of a prompt, such as "factor 1 · "; empty where the audit has one factor only
    figures: PromptSplit  # how the audit judges it
    rows: _Array  # (n,) positions in the audit of the prompt's images of known groups; the other arrays are theirs
    scores: _Array
    weights: _Array  # W of these images, (n, E)
    labels: _Array
    names: list[str]  # of its groups
    cuts: list[float]  # scores at which the groups part, rising: people's, or the midpoints between groups
    by_hand: bool  # whether people moved the cuts or left out images of this prompt

    @cached_property
    def groups(self) -> list[Group]:
        """The groups, their images ranked."""
        return rank_groups(self.weights, self.scores, self.rows, self.names)

    @property
    def shares(self) -> list[Share]:
        """The share of images in each group, with the audit's interval."""
        ends, total = self.figures.intervals, len(self.labels)
        return [
            Share(group.name, group.share, *end, group.size, total, colour_of(group.index))
            for group, end in zip(self.groups, ends, strict=True)
        ]


@dataclass(frozen=True)
class Run:
    """The parts of a report; a report without one of them says so."""

    audit: Audit | None = None
    splits: Sequence[Split] = ()  # as `splits_of` has them
    data: CaptionedImages | None = None  # the images that were audited
    rows: Sequence[int] = ()  # where each audited image stands in the data; empty without data
    results: Results | None = None
    results_digest: str = ""  # of their file
    images: Mapping[str, Generated] = field(default_factory=dict)  # by model
    unmeasured: Sequence[str] = ()  # folders of images that are not those of the results, and are left out
    module: Mapping[str, Any] = field(default_factory=dict)  # a module's config, with its record; or empty
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """How commands name "audit", "module", "results" and "data", the latter with the options to read it with."""

    def may_show(self, position: int) -> bool:
        """Whether an audited image may go into a report: it is given, and no link or path leads out of the data."""
        return self.data is not None and self.data.is_own(self.rows[position])

    def images_at(self, positions: Sequence[int]) -> list[Image.Image]:
        """The audited images at these positions in the audit; none where the data was not given."""
        return [self.data.image(self.rows[position]) for position in positions] if self.data is not None else []


def find_parts(run: str | Path) -> Parts:
    """The parts in a folder such as `invdiff demo` writes: `audit/`, `module/`, `data/`, `results.json`, and images.

    Folders of images lie in `images/` or beside them, named after their models in the results: `base` or `base-cfg-3`,
    never `base-3`, which may be of anything.
    """
    run = Path(run)
    if not run.is_dir():
        raise ConfigError(f"Expected a folder with audit/ or results.json at {run}, found none.")
    module = run / "module" if (run / "module" / "config.json").is_file() else None
    results = run / "results.json" if (run / "results.json").is_file() else None
    models = list(Results.load(results).models) if results else []
    images: dict[str, list[Path]] = {}
    manifests = [*visible(run, f"*/{GENERATED}"), *visible(run, f"images/*/{GENERATED}")]
    numbers = {path: re.split(r"([0-9]+(?:\.[0-9]+)?)", str(path)) for path in manifests}  # to sort cfg-10 after cfg-3
    for manifest in sorted(numbers, key=lambda path: [float(p) if k % 2 else p for k, p in enumerate(numbers[path])]):
        named = (manifest.parent.name, re.sub(r"-cfg-[0-9.]+$", "", manifest.parent.name))
        if name := next((name for name in named if name in models), "") if models else named[1]:
            images.setdefault(name, []).append(manifest.parent)
    has_data = any((run / "data" / name).is_file() for name in METADATA)
    return Parts(audit_of(run, module), run / "data" if has_data else None, results, images, module, run)


def audits_in(run: Path) -> list[Path]:
    """The folders of audits in a run: `audit`, or the run itself, and `audit-...`, the latest last."""
    first = [folder for folder in (run / "audit", run) if (folder / "audit.json").is_file()][:1]
    others = sorted(visible(run, "audit-*/audit.json"), key=lambda path: path.stat().st_mtime)
    return first + [path.parent for path in others]


def audit_of(run: Path, module: Path | None) -> Path | None:
    """The audit in a run that its module was trained with; without a module the latest by clicks that found a group.

    Where none is exactly that of the module's record, it is the latest that was asked for alike.
    """
    folders = audits_in(run)
    if len(folders) < 2:
        return next(iter(folders), None)
    record = None if module is None else _config(module / "config.json", "a module", "`invdiff train`").get("record")
    record = record if module is None or isinstance(record, Mapping) else {}
    by_clicks = [folder for folder in reversed(folders) if labels_of(folder).is_file()]
    audits: dict[Path, Audit] = {}
    for folder in dict.fromkeys((*by_clicks, *folders)):
        with suppress(InvDiffError):  # a damaged folder beside the audit is no error of its report
            audits[folder] = Audit.load(folder)
    if exact := next((folder for folder, of in audits.items() if record and of.has_trained(record)), None):
        return exact
    for folder in (folder for folder in (*by_clicks, folders[0]) if folder in audits):
        words = audits[folder].asked.partition(";")[0]
        if audits[folder].biased and (record is None or str(record.get("asked", "")).partition(";")[0] == words):
            return folder
    return folders[0]


def read_run(parts: Parts) -> Run:
    """Read the parts of a report; `AuditError` where the data is not what was audited."""
    if parts.audit is None and parts.results is None:
        where = parts.run or "what is given"
        raise ConfigError(f"Expected audit/ or results.json in {where}, found neither. Run `invdiff audit`.")
    audit = None if parts.audit is None else Audit.load(parts.audit)
    data = parts.data if audit else None
    if isinstance(data, str | Path):
        from ..data.captioned import load_captioned_images

        data = load_captioned_images(data)
    rows = rows_of(audit, data) if audit and data is not None else ()
    module = {} if parts.module is None else _config(parts.module / "config.json", "a module", "`invdiff train`")
    names = {name: getattr(parts, name) for name in ("audit", "module", "results", "data")}
    results = None if parts.results is None else Results.load(parts.results)
    images, unmeasured = {}, []
    for model, folders in resolve_folders(parts.images).items() if parts.images else ():
        rows_in = {folder: read_images(folder) for folder in folders}
        if results and model in results.module_scales:  # images at another strength are not those measured
            fitting = (None, results.module_scales[model])
            rows_in = {folder: rows for folder, rows in rows_in.items() if all(row.scale in fitting for row in rows)}
        if results and not measured(results, model, [row for rows in rows_in.values() for row in rows]):
            others = [folder for folder, rows in rows_in.items() if not measured(results, model, rows)]
            others = others or list(rows_in)  # each fits alone, and nothing says which of them was measured
            unmeasured += [shown_path(folder, parts.run) for folder in others]
            rows_in = {folder: rows for folder, rows in rows_in.items() if folder not in others}
        files = [folder / "generate.json" for folder in rows_in]
        settings = [_config(file, "settings", "`invdiff generate`") if file.is_file() else {} for file in files]
        if rows_in:
            shown = [shown_path(folder, parts.run) for folder in rows_in]
            images[model] = Generated([row for rows in rows_in.values() for row in rows], shown, settings)
    return Run(
        audit=audit,
        splits=splits_of(audit) if audit else (),
        data=data,
        rows=rows,
        results=results,
        results_digest="" if parts.results is None else fingerprint(parts.results.read_bytes()),
        images=images,
        unmeasured=unmeasured,
        module=module,
        names={name: [shown_path(path, parts.run)] for name, path in names.items() if isinstance(path, str | Path)}
        | ({"data": [shown_path(parts.data_words[0]), *parts.data_words[1:]]} if parts.data_words else {}),
    )


def measured(results: Results, model: str, rows: Sequence[Row]) -> bool:
    """Whether images may be of a model's results: of the same prompts and no more, at each scale that both have."""
    for scale, measures in results.models.get(model, {}).items():
        counts = Counter(row.prompt for row in rows if row.scale_key == scale)
        absent = measures.first.counts.keys() - counts.keys()
        if counts and (absent or min(counts.values()) > measures.images_per_prompt):
            return False
    return True


def shown_path(path: str | Path, run: Path | None = None) -> str:
    """A path as it was given where that is relative, else from the run's folder on, else its last part only.

    Reports are passed on: no path of the machine is shown. A hub id stays.
    """
    text = str(path)
    foreign = PureWindowsPath(text)  # which reads both kinds of slashes
    if not (foreign.anchor or text.startswith("~")):
        return text
    if run is not None and (real := Path(text).absolute()).is_relative_to(home := run.absolute()):
        return real.relative_to(home).as_posix()
    return foreign.name or "."


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which every path of the machine is its last part; lists, such as prompts, stay."""
    return {name: shown_path(value) if isinstance(value, str) else value for name, value in settings.items()}


def _config(path: Path, what: str, command: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"Expected {what} in {path.parent}, found no {path.name}. {command} writes one.")
    config = read_json(path)
    if not isinstance(config, Mapping):
        raise ConfigError(f"Expected {what} in {path}, found something else. Run {command} again.")
    return config


def splits_of(audit: Audit) -> list[Split]:
    """Every split of a prompt by a hidden factor, the first factor's first, its largest prompt first."""
    splits = []
    for factor, (entry, of_all) in enumerate(zip(audit.factors, audit.group_weights, strict=False)):
        for figures in sorted(entry.splits, key=lambda split: -audit.prompts[split.prompt].num_images):
            own = audit.prompt_ids == figures.prompt
            rows = np.flatnonzero(audit.kept & own & known_rows(of_all))
            weights, scores = of_all[rows], audit.scores[factor, rows]
            labels, moved = weights.argmax(axis=1), audit.edits.cuts.get((factor, figures.prompt), ())
            splits.append(
                Split(
                    index=figures.prompt,
                    prompt=audit.prompts[figures.prompt],
                    factor_index=factor,
                    factor=f"{entry.name} · " if len(audit.factors) > 1 else "",
                    figures=figures,
                    rows=rows,
                    scores=scores,
                    weights=weights,
                    labels=labels,
                    names=[audit.group_name(group, factor) for group in range(weights.shape[1])],
                    cuts=list(moved) or gaps(scores, labels),
                    by_hand=bool(moved or not audit.kept[own].all()),
                )
            )
    return splits


def rank_groups(weights: _Array, scores: _Array, rows: _Array, names: Sequence[str]) -> list[Group]:
    """The images of each of a prompt's E groups by how typical they are, from weights (n, E), scores (n,), rows (n,).

    Of the outer groups, extreme scores are typical; of a group between others, the middle one.
    """
    labels = weights.argmax(axis=1)
    rising = ladder(weights, scores)
    groups = []
    for index, name in enumerate(names):
        members = np.flatnonzero(labels == index)
        own, others = scores[members], np.sort(scores[labels != index])
        extreme = distance = -np.abs(own - np.median(own)) if len(own) else own
        if len(rising) > 1 and index in (rising[0], rising[-1]):
            extreme = own if index == rising[-1] else -own
        if len(others):
            above = np.searchsorted(others, own).clip(0, len(others) - 1)
            distance = np.minimum(np.abs(others[above] - own), np.abs(others[(above - 1).clip(0)] - own))
        weight = weights[members, index].round(2)  # finer differences of a soft W mean less than the score
        typical = rows[members[np.lexsort((-extreme, -weight))]].tolist()
        uncertain = rows[members[np.lexsort((distance, weight))]].tolist()
        groups.append(Group(index, name, float(weights[:, index].mean()), len(members), typical, uncertain))
    return groups


def gaps(scores: _Array, labels: _Array) -> list[float]:
    """The midpoints of the gaps between neighbouring groups that the scores separate."""
    parts = sorted((scores[labels == label] for label in np.unique(labels)), key=lambda part: float(part.mean()))
    return [float(lower.max() + upper.min()) / 2 for lower, upper in pairwise(parts) if lower.max() <= upper.min()]


def rows_of(audit: Audit, data: CaptionedImages) -> list[int]:
    """Where each audited image stands in the data, which may hold others too, in any order; reads their files once.

    `AuditError` where captions or images are others under the same names, as "row 0" of any table is.
    """
    rows = rows_by_name(audit.names, data.names)
    # The demo's world is drawn, not read; files that were damaged count in the fingerprint, and may be mended since.
    if data.folder is not None and "data_fingerprint" in audit.settings and not audit.unreadable:
        audit.check_images((data if rows == list(range(len(data))) else data.select(rows)).fingerprint)
    return rows


def rows_by_name(names: Sequence[str], available: Sequence[str]) -> list[int]:
    """Where each audited image stands in the data, whose names are unlike."""
    row_of = {name: row for row, name in enumerate(available)}
    if absent := [name for name in names if name not in row_of]:
        lacks = f"data without {len(absent)} of {len(names)}, first {absent[0]}"
        raise AuditError(f"Expected the images that were audited, got {lacks}. Give the data of the audit.")
    return [row_of[name] for name in names]
