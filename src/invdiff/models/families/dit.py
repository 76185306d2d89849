"""DiT: a transformer over latents conditioned on a class label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import DataError
from .base import Condition, DenoiserCall, DenoiserShape, TransformerFamily, rows_of
from .unconditional import check_own_resolution


class DiT(TransformerFamily):
    """DiT-XL/2 and its kin: a caption is a class's name, as `pipe.labels` has it, or its number."""

    title = "class-conditional DiT"

    def shape(self, denoiser: Any) -> DenoiserShape:
        """Read the block in the middle. The null class is the last."""
        return DenoiserShape(
            latent_channels=denoiser.config["in_channels"],
            feature_path=self.middle_block(denoiser),
            feature_channels=denoiser.inner_dim,
            num_classes=denoiser.config["num_embeds_ada_norm"] + 1,
        )

    def predict(
        self, denoiser: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Run the transformer and leave out the variance that it has learnt beside the noise."""
        output = denoiser(noisy_latents, timestep=timesteps, class_labels=condition["class_labels"], return_dict=False)
        return output[0][:, : denoiser.config["in_channels"]]

    def read(self, denoiser: Any, call: dict[str, Any]) -> DenoiserCall:
        """Read `hidden_states`, `timestep` and `class_labels`."""
        noisy_latents = call["hidden_states"]
        return DenoiserCall(
            noisy_latents, rows_of(call["timestep"], noisy_latents), {"class_labels": call["class_labels"]}
        )

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """Look the classes up."""
        return {"class_labels": torch.tensor([class_label(pipe, caption) for caption in captions])}

    def null_condition(self, pipe: Any) -> Condition:
        """Return the class after the last."""
        return {"class_labels": torch.tensor([pipe.transformer.config["num_embeds_ada_norm"]])}

    def encoding_key(self, pipe: Any) -> list[str]:
        """Return the names and the number of classes."""
        return [
            json.dumps(getattr(pipe, "labels", {}), sort_keys=True),
            str(pipe.transformer.config["num_embeds_ada_norm"]),
        ]

    def draw(
        self, pipe: Any, prompts: Sequence[str], *, guidance_scale: float, resolution: int, **options: Any
    ) -> Any:
        """Call the pipeline with one class label for each image."""
        check_own_resolution(self, pipe, pipe.transformer, resolution)
        labels = [class_label(pipe, prompt) for prompt in prompts]
        return pipe(class_labels=labels, guidance_scale=guidance_scale, **options)


def class_label(pipe: Any, name: str) -> int:
    """Return the number of a class by its name or by the number itself, written out.

    Raises:
        DataError: The model has no such class.
    """
    known: dict[str, int] = getattr(pipe, "labels", {})
    count = int(pipe.transformer.config["num_embeds_ada_norm"])
    text = name.strip()
    if text in known:
        return known[text]
    if text.isdecimal() and int(text) < count:
        return int(text)
    examples = f" such as {', '.join(list(known)[:3])}" if known else ""
    raise DataError(
        f"Expected the name of a class{examples}, or a number from 0 to {count - 1}, got {name!r}. "
        "A class-conditional model draws no free text."
    )
