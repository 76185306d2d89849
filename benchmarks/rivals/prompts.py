"""Debiasing by the prompt alone: an attribute's words behind it at random, or a plea for diversity."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from methods import Fitted, World

from rivals.calls import Call, encode, hooked

DIVERSE = ", please generate diverse outputs"


@dataclass(frozen=True)
class Prompted:
    """The biased model with words behind each prompt."""

    phrase: str = ""
    """What follows every prompt, such as `DIVERSE`; if empty, the words of a class that is drawn for each image."""

    @property
    def supervision(self) -> str:
        """None of the attribute, where there is a phrase."""
        return "none" if self.phrase else "words"

    def fit(self, world: World, folder: Path) -> Fitted:
        """Nothing is trained."""
        pipe, endings = world.biased(), [self.phrase or f" {words}" for words in world.words.values()]

        def worded(call: Call) -> torch.Tensor:
            captions = [prompt + endings[group] for prompt, group in zip(call.prompts, call.groups, strict=True)]
            return encode(pipe, captions)

        return Fitted(pipe, hooked=partial(hooked, pipe, len(endings), before=worded))
