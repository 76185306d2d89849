"""Train a guidance module beside the frozen model: the min phase, and the rounds of the max-min game."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ..auditing.edits import Edits
from ..auditing.result import Audit
from ..auditing.run import audit as infer_groups
from ..config import AuditConfig, TrainConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, as_encoded
from ..distributed import is_main, num_processes, wait
from ..errors import ConfigError
from ..files import fingerprint, read_json, write_json, write_text
from ..guidance.guided import GuidedDenoiser
from ..guidance.loading import load_module
from ..guidance.module import GuidanceModule
from ..guidance.record import training_record
from ..models.families import family_of
from ..models.frozen import FrozenDenoiser, denoiser_fingerprint
from ..models.schedule import per_sample_loss
from ..progress import progress_bar
from ..seeds import derived_seed, generator
from .batches import GroupBalancedSampler
from .checkpoint import TrainingState, check_same_settings, load_checkpoint, save_checkpoint
from .frozen import draw_batch
from .normalisation import typical_losses
from .objective import MovingGroupLosses, objective_weights
from .optimization import Precision, check_finite, moving_average, set_learning_rate

LOG_EVERY = 10


def train(
    pipe: Any,
    data: CaptionedImages | EncodedImages,
    audit: Audit,
    output_dir: str | Path,
    *,
    config: TrainConfig | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> GuidanceModule:
    """Train a `GuidanceModule` that balances the groups an audit found, and save it to `output_dir`.

    The pipeline stays frozen; no gradient flows through it. Several processes each take a share of every batch.
    Work in progress is kept in `output_dir/.work`: a killed run goes on from its last checkpoint to the same
    result, and a finished one is read back. The losses of each group are logged in `output_dir/log.jsonl`.

    Args:
        pipe: The pipeline that was audited.
        data: The images that were audited, or what `encode` made of them.
        audit: Groups W of each hidden factor.
        output_dir: Where the module is written.
        config: Mode, steps, penalty and so on.
        cache_dir: Where latents and measurements are kept; `default_cache_dir()` unless given.
        progress: Show a progress bar.

    Raises:
        AuditError: The audit is of other images or of another model, or found nothing to balance.
        ConfigError: `output_dir` holds a run with other settings, data or model.
    """
    config = config or TrainConfig()
    output_dir = Path(output_dir)
    resolution = audit.settings.get("resolution", 0)
    data = as_encoded(pipe, data, cache_dir, resolution=resolution, progress=progress)
    model = denoiser_fingerprint(pipe)
    audit.check_matches(data, model)
    audit.check_found()
    settings = config.to_dict() | {
        "audit": audit.fingerprint,
        "data": data.data_fingerprint,
        "model": fingerprint(data.model_fingerprint, model),
    }
    finished, work = output_dir / "train.json", output_dir / ".work"
    if finished.is_file():
        check_same_settings(output_dir, read_json(finished)["settings"], settings)
        wait()
        if is_main():
            shutil.rmtree(work, ignore_errors=True)
        return load_module(output_dir)
    if config.rounds > 1 and not data.conditions:
        raise ConfigError(
            f"Expected one round for an unconditional model, got rounds={config.rounds}. Later rounds weigh what "
            "captions make the guided model predict, and it reads none."
        )
    if config.batch_size % num_processes():
        raise ConfigError(
            f"Expected a batch_size that {num_processes()} processes can share, got {config.batch_size}. Take a "
            "multiple of the number of processes."
        )

    module = GuidanceModule.for_pipeline(
        pipe,
        num_groups=audit.num_groups,
        mode=config.mode,
        width=config.width,
        seed=derived_seed("module", config.seed),
    )
    rounds, first = 0, audit
    with FrozenDenoiser(pipe) as frozen:
        module.to(frozen.device)
        for number in range(config.rounds):
            if number > 0:
                # The max phase again, against the guided model: what does it still treat unequally?
                found = infer_groups(
                    pipe,
                    data,
                    config=_audit_config(audit),
                    cache_dir=cache_dir,
                    denoiser=GuidedDenoiser(frozen, module),
                    progress=progress,
                )
                if not found.biased:
                    break
                audit = carry_over(audit, found)
            rounds = number + 1
            run_round(
                module,
                frozen,
                data,
                audit,
                config,
                work_dir=work / f"round-{number}",
                settings=settings | {"round": number, "audit": audit.fingerprint},
                round_number=number,
                progress=progress,
            )
    if is_main():
        logs = [(work / f"round-{n}" / "log.jsonl").read_text(encoding="utf-8") for n in range(rounds)]
        record = training_record(
            base_model=module.config["base_model"],
            pipeline=type(pipe).__name__,
            family=family_of(pipe).title,
            denoiser_fingerprint=model,
            data_fingerprint=data.data_fingerprint,
            num_images=len(data),
            audits=(first, audit),
            config=config,
            rounds=rounds,
            log=[json.loads(line) for line in "".join(logs).splitlines()],
        )
        module.register_to_config(record=record)
        module.save_pretrained(output_dir)
        write_text(output_dir / "log.jsonl", "".join(logs))
        write_json(finished, {"settings": settings, "parameters": module.num_parameters(), "rounds": rounds})
        shutil.rmtree(work)
    wait()
    return module


def _audit_config(audit: Audit) -> AuditConfig:
    """Return the settings to infer groups with again: those of `audit`, with as many groups."""
    names = {field.name for field in dataclasses.fields(AuditConfig)}
    settings = {name: value for name, value in audit.settings.items() if name in names}
    # A vision encoder sees the images, which guidance does not change; words are for people.
    blank = {"vision_encoder": "", "words_model": "", "words": ()}
    return AuditConfig.from_dict(settings | blank | {"num_groups": audit.num_groups[0]})


def carry_over(before: Audit, found: Audit) -> Audit:
    """Return the groups of the next round: W as found now, and as it was where nothing more was found.

    An environment keeps its meaning for the module: the columns of the new W are put in the order of the old
    ones that they overlap most, and a prompt that is balanced by now is not taught to ignore them. Images that
    people left out stay so, and groups keep their names; cuts that people moved hold for the first round only.
    """
    old, new = before.group_weights[0], found.group_weights[0]
    hidden = np.array([prompt.found for prompt in found.prompts])[found.prompt_ids]
    order = linear_sum_assignment(old[hidden].T @ new[hidden], maximize=True)[1]
    merged = np.where(hidden[:, None], new[:, order], old) * before.kept[:, None]
    return dataclasses.replace(
        found,
        group_weights=(merged, *before.group_weights[1:]),
        settings=before.settings,
        edits=Edits(names=before.edits.names),
    )


def run_round(
    module: Any,
    frozen: FrozenDenoiser,
    data: EncodedImages,
    audit: Audit,
    config: TrainConfig,
    *,
    work_dir: Path,
    settings: dict[str, Any],
    round_number: int,
    progress: bool,
) -> None:
    """Minimise mean_e L_e + lambda Var_e(L_e) for `config.steps` steps, W fixed; `module` ends as the average."""
    device = frozen.device
    precision = Precision(config.mixed_precision, device)
    prompt_ids, kept = torch.from_numpy(audit.prompt_ids), torch.from_numpy(np.flatnonzero(audit.kept))
    sampler = GroupBalancedSampler(prompt_ids, [torch.from_numpy(weights) for weights in audit.group_weights])
    moving = MovingGroupLosses((int(audit.prompt_ids.max()) + 1, audit.num_groups[0]), config.loss_momentum)
    typical = typical_losses(frozen, data, images=kept, batch_size=config.batch_size, seed=config.seed).to(device)

    module.train()
    trained = precision.shared(module)
    average = moving_average(module, config.ema_decay)
    optimizer = precision.prepare(
        torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    )
    state = TrainingState(module, optimizer, average, precision)
    start = load_checkpoint(work_dir, state, settings)
    if start:
        moving.load(state.running["group_losses"])
    log: list[dict[str, Any]] = state.running.get("log", [])

    with progress_bar(f"round {round_number + 1}", config.steps, start=start, enabled=progress) as bar:
        for step in range(start, config.steps):
            set_learning_rate(optimizer, config.learning_rate, step, config.steps)
            rng = generator("train", config.seed, round_number, step)
            batch = draw_batch(frozen, data, sampler, config, precision, rng)
            part = precision.part(config.batch_size)
            # f~ = f + g_psi(z_t, t, Phi(y), e), trained at full strength: Delta = 1.
            with precision.autocast():
                shift = trained(
                    batch.noisy_latents,
                    batch.timesteps,
                    batch.condition,
                    batch.model_pred,
                    batch.features,
                    batch.environments[part].to(device),
                )
            losses = per_sample_loss(batch.model_pred + shift, batch.target) / typical[batch.timesteps]

            prompts, groups = batch.prompts, batch.environments[:, 0]
            all_losses = precision.gather(losses.detach())
            moving.update(prompts, groups, all_losses.cpu())
            weights = objective_weights(moving.means(), config.penalty)[prompts, groups]
            loss = (weights[part].to(device) * losses).mean()
            last = step + 1 == config.steps
            logs, saves = last or (step + 1) % LOG_EVERY == 0, last or (step + 1) % config.checkpoint_every == 0
            if logs or saves:
                check_finite(loss, step, work_dir)

            precision.step(loss, module, optimizer, config.max_gradient_norm)
            average.update_parameters(module)
            if logs:
                log.append(_log_row(round_number, step + 1, all_losses, moving))
            if saves:
                state.running = {"group_losses": moving.state(), "log": log}
                save_checkpoint(work_dir, step + 1, state, settings)
            bar.advance(loss=all_losses.mean())

    module.load_state_dict(average.module.state_dict())
    module.eval()
    if is_main():
        write_text(work_dir / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))


def _log_row(round_number: int, step: int, losses: torch.Tensor, moving: MovingGroupLosses) -> dict[str, Any]:
    return {
        "round": round_number,
        "step": step,
        "loss": round(losses.detach().mean().item(), 6),
        "group_losses": [[round(value, 6) for value in row] for row in moving.means().tolist()],
    }
