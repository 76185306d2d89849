"""Train a guidance module beside the frozen model: the min phase, and the rounds of the max-min game."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score

from ..auditing.asked import known_rows
from ..auditing.edits import Edits
from ..auditing.result import Audit
from ..auditing.run import audit as infer_groups
from ..config import AuditConfig, TrainConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, as_encoded
from ..distributed import is_main, num_processes, wait
from ..errors import AuditError, ConfigError, check_kinds
from ..files import check_same_settings, default_cache_dir, fingerprint, recorded, write_json, write_text
from ..guidance.attach import GuidedDenoiser
from ..guidance.backends import BACKENDS, load_guidance, settled
from ..guidance.base import Guidance, Guided
from ..guidance.card import training_record
from ..models.frozen import FrozenDenoiser, denoiser_fingerprint
from ..models.load import loras_of
from ..progress import note
from ..sampling import own_images
from ..seeds import derived_seed, generator
from .batches import GroupBalancedSampler, draw_batch
from .checkpoint import TrainingRun
from .objective import MovingGroupLosses, step_loss, typical_losses
from .preservation import unrelated_condition

LOG_EVERY = 10
SAME = 0.5  # agreement above which the groups of two factors count as one attribute
DIAGNOSTIC_BATCHES = 8  # batches at the end of a round on which excess losses are measured


def train(
    pipe: Any,
    data: CaptionedImages | EncodedImages | None,
    audit: Audit,
    output_dir: str | Path,
    *,
    config: TrainConfig | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Guidance:
    """Train a guidance that balances the groups an audit found, and save it to `output_dir`.

    The pipeline's weights stay frozen; `lora` and `tokens` send gradients through it, `module` none. Several processes
    each take a share of every batch. Work in progress is kept in `output_dir/.work`: an interrupted run continues from
    its last checkpoint to the same result, and a finished one is read back. The losses of each group are logged in
    `output_dir/log.jsonl`.

    Args:
        pipe: The pipeline that was audited.
        data: The images that were audited, or the result of `as_encoded` on them; None for those of the model's own.
        audit: Groups W of each hidden factor.
        output_dir: Where the module is written.
        config: Mode, steps, penalty and so on.
        cache_dir: Where latents and measurements are kept; `default_cache_dir()` unless given.
        progress: Show a progress bar.

    Raises:
        AuditError: The audit is of other images or of another model, or found nothing to balance.
        ConfigError: `output_dir` holds a run with other settings, data or model, or something else.
    """
    output_dir = Path(output_dir)
    before = recorded(output_dir, "train")
    check_kinds(data=(data, CaptionedImages | EncodedImages | None), audit=(audit, Audit))
    check_kinds(config=(config, TrainConfig | None))
    left_open, config = config is None or config.backend == "auto", settled(config or TrainConfig())
    finished, work = output_dir / "train.json", output_dir / ".work"
    if data is None:
        if "own_images_of" not in audit.settings:
            raise ConfigError(
                "Expected the images that were audited, which the model did not draw itself, got none. Give DATA."
            )
        data = own_images(pipe, audit.settings, Path(cache_dir or default_cache_dir()), progress=progress)
    data = as_encoded(pipe, data, cache_dir, resolution=audit.settings.get("resolution", 0), progress=progress)
    model = denoiser_fingerprint(pipe)
    audit.check_matches(data, model)
    audit.check_found()
    audited, fused = audit.settings.get("loras", {}), dict(loras_of(pipe))
    if sorted(audited.values()) != sorted(fused.values()):  # those of text encoders do not change the denoiser
        raise AuditError(f"Expected the LoRAs that were audited, {[*audited] or 'none'}, got {[*fused] or 'none'}.")
    if (config.rounds > 1 or config.penalty > 0) and not data.conditions:
        raise ConfigError(
            f"Expected one round and no penalty for an unconditional model, got rounds={config.rounds} and "
            f"penalty={config.penalty}. Both compare predictions with and without a caption; this model reads none."
        )
    if config.batch_size % num_processes():
        raise ConfigError(
            f"Expected a batch_size that {num_processes()} processes can share, got {config.batch_size}. Take a "
            "multiple of the number of processes."
        )
    settings = config.to_dict() | {"audit": audit.fingerprint, "data": data.data_fingerprint}
    settings["model"] = fingerprint(data.model_fingerprint, model)
    if before is not None:
        check_same_settings(output_dir, before["settings"], settings)
        wait()
        if is_main():
            shutil.rmtree(work, ignore_errors=True)
        return load_guidance(output_dir)

    if left_open:
        note(f"backend {config.backend}: {config.steps} steps of {config.batch_size} images")
    backend, names = BACKENDS[config.backend], ("mode", "null_adapter", *BACKENDS[config.backend].options)
    options = {name: getattr(config, name) for name in names} | {"seed": derived_seed("module", config.seed)}
    module = backend.for_pipeline(pipe, num_groups=audit.num_groups, **options)
    if audit.caveats:
        note(audit.caveats)
    log: list[dict[str, Any]] = []
    last = audit
    with FrozenDenoiser(pipe, distilled_guidance=config.distilled_guidance) as frozen:
        if config.preserve:
            tried = torch.from_numpy(np.flatnonzero(audit.kept))
            data = dataclasses.replace(data, unrelated=unrelated_condition(pipe, frozen, data, tried, config.seed))
        for number in range(config.rounds):
            if number > 0:
                # The max phase again, against the guided model: what does it still treat unequally?
                # A vision encoder sees the images, which guidance does not change; words are for people.
                asked = {name: of for name, of in audit.settings.items() if name in AuditConfig.__dataclass_fields__}
                asked |= {"vision_encoder": "", "words_model": "", "words": (), "num_groups": audit.num_groups[0]}
                again = AuditConfig.from_dict(asked)
                with FrozenDenoiser(pipe) as plain:
                    guided = GuidedDenoiser(plain, module, data.condition(torch.tensor([data.null_id])))
                    found = infer_groups(
                        pipe, data, config=again, denoiser=guided, cache_dir=cache_dir, progress=progress
                    )
                known, last = last, with_new_factors(last, found)
                if last is known:
                    break
                module = backend.for_pipeline(pipe, num_groups=last.num_groups, **options)
            module.to(frozen.device)
            log += run_round(module, frozen, data, last, config, number, work, settings, progress=progress)
    if is_main():
        rounds, base_model = log[-1]["round"] + 1, module.config["base_model"]
        record = training_record(
            pipe, last, base_model=base_model, num_images=len(data), config=config, rounds=rounds, log=log
        )
        record["audit"] = audit.fingerprint
        module.register_to_config(record=record, factor_names=[factor.name for factor in last.factors])
        module.save_pretrained(output_dir)
        write_text(output_dir / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
        figures = {"parameters": module.num_parameters(), "rounds": rounds}
        write_json(finished, {"settings": settings} | figures | {"excess_losses": log[-1].get("excess_losses")})
        shutil.rmtree(work)
    wait()
    return module


def run_round(
    module: Any,
    frozen: FrozenDenoiser,
    data: EncodedImages,
    audit: Audit,
    config: TrainConfig,
    number: int,
    work: Path,
    settings: dict[str, Any],
    *,
    progress: bool,
) -> list[dict[str, Any]]:
    """Minimise the objective with W fixed; the log of losses, every `LOG_EVERY` steps and at the end."""
    prompt_ids, kept = torch.from_numpy(audit.prompt_ids), torch.from_numpy(np.flatnonzero(audit.kept))
    sampler = GroupBalancedSampler(prompt_ids, list(map(torch.from_numpy, audit.group_weights)), config.purity)
    num_prompts, sizes = int(prompt_ids.max()) + 1, audit.num_groups
    shape = len(sizes) * num_prompts, max(sizes)
    moving = MovingGroupLosses(shape, config.loss_momentum)
    typical = typical_losses(frozen, data, kept, batch_size=config.batch_size, seed=config.seed).to(frozen.device)
    module.train()
    settings = settings | {"round": number, "audit": audit.fingerprint}
    place = work / f"round-{number}"
    run = TrainingRun(module, config, place, settings, whole=Guided(frozen, module), running=moving)

    def loss_at(step: int) -> torch.Tensor:
        rng = generator("train", config.seed, number, step)
        # The penalty compares with the null caption under guidance, which is then trained too.
        guided = module.config["null_adapter"] == "on" or config.penalty > 0
        batch = draw_batch(data, sampler, frozen, rng, config, guide_null=guided)
        loss, losses = step_loss(run.parallel, batch, typical, moving, config.penalty, run.accelerator)
        if step + 1 == config.steps or (step + 1) % LOG_EVERY == 0:
            counted = losses[~batch.preserved] if not batch.preserved.all() else losses
            row = {"round": number, "step": step + 1, "loss": round(counted.mean().item(), 6)}
            run.log.append(row | {"group_losses": by_group(moving.means()[..., 0])})
        return loss

    def by_group(means: torch.Tensor) -> list[list[list[float]]]:
        cells = zip(means.split(num_prompts), sizes, strict=True)
        return [[[round(v, 6) for v in row[:size]] for row in of.tolist()] for of, size in cells]

    run.minimise(loss_at, f"round {number + 1}", progress=progress)
    module.eval()
    if data.conditions:
        # R_e of the guidance that is kept: what its captions contribute to each group.
        plain = MovingGroupLosses(shape, 1.0)
        compared = dataclasses.replace(config, caption_dropout=0.0, preserve=0.0, penalty=1.0)
        for index in range(DIAGNOSTIC_BATCHES):
            rng = generator("excess losses", config.seed, number, index)
            batch = draw_batch(data, sampler, frozen, rng, compared)
            with torch.no_grad():
                step_loss(run.parallel, batch, typical, plain, 1.0, run.accelerator)
        run.log[-1]["excess_losses"] = by_group(plain.means()[..., 1])
    return run.log


def with_new_factors(before: Audit, found: Audit) -> Audit:
    """`before` and those factors of another audit of the same images that are none of its own; itself without any.

    A factor is known where its groups agree with those of one before under any prompt (adjusted Rand index).
    """
    prompts, groups = before.prompt_ids, [(known_rows(of), of.argmax(axis=1)) for of in before.group_weights]

    def known(m: int) -> bool:
        now = found.group_weights[m].argmax(axis=1)
        of_prompts = [(prompts == split.prompt) & before.kept for split in found.factors[m].splits]
        shared = [(old[told & rows], now[told & rows]) for told, old in groups for rows in of_prompts]
        return any(len(old) and adjusted_rand_score(old, new) > SAME for old, new in shared)

    new = [m for m in range(len(found.factors)) if not known(m)]
    if not new:
        return before
    count = len(before.factors)
    weights = [found.group_weights[m] * before.kept[:, None] for m in new]
    factors = [dataclasses.replace(found.factors[m], name=f"factor {count + n}") for n, m in enumerate(new, 1)]
    split = {of.prompt for factor in factors for of in factor.splits}
    return dataclasses.replace(
        before,
        group_weights=(*before.group_weights, *weights),
        scores=np.concatenate([before.scores, found.scores[new]]),
        factors=[*before.factors, *factors],
        prompts=[dataclasses.replace(of, found=of.found or k in split) for k, of in enumerate(before.prompts)],
        edits=Edits(names=before.edits.names),  # cuts that people moved are in W already
        inferred=None,
    )
