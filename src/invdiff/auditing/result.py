"""What an audit found, as an object and as a folder of safetensors and JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.encode import EncodedImages
from ..errors import AuditError
from ..files import fingerprint, read_json, read_tensors, write_json, write_tensors
from .edits import CURATION, Curation, curated, put_aside, read_curation, rename_aside
from .words import AuditWords, remove_words_of_others


@dataclass(frozen=True)
class Candidate:
    """One way to split a prompt's images, with the figures it is judged by."""

    evidence: str
    """Where the scores come from, such as "contrast at 0.95" or "features at 0.05, component 3"."""
    num_groups: int
    """E."""
    shares: list[float]
    """Share of the prompt's images in each group."""
    stability: float
    """Adjusted Rand index of the groups found from independent noises; 1 is perfect, 0 is chance."""
    separation: float
    """Depth of the shallowest valley between neighbouring groups, 0 for none, 1 for a gap."""
    accepted: bool
    """Whether it passes every threshold."""


@dataclass(frozen=True)
class PromptAudit:
    """What was found under one prompt: captions that mean the same to the model."""

    prompt: str
    """The most frequent of the captions."""
    captions: list[str]
    """All of them."""
    num_images: int
    """Images with one of these captions."""
    found: bool
    """Whether a hidden group was found."""
    reason: str
    """Why, or why not, in words."""
    evidence: str = ""
    """The evidence that decided."""
    shares: list[float] = field(default_factory=list)
    """Share of each group, in the order of the columns of W."""
    stability: float = 0.0
    """See `Candidate`."""
    separation: float = 0.0
    """See `Candidate`."""
    candidates: list[Candidate] = field(default_factory=list)
    """Every split that was considered, best first."""


@dataclass(frozen=True, eq=False)
class Audit:
    """Hidden groups of a captioned image set: one indicator matrix W per hidden factor, and why."""

    group_weights: tuple[torch.Tensor, ...]
    """W of each hidden factor, (N, E_m), rows on the simplex; uniform where no group was found, zeros where people
    left the image out."""
    scores: torch.Tensor
    """(N,) the evidence that decided, standardised within the prompt: high for the rarer group."""
    prompt_ids: torch.Tensor
    """(N,) index into `prompts`."""
    prompts: list[PromptAudit]
    """What was found under each prompt."""
    names: list[str]
    """Names of the images."""
    forwards_per_image: float
    """Denoiser forwards spent on each image, everything included."""
    settings: dict[str, Any]
    """The `AuditConfig`, and fingerprints of model and data."""
    group_names: tuple[tuple[str, ...], ...] = ()
    """What people called the groups, [factor][group], "" where nobody named one; empty where nobody named any."""
    curation: Curation = field(default_factory=Curation)
    """People's changes that are in this audit already."""
    inferred: Audit | None = None
    """The audit before people's changes; None where there are none."""
    words: AuditWords | None = None
    """What tells its groups apart, as inferred, in a CLIP model's words; None where nobody asked, and once loaded:
    `read_words` reads them."""

    @property
    def biased(self) -> bool:
        """Whether any prompt hides a group."""
        return any(prompt.found for prompt in self.prompts)

    @property
    def num_groups(self) -> tuple[int, ...]:
        """E of each hidden factor."""
        return tuple(weights.shape[1] for weights in self.group_weights)

    @property
    def kept(self) -> torch.Tensor:
        """Whether each image counts, (N,) bool: all do that people did not leave out."""
        return torch.stack([weights.any(dim=1) for weights in self.group_weights]).all(dim=0)

    @property
    def in_rare_group(self) -> torch.Tensor:
        """Whether each image is in the smallest group of a prompt that hides one, (N,) bool, by factor 0.

        Never an image that was left out, nor one of a prompt whose images people put in a single group.
        """
        labels = self.group_weights[0].argmax(dim=1)
        rare = torch.zeros(len(labels), dtype=torch.bool)
        for index, prompt in enumerate(self.prompts):
            if prompt.found:
                present = [group for group, share in enumerate(prompt.shares) if share > 0]
                smallest = min(present, key=prompt.shares.__getitem__)
                if len(present) > 1:
                    rare |= (self.prompt_ids == index) & (labels == smallest)
        return rare & self.kept

    @property
    def fingerprint(self) -> str:
        """A digest of groups and prompts, people's changes to them included; names do not count."""
        tensors = (*self.group_weights, self.prompt_ids)
        return fingerprint(*(tensor.numpy().tobytes() for tensor in tensors))

    def check_matches(self, data: EncodedImages, denoiser_fingerprint: str) -> None:
        """Raise `AuditError` unless the audit is of exactly these images and this model."""
        audited = self.settings["denoiser_fingerprint"]
        if audited != denoiser_fingerprint:
            raise AuditError(
                f"Expected the denoiser that was audited (fingerprint {audited}), got another "
                f"({denoiser_fingerprint}): other weights, another precision or another noise schedule. "
                "Audit this model first."
            )
        resolution = self.settings.get("resolution", data.resolution)
        if resolution != data.resolution:
            raise AuditError(
                f"Expected images of {resolution} pixels, as they were audited, got {data.resolution}. Encode them "
                "so, or audit these."
            )
        if self.settings["data_fingerprint"] != data.data_fingerprint or self.names != data.names:
            raise AuditError(
                f"Expected the images that were audited ({len(self.names)}, fingerprint "
                f"{self.settings['data_fingerprint']}), got others ({len(data)}, {data.data_fingerprint}). "
                "Audit this data first, or give the data that the audit was made on."
            )

    def check_found(self) -> None:
        """Raise `AuditError` where there is nothing to balance."""
        if not self.biased:
            raise AuditError(
                "Expected an audit that found a hidden group, got one that found none: there is nothing to "
                "balance. See the reasons in its audit.json; solver 'exact' would split the images regardless."
            )

    def with_curation(self, curation: Curation) -> Audit:
        """Return this audit with people's changes applied to it as it was inferred; earlier changes are gone.

        Raises:
            AuditError: They are changes to another audit, or leave nothing of a prompt.
        """
        plain = self.inferred or self
        names = curation.names or tuple(("",) * size for size in plain.num_groups)
        curation = dataclasses.replace(curation, audit=curation.audit or plain.fingerprint, names=names)
        document, arrays = curated(plain._document(), plain._arrays(), curation)
        if not curation.changed:
            return plain
        figures = [{name: entry[name] for name in ("num_images", "shares")} for entry in document["prompts"]]
        return dataclasses.replace(
            plain,
            group_weights=tuple(
                torch.from_numpy(arrays[f"group_weights.{m}"]) for m in range(len(plain.group_weights))
            ),
            prompts=[dataclasses.replace(p, **new) for p, new in zip(plain.prompts, figures, strict=True)],
            group_names=names if curation.named else (),
            curation=curation,
            inferred=plain,
        )

    def save(self, folder: str | Path) -> Path:
        """Write `audit.safetensors` and `audit.json` to `folder`, as inferred, and people's changes beside them.

        So `load` returns the same audit, and its changes can still be taken back. Changes to the same audit that lie
        there already stay, unless this one has others; changes to another audit are neither applied nor lost. What
        gives way is renamed to `curation-<fingerprint>.json`. Words for the groups of another audit are deleted.
        """
        folder = Path(folder)
        self.put_aside(folder)
        audit, curation = self._as_inferred()
        document = audit._document()
        remove_words_of_others(folder, audit.fingerprint)
        write_tensors(folder / "audit.safetensors", audit._tensors())
        write_json(folder / "audit.json", document)
        if audit.words is not None and audit.words.audit == audit.fingerprint:
            audit.words.save(folder)
        if curation.changed:
            if (folder / CURATION).is_file() and read_curation(folder, document, audit._arrays()) != curation:
                rename_aside(folder / CURATION)
            curation.save(folder)
        return folder

    def put_aside(self, folder: str | Path) -> Path | None:
        """Rename people's changes in `folder` that are not to this audit, as `save` does; return their new place."""
        audit, _ = self._as_inferred()
        return put_aside(Path(folder), audit._document(), audit._arrays())

    def _as_inferred(self) -> tuple[Audit, Curation]:
        """Return the audit before people's changes, and the changes.

        One whose groups were replaced after the changes is an audit of its own: only the names are changes to it.
        """
        if self.inferred is not None:
            expected = self.inferred.with_curation(self.curation)
            if (self.fingerprint, self.prompts) == (expected.fingerprint, expected.prompts):
                weights, prompts = self.inferred.group_weights, self.inferred.prompts
                return dataclasses.replace(self, group_weights=weights, prompts=prompts), self.curation
        return self, Curation(self.fingerprint, self.group_names)

    def _tensors(self) -> dict[str, torch.Tensor]:
        weights = {f"group_weights.{m}": weights for m, weights in enumerate(self.group_weights)}
        return weights | {"scores": self.scores, "prompt_ids": self.prompt_ids}

    def _arrays(self) -> dict[str, Any]:
        return {name: tensor.numpy() for name, tensor in self._tensors().items()}

    def _document(self) -> dict[str, Any]:
        return {
            "biased": self.biased,
            "num_groups": list(self.num_groups),
            "forwards_per_image": self.forwards_per_image,
            "prompts": [dataclasses.asdict(prompt) for prompt in self.prompts],
            "settings": self.settings,
            "names": self.names,
        }

    @classmethod
    def load(cls, folder: str | Path, *, curated: bool = True) -> Audit:
        """Read what `save` wrote, people's changes included.

        Args:
            folder: Of the audit.
            curated: False reads the audit as it was inferred, whatever people changed since.

        Raises:
            AuditError: `folder` is not an audit, or `curation.json` is damaged or of another audit.
        """
        folder = Path(folder)
        if not (folder / "audit.json").is_file():
            raise AuditError(f"Expected an audit folder at {folder}, found no audit.json. Run `invdiff audit`.")
        document = read_json(folder / "audit.json")
        tensors = read_tensors(folder / "audit.safetensors")
        prompts = [
            PromptAudit(**{**entry, "candidates": [Candidate(**c) for c in entry["candidates"]]})
            for entry in document["prompts"]
        ]
        found = cls(
            group_weights=tuple(tensors[f"group_weights.{m}"] for m in range(len(document["num_groups"]))),
            scores=tensors["scores"],
            prompt_ids=tensors["prompt_ids"],
            prompts=prompts,
            names=document["names"],
            forwards_per_image=document["forwards_per_image"],
            settings=document["settings"],
        )
        if not curated:
            return found
        return found.with_curation(read_curation(folder, document, {n: t.numpy() for n, t in tensors.items()}))
