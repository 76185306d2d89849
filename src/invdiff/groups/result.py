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
    """W of each hidden factor, (N, E_m), rows on the simplex; uniform where no group was found."""
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

    @property
    def biased(self) -> bool:
        """Whether any prompt hides a group."""
        return any(prompt.found for prompt in self.prompts)

    @property
    def num_groups(self) -> tuple[int, ...]:
        """E of each hidden factor."""
        return tuple(weights.shape[1] for weights in self.group_weights)

    @property
    def in_rare_group(self) -> torch.Tensor:
        """Whether each image is in the smallest group of a prompt that hides one, (N,) bool, by factor 0."""
        labels = self.group_weights[0].argmax(dim=1)
        rare = torch.zeros(len(labels), dtype=torch.bool)
        for index, prompt in enumerate(self.prompts):
            if prompt.found:
                present = [group for group, share in enumerate(prompt.shares) if share > 0]
                smallest = min(present, key=prompt.shares.__getitem__)
                rare |= (self.prompt_ids == index) & (labels == smallest)
        return rare

    @property
    def fingerprint(self) -> str:
        """A digest of groups and prompts."""
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

    def save(self, folder: str | Path) -> Path:
        """Write `audit.safetensors` and `audit.json` to `folder`."""
        folder = Path(folder)
        tensors = {f"group_weights.{m}": weights for m, weights in enumerate(self.group_weights)}
        tensors |= {"scores": self.scores, "prompt_ids": self.prompt_ids}
        write_tensors(folder / "audit.safetensors", tensors)
        document = {
            "biased": self.biased,
            "num_groups": list(self.num_groups),
            "forwards_per_image": self.forwards_per_image,
            "prompts": [dataclasses.asdict(prompt) for prompt in self.prompts],
            "settings": self.settings,
            "names": self.names,
        }
        write_json(folder / "audit.json", document)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Audit:
        """Read what `save` wrote.

        Raises:
            AuditError: `folder` is not an audit.
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
        return cls(
            group_weights=tuple(tensors[f"group_weights.{m}"] for m in range(len(document["num_groups"]))),
            scores=tensors["scores"],
            prompt_ids=tensors["prompt_ids"],
            prompts=prompts,
            names=document["names"],
            forwards_per_image=document["forwards_per_image"],
            settings=document["settings"],
        )
