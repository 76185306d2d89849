"""Does the method hold beyond Stable Diffusion? Another kind of model on the bundled world, small and from nothing.

    python benchmarks/families.py dit-flow    # a class-conditional transformer trained by flow matching

It fits a biased base, audits it without labels, trains a module in balanced mode, and measures Bias of base and
guided images, with the command's figures kept in benchmarks/results/families-dit-flow.json. Work is kept in
out/benchmark-families (or --work); a finished base, module or image is not made again.
"""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from kept import drawn, headline, run_part
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from invdiff import EvaluateConfig, TrainConfig, audit, evaluate, load_captioned_images, train
from invdiff.assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from invdiff.data.birds import NATURAL_BACKGROUND, BirdsWorld
from invdiff.data.encode import as_encoded
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.models.families import family_of
from invdiff.models.load import denoiser_of, load_pipeline
from invdiff.models.schedule import NoiseSchedule, per_sample_loss
from invdiff.progress import progress_bar
from invdiff.seeds import generator

NUM_IMAGES = 3000
CLASSES = {0: "landbird", 1: "waterbird"}


def make_dit() -> DiTPipeline:
    """A small DiT on the bundled latents, sampled by DPM++ along flow-matching sigmas."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=8, out_channels=8, num_layers=5, num_attention_heads=4,
        attention_head_dim=20, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        attention_bias=True, activation_fn="gelu-approximate",
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    pipe = DiTPipeline(transformer, load_pipeline(BIRDS_MODEL).vae, scheduler, id2label=CLASSES)
    pipe.register_to_config(id2label=CLASSES)
    return pipe


def fit(pipe, data, folder: Path, *, steps: int, batch_size: int = 64, learning_rate: float = 1e-3):
    """Train the denoiser of `pipe` on images in its own prediction type, with 10% of captions dropped; keep an EMA."""
    if (folder / "model_index.json").is_file():
        return load_pipeline(folder)
    family, denoiser, schedule = family_of(pipe), denoiser_of(pipe), NoiseSchedule(pipe.scheduler)
    optimizer = torch.optim.AdamW(denoiser.train().parameters(), lr=learning_rate, weight_decay=0.0)
    average = torch.optim.swa_utils.AveragedModel(
        denoiser, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
    )
    with progress_bar(folder.name, steps) as bar:
        for step in range(steps):
            rng = generator("base", step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * step / steps))
            rows = torch.randint(len(data), (batch_size,), generator=rng)
            latents = data.latents[rows]
            noise = torch.randn(latents.shape, generator=rng)
            timesteps = torch.randint(schedule.num_train_timesteps, (batch_size,), generator=rng)
            captions = data.caption_ids[rows].clone()
            captions[torch.rand(batch_size, generator=rng) < 0.1] = data.null_id
            noisy_latents = schedule.add_noise(latents, noise, timesteps)
            model_pred = family.predict(denoiser, noisy_latents, timesteps, data.condition(captions))
            loss = per_sample_loss(model_pred, schedule.target(latents, noise, timesteps)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(denoiser)
            bar.advance(loss=loss)
    denoiser.load_state_dict(average.module.state_dict())
    denoiser.eval()
    pipe.save_pretrained(folder)
    return load_pipeline(folder)


def recovered(found, data) -> dict:
    """Compare the groups found with the hidden attribute, which only this comparison reads."""
    pairs = zip(data.captions, data.attributes["background"], strict=True)
    rare = np.array([NATURAL_BACKGROUND[subject] != background for subject, background in pairs])
    groups = found.group_weights[0].argmax(axis=1)
    rows = {}
    for index, prompt in enumerate(found.prompts):
        mine, split = found.prompt_ids == index, found.split(0, index)
        rows[prompt.prompt] = {
            "found": split is not None,
            "reason": prompt.reason,
            "shares": split.shares if split else [],
            "auroc": roc_auc_score(rare[mine], found.scores[0, mine]) if split else None,
            "adjusted_rand": adjusted_rand_score(rare[mine], groups[mine]) if split else None,
        }
    return rows


def dit_flow(work: Path) -> dict:
    """Fit, audit, train, draw, judge."""
    data = load_captioned_images(BirdsWorld(NUM_IMAGES, seed=0).write(work / "birds"), caption_column="subject")
    pipe = make_dit()
    pipe = fit(pipe, as_encoded(pipe, data, work / "cache"), work / "base-dit-flow", steps=2400, batch_size=48)
    work, start = work / "dit-flow", time.perf_counter()
    kept = {"cache_dir": work / "cache"}
    found = audit(pipe, data, **kept)
    figures = {"audit": recovered(found, data), "forwards_per_image": found.forwards_per_image}
    if not found.biased:
        return figures | {"note": "nothing found, so nothing was trained"}
    module = train(pipe, data, found, work / "module", config=TrainConfig(backend="module", steps=600), **kept)
    figures["parameters"] = [module.num_parameters(), sum(p.numel() for p in denoiser_of(pipe).parameters())]
    figures["audit_and_train_seconds"] = round(time.perf_counter() - start, 1)
    models, settings = {"base": None, "balanced": module}, {"num_inference_steps": 25, "batch_size": 64}
    folders = drawn(work, pipe, list(CLASSES.values()), models, (1.0, 3.0), images_per_prompt=256, **settings)
    annotator = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)
    judged = evaluate(folders, annotator, "background", config=EvaluateConfig(subject_attribute="subject"))
    return figures | {"by_model": headline(judged)}


if __name__ == "__main__":
    run_part("families", __doc__, {"dit-flow": dit_flow}, work="out/benchmark-families")
