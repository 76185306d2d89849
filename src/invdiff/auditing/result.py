"""An audit's result, as an object and as a folder of safetensors and JSON. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ..errors import AuditError, DataError, found_else
from ..files import CURATION, JUDGES, fingerprint, read_arrays, read_json, write_arrays, write_json
from ..options import typed
from ..text import listed, one_line
from .asked import about_asked, known_rows
from .decide import share_intervals
from .edits import Edits, apply, put_aside, read_edits

if TYPE_CHECKING:
    from ..data.encode import EncodedImages

WORDS, IN_JSON = "words.json", ("forwards_per_image", "settings", "names", "unreadable", "factors", "prompts")
NOT_TESTED = -1e3  # the log e-value of a cut that was not tested, and the least that is told
WORD_LIMIT = 60  # characters of a word, or of a few words that belong together


@dataclass(frozen=True)
class Candidate:
    """One way to split a prompt's images, with the figures it is judged by."""

    evidence: str  # the source of the scores, such as "contrast at log-SNR -4.79"
    num_groups: int  # E
    shares: list[float]  # share of the prompt's images in each group
    agreement: float  # adjusted Rand index of the groups of independent noises and settings; 1 is perfect, 0 chance
    separation: float  # distance of the nearest neighbouring groups in the scores
    rand_low: float  # lower 95% bound of the adjusted Rand index with the truth that separation and shares predict
    log_e: float  # natural logarithm of the e-value against one log-concave hump
    refusal: str  # why it is not believed, in words; "" where it is


@dataclass(frozen=True)
class PromptAudit:
    """The result under one prompt: captions that mean the same to the model."""

    prompt: str  # the most frequent of the captions
    captions: list[str]
    num_images: int  # images with one of these captions
    found: bool  # whether any hidden factor splits it
    reason: str  # why, or why not, in words
    power: str = ""  # what size of minority the audit could have seen here, in words
    notes: list[str] = field(default_factory=list)  # such as which captions were merged into this prompt, and why
    candidates: list[Candidate] = field(default_factory=list)  # every split that was considered, best first


@dataclass(frozen=True)
class PromptSplit:
    """One prompt's images as one hidden factor splits them."""

    prompt: int  # index of the prompt in the audit
    evidence: str  # the evidence that decided
    shares: list[float]  # share of each group, in the order of the columns of W
    intervals: list[tuple[float, float]]  # 95% interval of each share
    separation: float
    agreement: float
    rand_low: float
    log_e: float  # as of a `Candidate`

    def with_shares_of(self, weights: NDArray[Any]) -> PromptSplit:
        """The same split with the shares of W (n, E) of its images, and their intervals.

        Those are Wilson's where W is one-hot; else by `share_intervals`, and no nearer to the shares than before.
        Images of which nothing is known do not count, but where that is all of them.
        """
        known = known_rows(weights)
        weights = weights[known] if known.any() else weights
        count, shares = len(weights), weights.mean(axis=0, dtype=np.float64).tolist()
        if (weights.max(axis=1) == 1).all():
            ends = [binomtest(round(share * count), count).proportion_ci(0.95, method="wilson") for share in shares]
            intervals = [(round(float(low), 4), round(float(high), 4)) for low, high in ends]
        else:
            intervals = share_intervals(weights.astype(np.float64))
            for group, (before, (low, high)) in enumerate(zip(self.shares, self.intervals, strict=False)):
                least, most = max(0.0, shares[group] + low - before), min(1.0, shares[group] + high - before)
                low, high = intervals[group]
                intervals[group] = min(low, round(least, 4)), max(high, round(most, 4))
        return replace(self, shares=[round(share, 4) for share in shares], intervals=intervals)


@dataclass(frozen=True)
class Factor:
    """One hidden attribute; its W is `Audit.group_weights` at the same place.

    A column of W means the same under every prompt that it splits, and nothing under the others.
    """

    name: str  # such as "factor 1"
    splits: list[PromptSplit]  # the prompts that it splits, the largest first
    values: list[str] = field(default_factory=list)  # names of its groups, where they were asked for


@dataclass(frozen=True)
class Word:
    """One word that separates a group from the others, in a CLIP model's opinion."""

    word: str
    effect: float  # how much nearer the group's images are to it than the others', in standard deviations (Cohen's d)
    p_value: float  # corrected for the number of words and groups that were tried

    def __post_init__(self) -> None:
        object.__setattr__(self, "word", one_line(self.word, WORD_LIMIT))


@dataclass(frozen=True)
class GroupWords:
    """The words that separate one group from the others."""

    prompt: int | None  # index of the prompt in the audit; None over all prompts that the factor splits
    factor: int
    group: int  # the column of W
    words: tuple[Word, ...]  # best first; none where no word passes the test
    note: str  # why there is none, in words; else ""

    @property
    def line(self) -> str:
        """The words in one line, such as "water, sea, boat"; else why there is none."""
        return ", ".join(word.word for word in self.words) or one_line(self.note, 200)


@dataclass(frozen=True)
class AuditWords:
    """Words for every group of an audit: opinions of one CLIP model, tested but not proven."""

    model: str  # the last part of the CLIP model's hub id or folder
    audit: str  # fingerprint of the audit, as inferred
    vocabulary: int  # how many words it chose from
    images: int  # how many images it was shown
    level: float  # chance, for one prompt, that any word passes where groups look alike to the model
    groups: tuple[GroupWords, ...]

    def of(self, prompt: int | None, group: int, factor: int = 0) -> GroupWords | None:
        """The words of a group under a prompt, or over all prompts for None; None where it has no entry."""
        return next((e for e in self.groups if (e.prompt, e.factor, e.group) == (prompt, factor, group)), None)


@dataclass(frozen=True, eq=False)
class Audit:
    """Hidden factors of a captioned image set, each with an indicator matrix W of its groups, and why."""

    group_weights: tuple[NDArray[np.float32], ...]
    """W of each hidden factor, (N, E_m), rows on the simplex; uniform under prompts that it does not split and,
    over the groups there, for images of which nothing is known (see `known_rows`), zeros where people left the image
    out. One uniform W where no factor was found."""
    scores: NDArray[np.float32]
    """(M, N), a row for each W: the evidence that decided, standardised within the prompt; the rarer group is high."""
    prompt_ids: NDArray[np.int64]
    """(N,) index into `prompts`."""
    prompts: list[PromptAudit]
    """The result under each prompt."""
    factors: list[Factor]
    """The hidden factors, in the order of `group_weights`; none where nothing was found."""
    names: list[str]
    """Names of the images."""
    forwards_per_image: float
    """Denoiser forwards spent on each image, everything included."""
    settings: dict[str, Any]
    """The `AuditConfig`, and fingerprints of model and data."""
    edits: Edits = field(default_factory=Edits)
    """People's edits, which are in this audit already."""
    inferred: Audit | None = None
    """The audit before people's edits; None where there are none."""
    words: AuditWords | None = None
    """Words that separate its groups, as inferred; None where no CLIP model was asked."""
    judges: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Linear judges of its groups, as inferred, for images that the model draws: see `probe.linear_judges`."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Name to reason of the images that could not be read; they are not among `names`."""

    def __repr__(self) -> str:
        prompts = listed([repr(one_line(of.prompt, WORD_LIMIT)) for of in self.prompts])
        factors = listed([f"{of.name} ({self.num_groups[m]} groups)" for m, of in enumerate(self.factors)])
        return f"Audit({len(self.names):,} images; prompts: {prompts}; factors: {factors})"

    @property
    def biased(self) -> bool:
        """Whether any hidden factor was found."""
        return bool(self.factors)

    @property
    def num_groups(self) -> tuple[int, ...]:
        """E of each hidden factor."""
        return tuple(weights.shape[1] for weights in self.group_weights)

    @property
    def group_names(self) -> tuple[tuple[str, ...], ...]:
        """Names that people gave to groups, or asked for, [factor][group], "" for none; empty where none has one."""
        names = list[tuple[str, ...]]()
        for m, size in enumerate(self.num_groups):
            given = self.edits.names[m] if m < len(self.edits.names) else ("",) * size
            values = (self.factors[m].values if self.factors else []) or ("",) * size
            names.append(tuple(name or one_line(value, WORD_LIMIT) for name, value in zip(given, values, strict=True)))
        return tuple(names) if any(map(any, names)) else ()

    def group_name(self, group: int, factor: int = 0) -> str:
        """What people call a group, else the value that was asked for, else its number, such as "group 0"."""
        return (self.group_names[factor][group] if self.group_names else "") or f"group {group}"

    @property
    def asked(self) -> str:
        """How groups were asked for, in sentences; "" where they were sought."""
        return about_asked(self.settings.get("asked", {}))

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Whether each image counts, (N,): all do that people did not leave out."""
        return np.all([weights.any(axis=1) for weights in self.group_weights], axis=0)

    @property
    def caveats(self) -> str:
        """Sentences on factors of some prompts alone, and on images that the model drew itself; "" without."""
        found = sum(prompt.found for prompt in self.prompts)
        own = []
        for factor in (factor for factor in self.factors if len(factor.splits) < found):
            prompts = [repr(one_line(self.prompts[split.prompt].prompt, WORD_LIMIT)) for split in factor.splits]
            own.append(f"{factor.name} was found under {listed(prompts, 2)} alone")
        of_groups = f"{', '.join(own)}; under other prompts such groups have no meaning." if own else ""
        of_images = "The images are the model's own, drawn for the audit." if "own_images_of" in self.settings else ""
        return " ".join(filter(None, [of_groups, of_images]))

    def split(self, factor: int, prompt: int) -> PromptSplit | None:
        """How a factor splits a prompt, both by index; None where it does not."""
        splits = self.factors[factor].splits if factor < len(self.factors) else []
        return next((split for split in splits if split.prompt == prompt), None)

    def rare(self, factor: int = 0) -> NDArray[np.bool_]:
        """Whether each image is in the smallest group of a prompt that the factor splits, (N,).

        Never an image that was left out or of which nothing is known, nor one of a prompt whose images people put in a
        single group.
        """
        rare = np.full(len(self.prompts), -1)
        for split in self.factors[factor].splits if self.factors else ():
            present = [(share, group) for group, share in enumerate(split.shares) if share > 0]
            if len(present) > 1:
                rare[split.prompt] = min(present)[1]
        weights = self.group_weights[factor]
        return (weights.argmax(axis=1) == rare[self.prompt_ids]) & self.kept & known_rows(weights)

    @property
    def fingerprint(self) -> str:
        """A digest of groups and prompts, people's edits to them included; names do not count."""
        return fingerprint(*(weights.tobytes() for weights in self.group_weights), self.prompt_ids.tobytes())

    def has_trained(self, record: Mapping[str, Any]) -> bool:
        """Whether guidance of this record was trained with this audit, as it is or as it was inferred."""
        return record.get("audit") in (self.fingerprint, (self.inferred or self).fingerprint)

    def check_matches(self, data: EncodedImages, denoiser_fingerprint: str) -> None:
        """Raise `AuditError` unless the audit is of exactly these images and this model."""
        model = self.settings["denoiser_fingerprint"]
        adapted = "".join(f" with LoRA {name}" for name in self.settings.get("loras", ()))
        resolution = self.settings.get("resolution", data.resolution)
        if model != denoiser_fingerprint:
            raise AuditError(
                f"Expected the model that was audited (fingerprint {model}{adapted}), got another "
                f"({denoiser_fingerprint}): other weights, another precision, noise schedule or LoRA. Audit it first."
            )
        if resolution != data.resolution:
            raise AuditError(f"Expected images of {resolution} pixels, as they were audited, got {data.resolution}.")
        self.check_images(data.data_fingerprint, data.names)

    def check_images(self, fingerprint: str, names: Sequence[str] | None = None) -> None:
        """Raise `AuditError` unless it is of the images of this fingerprint and, where given, of these names."""
        images = self.settings["data_fingerprint"]
        if images != fingerprint or names not in (None, self.names):
            others = fingerprint if names is None else f"{len(names)}, fingerprint {fingerprint}"
            audited = f"the images that were audited ({len(self.names)}, fingerprint {images})"
            remedy = "give those that were audited, with the same captions and options, such as --split."
            raise AuditError(f"Expected {audited}, got others ({others}). Audit these first, or {remedy}")

    def check_found(self) -> None:
        """Raise `AuditError` where there is nothing to balance."""
        if not self.biased:
            wanted = "an audit that found a hidden group, got one that found none: there is nothing to balance"
            more = "" if self.asked else "; `audit --solver exact` would split the images regardless"
            raise AuditError(f"Expected {wanted}. See the reasons in its audit.json{more}.")

    def save(self, folder: str | Path) -> Path:
        """Write `audit.safetensors` and `audit.json` to `folder`, as inferred, and words and edits beside them.

        Edits to the same audit that lie there already stay, unless this one has others; edits to another audit are
        neither applied nor lost. A file that gives way is renamed to `curation-<fingerprint>.json`. Words for the
        groups of another audit are deleted.
        """
        folder, before = Path(folder), self.inferred or self
        parts = {name: getattr(before, name) for name in ("group_weights", "prompts", "factors")}
        plain = replace(self, **parts, inferred=None, edits=Edits())
        edited = apply(plain, replace(self.edits, audit=""))
        if any(getattr(edited, part) != getattr(self, part) for part in ("fingerprint", "prompts", "factors")):
            # Groups were replaced after the edits, of which only names still fit.
            plain = replace(self, inferred=None, edits=Edits())
            edited = apply(plain, Edits(names=self.edits.names))
        edited.put_aside(folder)
        arrays = {f"group_weights.{m}": weights for m, weights in enumerate(plain.group_weights)}
        write_arrays(folder / "audit.safetensors", arrays | {"scores": plain.scores, "prompt_ids": plain.prompt_ids})
        write_arrays(folder / JUDGES, plain.judges)
        document = {"fingerprint": plain.fingerprint, "biased": plain.biased, "num_groups": plain.num_groups}
        document |= {name: getattr(plain, name) for name in IN_JSON}
        document |= {name: list(map(asdict, getattr(plain, name))) for name in ("factors", "prompts")}
        write_json(folder / "audit.json", document)
        try:
            _read_words(folder, plain.fingerprint)
        except AuditError:
            (folder / WORDS).unlink()
        if plain.words is not None and plain.words.audit == plain.fingerprint:
            write_json(folder / WORDS, asdict(plain.words))
        if edited.edits.changed:
            edited.save_edits(folder)
        return folder

    def save_edits(self, folder: str | Path) -> None:
        """Write people's edits beside this audit, which lies in `folder` already; without edits, remove the file."""
        path, edits = Path(folder) / CURATION, self.edits
        if not edits.changed:
            path.unlink(missing_ok=True)
            return
        cuts = [
            {"factor": factor, "prompt": index, "caption": self.prompts[index].prompt, "scores": cuts}
            for (factor, index), cuts in edits.cuts.items()
        ]
        left_out = [{"position": position, "image": self.names[position]} for position in edits.left_out]
        write_json(path, {"audit": edits.audit, "names": edits.names, "left_out": left_out, "cuts": cuts})

    def put_aside(self, folder: str | Path) -> Path | None:
        """Rename edits in `folder` that are not to this audit, or other than its own if it has any; the new path."""
        try:
            found = read_edits(self.inferred or self, Path(folder)).edits
            given_way = found.changed and self.edits.changed and found != self.edits
        except AuditError:
            given_way = True
        return put_aside(Path(folder) / CURATION) if given_way else None

    @classmethod
    def load(cls, folder: str | Path, *, edited: bool = True) -> Audit:
        """Read an audit that `save` wrote, with people's edits unless `edited` is false.

        `AuditError` where `folder` is no audit, or its edits or words are damaged or of another audit.
        """
        folder = Path(folder)
        if not (folder / "audit.json").is_file():
            raise AuditError(f"Expected an audit folder at {folder}, found no audit.json. Run `invdiff audit`.")
        try:
            document = read_json(folder / "audit.json")
            arrays = read_arrays(folder / "audit.safetensors")
            kinds: dict[str, Any] = get_type_hints(cls)
            fields = {name: typed(kinds[name], document[name]) for name in IN_JSON}
            weights = tuple(arrays[f"group_weights.{m}"] for m in range(len(fields["factors"]) or 1))
            fields["judges"] = read_arrays(folder / JUDGES) if (folder / JUDGES).is_file() else {}
            found = cls(weights, arrays["scores"], arrays["prompt_ids"], **fields)
            prompts, count = np.arange(len(found.prompts)), len(found.names)
            sized = list(zip(found.factors, found.num_groups, strict=False))
            splits = [(s, size) for factor, size in sized for s in factor.splits]
            known = all(s.prompt in prompts and len(s.shares) == len(s.intervals) == size for s, size in splits)
            typed(dict[str, dict[str, Any]], found.settings.get("asked", {}))
            known &= all(len(of.values) in (0, size) for of, size in sized)
            if not (known and np.isin(found.prompt_ids, prompts).all()):
                raise ValueError("images or splits of groups or prompts that the audit lacks")
            whole = all(len(array) == count for array in (*weights, found.prompt_ids, found.scores.T))
            finite = all(np.isfinite(array).all() for array in arrays.values())
            if found.scores.shape != (len(weights), count) or not (whole and finite):
                raise ValueError(f"arrays that are not one finite row for each of {count} images")
            if document["fingerprint"] != found.fingerprint:  # a run was stopped between the two files
                raise ValueError("audit.json and audit.safetensors of two audits")
        except (KeyError, IndexError, TypeError, ValueError, DataError) as error:
            raise AuditError(found_else(f"an audit in {folder}", error, "Run `invdiff audit` again.")) from error
        found = replace(found, words=_read_words(folder, found.fingerprint))
        return read_edits(found, folder) if edited else found


def _read_words(folder: Path, audit: str) -> AuditWords | None:
    """The words beside an audit of this fingerprint, as inferred; `AuditError` where damaged or of another audit."""
    if not (path := folder / WORDS).is_file():
        return None
    try:
        found: AuditWords = typed(AuditWords, read_json(path))
        if found.audit != audit:
            raise ValueError(f"those of another ({one_line(found.audit, 20)})")
        return replace(found, model=one_line(found.model, 200))
    except (KeyError, TypeError, ValueError, DataError) as error:
        remedy = "Delete it, or run `invdiff audit` again with --words-model."
        raise AuditError(found_else(f"words for groups of the audit {audit} in {path}", error, remedy)) from error
