"""The closed loop: the mix of groups at which the images themselves reach the target, for each guidance scale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.optimize import minimize

from ..config import GenerateConfig
from ..errors import ConfigError
from ..progress import note
from ..sampling import MANIFEST, generate
from .annotate import describe_images
from .annotators.audited import AuditAnnotator
from .annotators.heldout import HeldOut
from .fairness.correction import correct_for_annotator
from .images import read_images

NEAR = 0.05
"""A share this far from the target counts as reached."""


def calibrate(
    pipe: Any,
    module: Any,
    audit_dir: str | Path,
    output_dir: str | Path,
    *,
    guidance_scales: Sequence[float] = (3.0, 7.5),
    images: int = 64,
    seed: int = 1,
    progress: bool = True,
) -> Any:
    """Solve for the mix of groups under which images show every group equally often, and save it with the guidance.

    At each guidance scale, `images` are drawn of each audited prompt and group, the audit itself judges them (never
    an annotator that proves the result), and its counts are corrected for how it errs. Where no mix gives even
    shares, the nearest is taken and said. `generate(..., environments="calibrated")` draws by it. An interrupted run
    goes on.

    Args:
        pipe: The pipeline that was audited.
        module: What `train` returned, in `balanced` mode.
        audit_dir: The folder of the audit that it was trained on.
        output_dir: The folder of the guidance, written anew.
        guidance_scales: Strengths of classifier-free guidance that images will be drawn at.
        images: Images of each prompt and group.
        seed: Seed of the images. It should not be that of the images which prove the result.
        progress: Show progress bars.

    Raises:
        ConfigError: The guidance is invariant and takes no mix.
        ModelError: The audit has no judge of its groups, or is of another model.
    """
    if not module.sees_environment:
        raise ConfigError("Expected guidance in balanced mode, got an invariant one, which takes no mix of groups.")
    judge, output_dir, mixes = AuditAnnotator(audit_dir, pipe), Path(output_dir), dict(module.config["mixes"] or {})
    prompts, held_out = judge.prompts, cast(HeldOut, judge.held_out)
    confusions = {name: held_out.confusion(name) for name in judge.attributes}
    for scale in guidance_scales:
        sizes = {"images_per_prompt": images * max(module.num_groups), "seed": seed, "resolution": judge.resolution}
        config = GenerateConfig(**sizes, guidance_scale=scale)
        folder = output_dir / ".calibration" / f"{scale:g}"
        generate(pipe, prompts, folder, module=module, config=config, progress=progress)
        lines = (folder / MANIFEST).read_text("utf-8").splitlines()
        drawn = np.array([json.loads(line)["environment"] for line in lines])
        seen = describe_images(read_images(folder), judge, progress=progress)
        of_prompt = np.arange(len(drawn)) // sizes["images_per_prompt"]
        mixes[f"{scale:g}"] = {prompt: [[1 / size] * size for size in module.num_groups] for prompt in prompts}
        for factor, name in enumerate(module.factor_names):
            size = module.num_groups[factor]
            for index, prompt in enumerate(prompts):
                if prompt not in judge.splits.get(name, ()):  # there is no judge, or the factor says nothing of it
                    continue
                rows = of_prompt == index
                counts = np.zeros((size, size + 1))
                np.add.at(counts, (drawn[rows, factor], seen.classes[name][rows]), 1)
                mix, reached = nearest_mix(counts, confusions[name], np.full(size, 1 / size))
                mixes[f"{scale:g}"][prompt][factor] = mix.round(4).tolist()
                if np.abs(reached - 1 / size).max() > NEAR:
                    found = " / ".join(f"{share:.0%}" for share in reached)
                    note(f"At guidance scale {scale:g} no mix of {name} evens {prompt!r}: the nearest is {found}.")
    module.register_to_config(mixes=mixes)
    module.save_pretrained(output_dir)
    shutil.rmtree(output_dir / ".calibration", ignore_errors=True)
    return module


def nearest_mix(counts: np.ndarray, confusion: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mix pi (E,) whose images have shares pi S nearest to the target (E,), and those shares.

    S, (E, E), holds in row e the shares of the groups that images drawn for group e show: the judge's `counts` of
    them, (E, E + 1), corrected for its held-out `confusion`, (E, E + 1).
    """
    count, shares = len(target), correct_for_annotator(counts, confusion) / counts.sum(axis=1, keepdims=True)
    # A little of the even mix, so that there is one answer where several reach the target.
    even = np.full(count, 1 / count)
    found = minimize(
        lambda mix: ((mix @ shares - target) ** 2).sum() + 1e-6 * ((mix - even) ** 2).sum(),
        even,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda mix: mix.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12},
    )
    mix = np.clip(found.x, 0, 1) / np.clip(found.x, 0, 1).sum()
    return mix, mix @ shares
