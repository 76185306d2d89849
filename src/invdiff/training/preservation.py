"""Captions that have nothing to do with the images: guidance learns to leave the model as it is under them."""

import dataclasses
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..assets import EVERYDAY_CAPTIONS
from ..auditing.captions import PROBES, group_captions, words_in
from ..config import AuditConfig
from ..data.encode import EncodedImages, encode_captions
from ..models.families import Condition
from ..models.families.base import joined
from ..models.frozen import Denoiser
from ..progress import note

AT_ONCE = 16  # captions that are encoded together


def unrelated_captions(captions: Sequence[str]) -> list[str]:
    """The bundled captions of everyday things without the last word of any of `captions`, mostly what it is of.

    Nor is their own last word one of `captions`.
    """
    subjects = {word for caption in captions for word in words_in(caption)[-1:]}
    words = set(chain.from_iterable(map(words_in, captions)))
    everyday = [(each, words_in(each)) for each in EVERYDAY_CAPTIONS.read_text("utf-8").splitlines()]
    return [each for each, own in everyday if not subjects & {*own} and own[-1] not in words]


def unrelated_condition(
    pipe: Any, denoiser: Denoiser, data: EncodedImages, images: torch.Tensor, seed: int
) -> Condition:
    """The condition of each of `unrelated_captions`, or of the classes that no image has; on the CPU.

    Those that the model takes for a caption of the images are left out, as for a small model that was fitted to those
    alone; it is tried on a few of `images`, (n,) rows of `data`. Empty for an unconditional model, and where the
    pipeline's text encoder was dropped.
    """
    if "class_labels" in data.conditions:
        *used, null = data.conditions["class_labels"].tolist()
        others = sorted({*range(null)} - {*used})
        return {"class_labels": torch.tensor(others)} if others else {}
    if not data.conditions:
        return {}
    if getattr(pipe, "text_encoder", pipe) is None:
        note("captions that nobody audited are not held to the frozen model: the pipeline has no text encoder")
        return {}
    captions, count = unrelated_captions(data.captions), len(data.captions)
    if not captions:
        return {}
    found = joined([encode_captions(pipe, captions[i : i + AT_ONCE]) for i in range(0, len(captions), AT_ONCE)])
    every = {name: torch.cat([of[:-1], found[name], of[-1:]]) for name, of in data.conditions.items() if found}
    tried = images[:PROBES]
    of_images: Any = {"latents": data.latents[tried], "caption_ids": data.caption_ids[tried], "names": tried.tolist()}
    both = dataclasses.replace(data, captions=[*data.captions, *captions], conditions=every, **of_images)
    prompts, _ = group_captions(denoiser, both, AuditConfig.caption_threshold, seed)
    told = torch.from_numpy(~np.isin(prompts[count:], prompts[:count]))
    return {name: of[told] for name, of in found.items()} if told.any() else {}
