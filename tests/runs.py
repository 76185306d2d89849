"""Audits, images and whole runs written in a moment, and hostile text, for tests of reports and of the page."""

import contextlib
import html
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from invdiff import AuditConfig, EvaluateConfig, Results, evaluate, load_captioned_images, save_report
from invdiff.auditing.evidence import Evidence
from invdiff.auditing.result import Audit, Factor, PromptAudit, PromptSplit
from invdiff.auditing.run import infer
from invdiff.data.encode import EncodedImages, ShardedTensor
from invdiff.evaluation.annotators.labels import GivenLabels
from invdiff.report import plots

LAND, WATER = "a photo of a landbird", "a photo of a waterbird"
HOSTILE = (
    "$\\nonsense{1}{$ costs",
    "<b>a</b> & {x} %s \\n \\textbf{a}",
    "鳥の写真 🦜 \U000e0041 \ue000",
    "line\nbreak\ttab\x00\x07\u2028end",
    "\u202egnirts desrever\u202c" + "a\u0301\u0302\u0303\u0304\u0305" * 30,
    "\ud800 lone surrogate",
    "nospaces" * 500,
    "a very long caption of a waterbird " * 200,
    "טקסט بالعربية ไทย हिन्दी",
    " ",
)

SCRIPT = "<script>alert(1)</script>"
NASTY = (
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "a|b\n\n# heading <!-- -->",
    "[link](https://example.com/x) ![picture](https://example.com/y.png) `code` **bold**",
    "```\n</style></script>",
    *HOSTILE[:-1],
    "x" * 10_000,
)


def made_up_data(captions: list[str], caption_ids: np.ndarray, latents: Any = None) -> EncodedImages:
    """Images of which nothing else is known; latents are never read unless given."""
    count = len(caption_ids)
    return EncodedImages(
        latents=ShardedTensor([]) if latents is None else latents,
        captions=captions,
        caption_ids=torch.as_tensor(caption_ids),
        conditions={"prompt_embeds": torch.zeros(len(captions) + 1, 1, 1)},
        names=[f"{i}.png" for i in range(count)],
        source_index=torch.arange(count),
        model_fingerprint="model",
        data_fingerprint="data",
        resolution=64,
    )


def sharded(values: np.ndarray) -> ShardedTensor:
    """All rows of an array in one part."""
    return ShardedTensor([torch.from_numpy(values)])


def inferred(data: EncodedImages, evidence: Evidence, prompt_of: list[int], **settings: Any) -> Audit:
    """The max phase on evidence; the prompt of each caption is given."""
    return infer(data, evidence, np.array(prompt_of), AuditConfig(**settings), progress=False)


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " " * (tag in ("dt", "dd", "p", "td", "th"))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]


def built_audit(weights: Any, prompt_ids: Any, prompts: Any, names: Any = None, scores: Any = None) -> Audit:
    """An audit made by hand of one or several W, (N, E), each of which splits the prompts that it is not uniform in.

    Scores are (N,) or (M, N). Where no W splits a prompt that is said to be found, the first one does.
    """
    blank = partial(PromptSplit, shares=[], intervals=[], separation=0.8, agreement=0.9, rand_low=0.7, log_e=30.0)
    several, prompt_ids = isinstance(weights, tuple), np.asarray(prompt_ids)
    weights = tuple(np.asarray(of, np.float32) for of in (weights if several else (weights,)))
    count, prompts = len(prompt_ids), list(prompts)
    scores = np.broadcast_to(np.asarray(0.0 if scores is None else scores, np.float32), (len(weights), count)).copy()
    own = [[of[prompt_ids == index] for index in range(len(prompts))] for of in weights]
    order = sorted(range(len(prompts)), key=lambda index: -prompts[index].num_images)
    splits = [
        [
            blank(index, f"contrast, {prompts[index].prompt}").with_shares_of(of[index])
            for index in order
            if prompts[index].found and len(of[index]) and (place == 0 or np.ptp(of[index], axis=0).any())
        ]
        for place, of in enumerate(own)
    ]
    factors = [Factor(f"factor {place}", of) for place, of in enumerate(splits, start=1)]
    factors = factors if any(factor.splits for factor in factors) else []
    names = list(names or map(str, range(count)))
    return Audit(weights, scores, prompt_ids, prompts, factors, names, 0.0, {})


def hard_audit(names: Any, labels: Any, prompt_ids: Any, *, found: tuple[bool, ...] = (True, True), **settings: Any):
    """An audit of images by name, with settings, that found the groups of these labels, 0 or 1, under some prompts."""
    prompts = [PromptAudit(f"prompt {k}", [], 0, each, "") for k, each in enumerate(found)]
    split = np.array(found)[np.asarray(prompt_ids)][:, None]
    weights = np.where(split, np.eye(2)[np.asarray(labels, int)], 0.5)
    return replace(built_audit(weights, prompt_ids, prompts, names), settings=settings)


def make_audit(folder, *, prompts=(LAND, WATER), found=True, rare=2, per_prompt=20, factors=1):
    """Write an audit whose last `rare` images of each prompt are group 1, and the images: group 0 is red."""
    (folder / "images").mkdir(parents=True)
    places = [(index, place) for index in range(len(prompts)) for place in range(per_prompt)]
    names = [f"images/{index}-{place}.png" for index, place in places]
    captions = [prompts[index] if prompts[index].strip() else "blank" for index, _ in places]
    labels = [int(place >= per_prompt - rare) for _, place in places]
    for name, label in zip(names, labels, strict=True):
        Image.new("RGB", (24, 24), ((200, 40, 40), (40, 40, 200))[label]).save(folder / name)
    rng = np.random.default_rng(0)
    weights = np.eye(2, dtype=np.float32)[labels] if found else np.full((len(names), 2), 0.5, np.float32)
    scores = rng.normal(size=len(names)) + 8 * np.array(labels)
    reasons = ["split by contrast" if found else f"one hump, not {prompt}" for prompt in prompts]
    entries = [PromptAudit(p, [p], per_prompt, found, reason) for p, reason in zip(prompts, reasons, strict=True)]
    made = built_audit((weights,) * factors, [index for index, _ in places], entries, names, scores)
    replace(made, forwards_per_image=6.0).save(folder)
    rows = [{"file_name": name, "text": text} for name, text in zip(names, captions, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_captioned_images(folder)


def make_images(folder, shares, *, count=20, classes=("land", "water"), guidance_scale=3.0, scale=0.0):
    """Write `count` images of each prompt, the first ones of the first class, with their class in the manifest."""
    folder.mkdir(parents=True)
    rows = []
    for index, (prompt, first) in enumerate(shares.items()):
        for place in range(count):
            name = f"{index}-{place}.png"
            Image.new("RGB", (12, 12), (12 * place, 90 * index, 120)).save(folder / name)
            row = {"file_name": name, "prompt": prompt, "seed": place, "background": classes[place >= first]}
            rows.append(row | {"guidance_scale": guidance_scale, "scale": scale})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def measured(folders: Any, **settings: Any) -> Results:
    config = EvaluateConfig(num_resamples=20, **settings)
    return evaluate(folders, GivenLabels(["background"]), "background", config=config, progress=False)


def make_run(folder: Path) -> Results:
    """Write a folder as the commands do: base draws 18 of 20 on land, guided 11 of 20, at two guidance scales."""
    make_audit(folder / "audit")
    (folder / "audit" / "metadata.jsonl").rename(folder / "metadata.jsonl")
    shutil.copytree(folder / "audit" / "images", folder / "data" / "images")
    (folder / "metadata.jsonl").rename(folder / "data" / "metadata.jsonl")
    folders: dict[str, list[Path]] = {"base": [], "guided": []}
    for guidance_scale in (1.0, 3.0):
        for name, first in (("base", 18), ("guided", 11)):
            made = folder / "images" / f"{name}-cfg-{guidance_scale:g}"
            make_images(made, {LAND: first, WATER: 20 - first}, guidance_scale=guidance_scale)
            folders[name].append(made)
    results = measured(folders)
    results.save(folder / "results.json")
    (folder / "module").mkdir()
    record = {
        "base": {"hub_id": "org/birds", "denoiser_fingerprint": "0123456789abcdef"},
        "training": {"steps": 77, "seed": 5},
        "versions": {"torch": "2.13.0"},
    }
    (folder / "module" / "config.json").write_text(json.dumps({"base_model": "org/birds", "record": record}))
    return results


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Charts and pictures of reports are single pixels: for tests of their words."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "render", lambda *_, **__: stream.getvalue())
        yield


def report(folder: Path, **parts: Any) -> tuple[Page, str]:
    path = save_report(folder, **parts)
    return Page(path.read_text(encoding="utf-8")), html.unescape((folder / "report.md").read_text(encoding="utf-8"))
