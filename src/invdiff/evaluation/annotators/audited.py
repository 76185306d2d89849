"""An audit as an annotator: the groups it found, read off the audited model's own features."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.special import softmax

from ...data.encode import model_fingerprint, pixel_values
from ...errors import DataError, ModelError, found_else
from ...files import CURATION, JUDGES, fingerprint, read_arrays, read_json
from ...models.families import family_that_draws
from ...models.features import add_noise, read_features
from ...models.frozen import FrozenDenoiser, denoiser_fingerprint
from ...models.load import DTYPES, denoiser_of, load_pipeline
from ...seeds import generator
from ..results import AUDIT
from .annotations import Annotations, class_names
from .heldout import HeldOut, Measurable

BATCH_SIZE = 32


class AuditAnnotator(Measurable):
    """The groups that an audit in `folder` found, of any images, as the pipeline that was audited sees them.

    The pipeline, or its folder or hub id, which is loaded in the precision of the audit, with `loras` fused into it.

    An image is encoded, noised as in the audit and shown to the denoiser without caption; a linear map of its features
    decides. `confusion` is of training images that were left out, as the audit grouped them where it was sure. The
    judge shares its eyes with the audit: what neither sees, it does not count.
    """

    name, feature_name = AUDIT, ""
    note = (
        "the annotator is the audit itself, and they share their eyes: it counts the groups that were found, by the "
        "same features, so it shares the audit's mistakes, and its errors are known by the audit's own groups only; "
        "an independent annotator is the better proof"
    )

    def __init__(self, folder: str | Path, pipe: Any, *, loras: Sequence[str] = ()) -> None:
        folder = Path(folder)
        try:
            document, self._judges = read_json(folder / "audit.json"), read_arrays(folder / JUDGES)
            settings, self.fingerprint, classes = document["settings"], document["fingerprint"], {}
            self.prompts = [each["prompt"] for each in document["prompts"] if each["found"]]
            self.resolution, self._levels = settings["resolution"], settings["feature_log_snr"]
            self._places = {f["name"]: m for m, f in enumerate(document["factors"]) if f"map.{m}" in self._judges}
            self.unjudged = [f["name"] for f in document["factors"] if f["name"] not in self._places]
            self.splits: dict[str, list[str]] = {}
            self.unsplit: dict[str, set[str]] = {}  # factor to wordings of audited prompts that it does not split
            for name, m in self._places.items():
                groups = [f"group {group}" for group in range(len(self._judges[f"bias.{m}"]))]
                classes[name] = document["factors"][m].get("values") or groups
                split = [each["prompt"] for each in document["factors"][m]["splits"]]
                self.splits[name] = [document["prompts"][place]["prompt"] for place in split]
                others = [prompt for place, prompt in enumerate(document["prompts"]) if place not in split]
                self.unsplit[name] = {words for each in others for words in (each["prompt"], *each["captions"])}
            self.attributes = class_names(classes)
            probabilities, truth = self._of_factors("probabilities"), self._of_factors("truth")
            self.use_held_out(HeldOut(self.attributes, probabilities, truth=truth))
            model = settings["denoiser_fingerprint"], settings["model_fingerprint"]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, DataError) as error:
            remedy = "Run `invdiff audit` again; of a factor with few images in a group there is no judge."
            raise ModelError(found_else(f"an audit with judges in {folder}", error, remedy)) from error
        if isinstance(pipe, str | Path):
            pipe = load_pipeline(pipe, loras=loras, dtype=DTYPES.get(settings.get("dtype")))
        if model != (denoiser_fingerprint(pipe), model_fingerprint(pipe)):
            asked = f"the model that was audited in {folder}, its precision and LoRAs"
            raise ModelError(f"Expected {asked}, got another. Give it.")
        for name, own in self.splits.items():
            if len(own) < len(self.prompts):
                alone = ", ".join(map(repr, own))
                self.note += f"; {name} splits {alone} alone: other audited prompts have no figures"
        if (folder / CURATION).is_file():
            self.note += f"; it counts groups as they were inferred, without the changes of people in {CURATION}"
        self._pipe, self.network = pipe, denoiser_of(pipe)

    def _of_factors(self, kind: str) -> dict[str, Any]:
        return {name: self._judges[f"{kind}.{m}"] for name, m in self._places.items()}

    @torch.no_grad()
    def predict(self, images: Iterable[Image.Image]) -> Annotations:
        """Annotate `images`, a batch at a time; an image's noises follow from its pixels, whatever is beside it."""
        family = family_that_draws(self._pipe)
        null = family.null_condition(self._pipe) if family.needs_prompts else {}
        maps, biases = self._of_factors("map"), self._of_factors("bias")
        found = {name: [np.zeros((0, len(classes)), np.float32)] for name, classes in self.attributes.items()}
        with FrozenDenoiser(self._pipe, upper=True) as frozen:
            stream = iter(images)
            while batch := list(islice(stream, BATCH_SIZE)):
                pixels = torch.stack([pixel_values(image.convert("RGB"), self.resolution) for image in batch])
                latents = family.encode_images(self._pipe, pixels)
                rngs = [generator("judge", fingerprint(each.numpy().tobytes())) for each in pixels]
                condition = {name: values.expand(len(batch), *values.shape[1:]) for name, values in null.items()}
                parts = []
                for level in self._levels:
                    noisy_latents, timesteps, _ = add_noise(frozen, latents, level, rngs)
                    parts += read_features(frozen, noisy_latents, timesteps, condition)
                features = torch.cat(parts, dim=1).double().numpy()
                for name, classes in found.items():
                    classes.append(softmax(features @ maps[name] + biases[name], axis=1).astype(np.float32))
        return Annotations(self.attributes, {name: np.concatenate(parts) for name, parts in found.items()})
