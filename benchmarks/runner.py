"""Runs a benchmark: every method of a YAML file on its world, cell by cell, under one ruler.

A cell is one method with one seed. Its figures are kept in results/BENCHMARK/ when it ends, and a cell that is kept is
not run again; what it trained and drew stays in --work, so a stopped run goes on. The seed is that of the training
images, of fine-tuning, of the method and of the starting noise: an interval over seeds holds all of them.

Every image draws its group, direction or wording independently of the others, as the floor of Bias assumes; guidance
that can spread groups evenly is drawn that way too, as "stratified".
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import judges
import numpy as np
import torch
import worlds
from kept import device, keep, rounded
from methods import Fitted, Guided, Method, World, stopwatch
from PIL import Image
from rivals.groups import GroupBalanced, groups_of

from invdiff import EvaluateConfig, FinetuneConfig, GenerateConfig, evaluate, generate, load_captioned_images
from invdiff.data.birds import BirdsWorld
from invdiff.errors import ConfigError
from invdiff.evaluation.annotate import Described, describe_images
from invdiff.evaluation.annotators.annotations import Annotator
from invdiff.evaluation.annotators.audited import AuditAnnotator
from invdiff.evaluation.images import read_images
from invdiff.evaluation.results import Measures
from invdiff.files import check_same_settings, read_json, write_json
from invdiff.guidance.backends import settled
from invdiff.models.load import public_name
from invdiff.options import Config, read_yaml

HERE = Path(__file__).parent
METHODS = {
    "biased": "methods.Biased",
    "balanced": "methods.Balanced",
    "guided": "methods.Guided",
    "guided-inside": "rivals.inner.GuidedInside",
    "prompted": "rivals.prompts.Prompted",
    "fair-diffusion": "rivals.fair_diffusion.FairDiffusion",
    "uce": "rivals.uce.UCE",
    "self-debias": "rivals.self_debias.SelfDebias",
    "tiw": "rivals.tiw.TIW",
    "invdiff": "rivals.invdiff_released.InvDiff",
    "group-balanced": "rivals.groups.GroupBalanced",
}
"""Name to where its class is."""
BATCH_SIZE = 256 if torch.cuda.is_available() else 32


@dataclass(frozen=True)
class Cells(Config):
    """A method with its settings, for several seeds."""

    method: str
    """A name of `METHODS`."""
    settings: dict = field(default_factory=dict)
    """Fields of the method."""
    seeds: tuple[int, ...] = (0,)
    images: int = 256
    """Of each prompt, at each guidance scale."""
    scales: tuple[float, ...] = (3.0,)
    """Classifier-free guidance scales."""
    further_scales: tuple[float, ...] = ()
    """Those at which only the first seed is drawn."""
    delta: float = 1.0
    """Strength of guidance; methods that are no guidance of ours do not read it."""
    environments: Literal["iid", "calibrated"] = "iid"
    """How groups are drawn for the headline; "calibrated" where the mix is solved for."""
    stratified: bool = False
    """Draw images with groups spread evenly too."""
    audited: bool = False
    """Let the audit judge the images too: what settings are chosen by."""
    world: dict = field(default_factory=dict)
    """Entries of the suite's world that differ, such as its severity."""
    fitted: str = ""
    """The cell of the same method that is drawn, where it is another: with a different `delta` or `prompts`."""
    prompts: dict = field(default_factory=dict)
    """Prompt to the subject that it names, to draw in place of the captions."""

    def drawing(self, scale: float, seed: int) -> GenerateConfig:
        """How images are drawn at a guidance scale."""
        options = {"guidance_scale": scale, "scale": self.delta, "seed": 1000 + seed, "batch_size": BATCH_SIZE}
        return GenerateConfig(images_per_prompt=self.images, **options)

    def fitted_by(self) -> Method:
        """The method with its settings."""
        check_known("a method", [self.method], METHODS)
        module, _, name = METHODS[self.method].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        check_known(f"settings of {self.method}", self.settings, [field.name for field in fields(kind)])
        method: Method = kind(**self.settings)
        return method


@dataclass(frozen=True)
class Suite(Config):
    """One benchmark: a world and the methods compared on it."""

    world: dict
    """`kind`, a function of worlds.py, and its settings, but for the seed."""
    attribute: str
    """The hidden attribute."""
    subject: str
    """The attribute that captions name."""
    words: dict
    """Class of the hidden attribute to the words that prompts are given for it, for rivals that need words."""
    cells: dict
    """Name to `Cells`."""
    finetune: FinetuneConfig | None = None
    """How the base is fitted to the biased images; without it, the base is biased as it is."""
    shares: str = ""
    """Another suite of the same world whose models, audits and fitted cells this one uses."""
    unrelated: tuple[str, ...] = ()
    """Prompts that nobody audited: how far their images move, at the same seeds, is measured too."""

    @classmethod
    def named(cls, name: str) -> Suite:
        """The benchmark of suites/NAME.yaml."""
        return cls.from_file(cls.path(name))

    @classmethod
    def path(cls, name: str) -> Path:
        """That file."""
        check_known("a benchmark", [name], cls.names())
        return HERE / "suites" / f"{name}.yaml"

    def check(self) -> None:
        """Every name in it is one that there is."""
        check_known("an attribute", [self.attribute], judges.NUM_IMAGES)
        others = read_yaml(self.path(self.shares))["cells"] if self.shares else {}
        for cell, cells in self.each().items():
            for scale in (*cells.scales, *cells.further_scales):
                cells.drawing(scale, 0)
            world = self.world | cells.world
            kind = world.pop("kind", None)
            check_known("a world's kind", [kind], worlds.EVEN)
            make = BirdsWorld if kind == "bundled" else getattr(worlds, kind)
            check_known(f"settings of {kind}", world, inspect.signature(make).parameters)
            if cells.stratified and cells.method != "guided":
                raise ConfigError(f"Expected `stratified` of guided cells alone, which have groups, got it of {cell}.")
            method, fitted = cells.fitted_by(), (others | self.cells).get(cells.fitted or cell)
            if fitted is None or Cells.from_dict(fitted).fitted_by() != method:
                raise ConfigError(
                    f"Expected a cell that is fitted as {cell} is as its `fitted`, got {cells.fitted!r}."
                )

    @staticmethod
    def names() -> list[str]:
        """Every benchmark that there is."""
        return sorted(file.stem for file in (HERE / "suites").glob("*.yaml"))

    def each(self) -> dict[str, Cells]:
        """The cells by name."""
        return {name: Cells.from_dict(entries) for name, entries in self.cells.items()}

    @staticmethod
    def folder_of(seed: int, changes: Mapping[str, Any]) -> str:
        """The name of a world's folder."""
        return "-".join([*(f"{name}-{value}" for name, value in changes.items()), f"seed-{seed}"])

    def settings(self, cells: Cells) -> dict[str, Any]:
        """All that the figures of a cell depend on."""
        shared = {name: value for name, value in self.to_dict().items() if name not in ("cells", "shares")}
        method = cells.fitted_by()  # with its defaults, which may change
        if isinstance(method, Guided):
            shared["training"] = settled(method.training()).to_dict()
            del shared["training"]["seed"]
        return shared | cells.to_dict() | {"settings": plain(method), "world": self.world | cells.world}

    def check_kept(self, cells: Cells, path: Path) -> None:
        """Raise `ConfigError` that names each difference, unless figures were kept with these settings.

        Another number of seeds is no difference, nor is what was not recorded then.
        """
        now, recorded = self.settings(cells), read_json(path)["settings"]
        if "training" in recorded:  # options that were new since are no difference
            recorded["training"] = now.get("training", {}) | recorded["training"]
        recorded["settings"] = plain(Cells(recorded["method"], recorded["settings"]).fitted_by())
        then = now | Cells(cells.method).to_dict() | recorded | {"seeds": now["seeds"]}
        remedy = "Undo that, give the cell another name, or delete this file and what --work has of it to run it anew."
        check_same_settings(path, flat(then), flat(now), remedy)

    def opened(
        self, source: Path | None, base: Path, work: Path, seed: int, changes: Mapping[str, Any] | None = None
    ) -> World:
        """The world of one seed, with other settings where `changes` names them, its images written to `work`."""
        settings, changes = dict(self.world) | dict(changes or {}), changes or {}
        kind = settings.pop("kind")
        folder = work / self.folder_of(seed, changes)
        make = getattr(worlds, kind)
        labelled = load_captioned_images(make(source, folder / "images", seed=seed, **settings))
        even = load_captioned_images(make(source, folder / "balanced", seed=seed, **settings | worlds.EVEN[kind]))
        named = dict(sorted(zip(labelled.captions, labelled.attributes[self.subject], strict=True)))
        prompts = {prompt: named[prompt] for prompt in worlds.PROMPTS.get(kind, named)}
        common = {"base": base, "work": folder, "seed": seed, "finetuning": self.finetune}
        return World(labelled, even, self.attribute, self.subject, prompts, self.words, **common)


class Runner:
    """Runs cells of a benchmark."""

    def __init__(
        self, name: str, source: Path | None, base: Path, work: Path, results: Path, *, clip: str = ""
    ) -> None:
        self.name, self.suite, self.clip = name, Suite.named(name), clip
        self.source, self.base, self.folder = source, base, results / name
        self.base_name = public_name(str(base))
        bases = {of["base"] for seeds in kept(self.folder).values() for of in seeds.values()}
        if others := bases - {self.base_name}:
            remedy = "Give that one, or --results for a table of its own."
            raise ConfigError(f"Expected the base of the figures in {self.folder}, {', '.join(others)}. {remedy}")
        self.work = work / (self.suite.shares or name)

    @cached_property
    def judge(self) -> tuple[Annotator, Described]:
        """Who names the classes, and real balanced images, described."""
        attributes = [self.suite.subject, self.suite.attribute]
        annotator, real = judges.judge_of(self.suite.world, attributes, self.source, self.work.parent / "judges")
        return annotator, describe_images(real, annotator, progress=False)

    def run(self, name: str, seed: int) -> None:
        """Fit, draw, judge, and keep the figures, unless they are there."""
        path, cells = self.folder / f"{name}-seed-{seed}.json", self.suite.each()[name]
        if path.is_file():
            self.suite.check_kept(cells, path)
            if (by := public_name(self.clip) if self.clip else "") and (of := read_json(path).get("clip")) != by:
                remedy = "Leave --clip out, or delete this file to measure anew the images that --work has."
                raise ConfigError(f"Expected figures by the CLIP {by}, found {path} by {of or 'none'}. {remedy}")
            return
        method = cells.fitted_by()
        judge = self.judge[0]  # its encoder may not be installed: that is said before hours of work
        world = self.suite.opened(self.source, self.base, self.work, seed, cells.world)
        work, prompts = world.work / name, cells.prompts or world.prompts
        if (begun := work / "settings.json").is_file():  # images that are there go on as they began
            self.suite.check_kept(cells, begun)
        write_json(begun, {"settings": self.suite.settings(cells)})
        world.biased()
        if isinstance(method, Guided | GroupBalanced):  # whose time is no time of fitting
            groups_of(world, method.groups, getattr(method, "audit", {}))
        fitted_in = world.work / (cells.fitted or name) / "fitted"
        with stopwatch(fitted_in) as took:
            fitted = method.fit(world, fitted_in)
        scales = sorted({*cells.scales, *(cells.further_scales if seed == cells.seeds[0] else ())})
        draws = {"": cells.environments} | ({"stratified ": "uniform"} if cells.stratified else {})
        figures: dict[str, Any] = {}
        for prefix, environments in draws.items():
            for scale in scales:
                folder = work / f"{prefix.strip() or 'drawn'}-{scale:g}"
                options = {"module": fitted.guidance, "config": cells.drawing(scale, seed), "progress": False}
                if fitted.guidance is not None:
                    options["environments"] = environments
                with fitted.hooked(1000 + seed):
                    generate(fitted.pipe, list(prompts), folder, **options)
                figures[f"{prefix}CFG {scale:g}"] = self.measured(folder, world, prompts)
                if cells.audited and world.found.biased:
                    eyes = AuditAnnotator(world.found_in, fitted.pipe)
                    seen = evaluate(folder, eyes, next(iter(eyes.attributes)), progress=False)
                    ((_, _, measures),) = seen.each()
                    figures[f"{prefix}CFG {scale:g}"]["bias by the audit"] = measures.bias
        for scale in scales if self.suite.unrelated else ():
            figures[f"unrelated prompts, CFG {scale:g}"] = self.moved(fitted, world, work, cells.drawing(scale, seed))
        about = {
            "device": device(),
            "base": self.base_name,
            **({"clip": public_name(self.clip)} if self.clip else {}),
            "settings": self.suite.settings(cells),
            "judge": {name: np.asarray(judge.confusion(name)).tolist() for name in judge.attributes},
            "supervision": method.supervision,
            "features": judge.feature_name,
            **{name: getattr(fitted, name) for name in ("parameters", "forwards", "sampling")},
            "seconds of fitting": took(),
            "about": rounded(dict(fitted.about)),
        }
        keep(path, f"python -m benchmarks run {self.name} --cells {name} --seeds {seed}", figures, **about)
        print(*(f"{key}: Bias {of['bias']:.2f}" for key, of in figures.items() if "bias" in of), flush=True)

    def moved(self, fitted: Fitted, world: World, work: Path, config: GenerateConfig) -> dict[str, float | None]:
        """How far images of unrelated prompts are from the biased model's of the same seeds: cosine distance."""
        name = f"unrelated-{config.guidance_scale:g}"
        folders = {"base": world.work / name, "guided": work / name}
        generate(world.biased(), self.suite.unrelated, folders["base"], config=config, progress=False)
        with fitted.hooked(config.seed):
            options = {"module": fitted.guidance, "config": config, "progress": False}
            generate(fitted.pipe, self.suite.unrelated, folders["guided"], **options)
        results = evaluate(folders, self.judge[0], self.suite.attribute, progress=False)
        measures = results.at(str(config.guidance_scale))["guided"]
        return {name: of.value for name, of in measures.preservation.items() if name.startswith("feature shift")}

    def measured(self, folder: Path, world: World, prompts: Mapping[str, str]) -> dict[str, Any]:
        """Every figure of one folder of images."""
        judge, real = self.judge
        config = EvaluateConfig(subject_attribute=self.suite.subject, clip=self.clip)
        results = evaluate(folder, judge, self.suite.attribute, reference=real, config=config, progress=False)
        ((_, _, measures),) = results.each()
        contact_sheet(folder)
        return figures_of(measures) | {"worst cell": worst_cell(folder, judge, world, prompts)}


def figures_of(measures: Measures) -> dict[str, Any]:
    """The figures that tables show, by name."""
    bias, discrepancy = measures.bias_estimate, measures.first.overall["fairness_discrepancy"]
    named = {name.partition(" (")[0]: value.value for name, value in measures.quality.items()}
    by_group = {
        group: {name.partition(" (")[0]: value.value for name, value in of.items()}
        for group, of in measures.by_group.items()
    }
    return {
        "bias": bias.value,
        "low": bias.low,
        "high": bias.high,
        "floor": bias.floor,
        "corrected": bias.corrected,
        "squared discrepancy": discrepancy.unbiased_square,
        "discrepancy": discrepancy.value,
        "shares": measures.shares,
        "subject right": measures.accuracy,
        **named,
        "by group": by_group,
    }


def worst_cell(folder: Path, judge: Annotator, world: World, prompts: Mapping[str, str]) -> float:
    """The least, over prompts and groups, of P(subject right and attribute = group), times the number of groups.

    1 where every prompt's images show its subject, each group as often; 0 where one group is never shown with one.
    """
    rows = read_images(folder)
    seen = describe_images(rows, judge, progress=False)
    named = {name: np.array([*judge.attributes[name], ""])[of] for name, of in seen.classes.items()}
    groups, drawn = sorted(set(world.labelled.attributes[world.attribute])), np.array([row.prompt for row in rows])
    return min(
        len(groups) * ((named[world.subject] == subject) & (named[world.attribute] == group))[drawn == prompt].mean()
        for prompt, subject in prompts.items()
        for group in groups
    )


def contact_sheet(folder: Path, columns: int = 12) -> None:
    """Write sheet.png: the first images of each prompt, a row each."""
    strips = [sorted(prompt.glob("*.png"))[:columns] for prompt in sorted(folder.glob("[0-9]*"))]
    tiles = [[Image.open(path).convert("RGB") for path in strip] for strip in strips]
    width, height = tiles[0][0].size
    sheet = Image.new("RGB", (columns * width, len(tiles) * height), "white")
    for row, strip in enumerate(tiles):
        for column, tile in enumerate(strip):
            sheet.paste(tile, (column * width, row * height))
    sheet.save(folder / "sheet.png")


def check_known(what: str, given: Iterable[Any], known: Collection[str]) -> None:
    """Raise `ConfigError` that says what is `given` but not `known`."""
    if unknown := [each for each in given if each not in known]:
        raise ConfigError(f"Expected {what} of {', '.join(known) or 'none'}, got {', '.join(map(repr, unknown))}.")


def plain(method: Method) -> dict[str, Any]:
    """The fields of a method as JSON reads them back."""
    return dict(json.loads(json.dumps(asdict(method))))


def flat(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Settings within settings by their full names, such as "settings.config.steps"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{within}{name}.") if isinstance(value, Mapping) else {f"{within}{name}": value}
    return found


def kept(folder: Path) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Cell to seed to what was kept."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for path in sorted(folder.glob("*-seed-*.json")):
        cell, _, seed = path.stem.rpartition("-seed-")
        found.setdefault(cell, {})[int(seed)] = read_json(path)
    return found
