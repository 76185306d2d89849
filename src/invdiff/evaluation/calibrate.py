"""The closed loop: the mix of groups at which the images themselves reach the target, for each guidance scale."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import nnls

from ..config import GenerateConfig
from ..distributed import is_main, wait
from ..errors import ConfigError, ModelError
from ..files import CURATION
from ..progress import note
from ..sampling import generate
from .annotate import describe_images
from .annotators.audited import AuditAnnotator
from .fairness.correction import correct_for_annotator
from .images import read_images

if TYPE_CHECKING:
    from ..guidance.base import Guidance

NEAR = 0.05  # a share this far from the target counts as reached


def calibrate(
    pipe: Any,
    module: Guidance,
    audit_dir: str | Path,
    output_dir: str | Path,
    *,
    guidance_scales: Sequence[float] = (3.0, 7.5),
    images: int = 64,
    choose_null: bool = False,
    seed: int = 1,
    progress: bool = True,
) -> Guidance:
    """Solve for the mix of groups under which images show every group equally often, and save it with the guidance.

    At each guidance scale, `images` are drawn of each audited prompt and group, the audit itself judges them (never
    an annotator that proves the result), and its counts are corrected for how it errs. Where no mix gives even
    shares, the nearest is taken and said. `generate(..., environments="calibrated")` draws by it. An interrupted run
    goes on, and scales that the guidance has mixes for are not drawn again.

    Args:
        pipe: The pipeline that was audited.
        module: What `train` returned, in `balanced` mode.
        audit_dir: The folder of the audit that it was trained on.
        output_dir: The folder of the guidance, written anew.
        guidance_scales: Strengths of classifier-free guidance that images will be drawn at.
        images: Images of each prompt and group.
        choose_null: Of `null_adapter` on and off, keep for each group the one under which more of its images, of the
            first scale above 1, show it; not where there are mixes already, or for `tokens`.
        seed: Seed of the images. It should not be that of the images which prove the result.
        progress: Show progress bars.

    Raises:
        ConfigError: The guidance is invariant and takes no mix.
        ModelError: The audit has no judge of its groups, is of another model or not what the guidance was trained on.
    """
    if not module.sees_environment:
        raise ConfigError("Expected guidance in balanced mode, got an invariant one, which takes no mix of groups.")
    mixes, work = dict(module.config["mixes"] or {}), Path(output_dir) / ".calibration"
    wanted = [scale for scale in dict.fromkeys(guidance_scales) if f"{scale:g}" not in mixes]
    if not wanted:
        return module
    judge = AuditAnnotator(audit_dir, pipe)
    if (Path(audit_dir) / CURATION).is_file():
        note(f"The mix is solved for groups as they were inferred: its judge does not know the changes in {CURATION}.")
    elif (module.config["record"] or {}).get("audit", judge.fingerprint) != judge.fingerprint:
        raise ModelError(f"Expected the audit that the guidance was trained on, got another: {audit_dir}. Give it.")
    if unjudged := [name for name in module.factor_names if name not in judge.splits]:
        note(f"The audit has no judge of {', '.join(unjudged)}: the mix of its groups stays even.")
    confusions: Any = {name: judge.confusion(name) for name in judge.attributes}
    sizes = {"images_per_prompt": images * max(module.num_groups), "seed": seed, "resolution": judge.resolution}

    def shares(null_adapter: Any, scale: float) -> dict[tuple[str, int], np.ndarray]:
        """S of each prompt and each factor that splits it, as `nearest_mix` takes it, corrected for the judge."""
        name = null_adapter if isinstance(null_adapter, str) else "chosen"
        config, folder = GenerateConfig(**sizes, guidance_scale=scale), work / f"{scale:g}-{name}"
        before = module.config["null_adapter"]
        module.register_to_config(null_adapter=null_adapter)
        try:
            generate(pipe, judge.prompts, folder, module=module, config=config, progress=progress)
        finally:  # a module that is not calibrated in the end stays as it was
            module.register_to_config(null_adapter=before)
        rows, found = read_images(folder), {}
        drawn = np.array([row.values["environment"] for row in rows])
        of_prompt = np.array([row.prompt for row in rows])
        seen = describe_images(rows, judge, progress=progress)
        for factor, name in enumerate(module.factor_names):
            for prompt in judge.splits.get(name, ()):  # none where there is no judge
                chosen, size = of_prompt == prompt, module.num_groups[factor]
                counts = np.zeros((size, size + 1))
                np.add.at(counts, (drawn[chosen, factor], seen.classes[name][chosen]), 1)
                corrected = correct_for_annotator(counts, confusions[name])
                found[prompt, factor] = corrected / counts.sum(axis=1, keepdims=True)
        return found

    null: Any = module.config["null_adapter"]
    guided = [scale for scale in wanted if scale > 1]  # else there is no null row
    known: dict[float, dict[tuple[str, int], np.ndarray]] = {}
    if choose_null and guided and not mixes and module.backend != "tokens":
        both = {each: shares(each, guided[0]) for each in (null, "on" if null == "off" else "off")}
        null = [[null] * size for size in module.num_groups]
        for factor, name in enumerate(module.factor_names):
            for group in range(module.num_groups[factor]):
                own = {w: [of[group, group] for (_, m), of in s.items() if m == factor] for w, s in both.items()}
                if own[null[factor][group]]:  # else nothing judges the factor
                    null[factor][group] = kept = max(own, key=lambda each: np.mean(own[each]))
                    told = " and ".join(f"{np.mean(of):.0%} with null_adapter {each}" for each, of in own.items())
                    note(f"At guidance scale {guided[0]:g} {name}, group {group}, shows in {told}: {kept!r} is kept.")
        known[guided[0]] = {
            (prompt, m): np.stack([both[word][prompt, m][group] for group, word in enumerate(null[m])])
            for prompt, m in both["on"]
        }
        words = {word for of in null for word in of}
        null = words.pop() if len(words) == 1 else null
    for scale in wanted:
        of_scale = {prompt: [[1 / size] * size for size in module.num_groups] for prompt in judge.prompts}
        for (prompt, factor), found in (known.get(scale) or shares(null, scale)).items():
            mix, reached = nearest_mix(found)
            of_scale[prompt][factor] = mix.round(4).tolist()
            if np.abs(reached - 1 / len(found)).max() > NEAR:
                name, told = module.factor_names[factor], " / ".join(f"{share:.0%}" for share in reached)
                note(f"At guidance scale {scale:g} no mix of {name} evens {prompt!r}: the nearest is {told}.")
        mixes[f"{scale:g}"] = of_scale
    module.register_to_config(mixes=mixes, null_adapter=null)
    wait()  # others may still read the images
    if is_main():
        module.save_pretrained(output_dir)
        shutil.rmtree(work, ignore_errors=True)
    wait()
    return module


def nearest_mix(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mix pi (E,) whose images have shares pi S nearest to even ones, and those shares.

    Row e of S, (E, E), has the shares of the groups that images drawn for group e show.
    """
    even = np.full(len(shares), 1 / len(shares))
    # A little of the even mix, so that there is one answer where several are as near; the last row is the sum.
    system = np.vstack([shares.T, 1e-3 * np.eye(len(even)), np.full(len(even), 1e3)])
    mix, _ = nnls(system, np.concatenate([even, 1e-3 * even, [1e3]]))
    mix = mix / mix.sum()
    return mix, mix @ shares
