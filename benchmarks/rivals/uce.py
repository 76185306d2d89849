"""Unified Concept Editing (Gandikota et al. 2024): a closed-form edit of the keys and values that captions attend to.

Cross-attention's weights W become, over edited tokens c_i and preserved ones c_j,
    (lambda W + sum_i v_i c_i' + sum_j W c_j c_j') (lambda I + sum_i c_i c_i' + sum_j c_j c_j')^-1,
where v_i = W (c_i + sum_p alpha_ip a_p) moves a prompt along the words of each class p. As every v is W times
something, this is W (I + D) with one D for all layers. The paper's loop draws images, has CLIP say which class they
show, and adds to alpha the desired shares less those seen. Here the model itself says, by the words alone: an image is
of the class whose words, behind its prompt, let the unedited model denoise it best (Li et al. 2023, "Your diffusion
model is secretly a zero-shot classifier"). Tokens are the last word and all behind it, which carry what a prompt means
as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from methods import Fitted, World

from invdiff.files import read_tensors, write_tensors
from invdiff.models.schedule import NoiseSchedule, per_sample_loss
from invdiff.seeds import generator
from invdiff.training.preservation import unrelated_captions
from rivals.calls import encode
from rivals.keeping import fitted_once, settings_of

LOG_SNRS = (-2.0, -1.0, 0.0, 1.0)
"""Of the noise that images are told apart by."""


@dataclass(frozen=True)
class UCE:
    """The biased model, edited towards equal shares of the classes under each prompt."""

    supervision = "words"

    iterations: int = 15
    """At most; it ends where all shares are within `tolerance`."""
    step: float = 0.5
    """Of alpha, a share's difference; halved for a prompt whenever its difference changes sign, or it may swing."""
    images: int = 32
    """Of each prompt and iteration."""
    guidance_scale: float = 3.0
    inference_steps: int = 20
    tolerance: float = 0.05
    ridge: float = 0.5
    """lambda."""
    preserve_scale: float = 1.0
    """Weight of preserved captions: of everyday things, and the words themselves."""

    def fit(self, world: World, folder: Path) -> Fitted:
        """Solve for D, or read it back."""
        pipe, path = world.biased(), folder / "uce.safetensors"
        layers = [layer for name, layer in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
        weights = [layer.weight.detach().clone() for layer in layers]

        def solve() -> dict[str, Any]:
            D, figures = self._solve(pipe, world, layers, weights)
            write_tensors(path, {"D": D})
            return figures

        figures = fitted_once(folder, settings_of(self, world, pipe), solve)
        _edit(layers, weights, read_tensors(path)["D"])
        size, forwards = sum(weight.numel() for weight in weights), figures.pop("forwards")
        return Fitted(pipe, parameters=size, forwards=forwards, about=figures)

    @torch.no_grad()
    def _solve(
        self, pipe: Any, world: World, layers: list[Any], weights: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """D (width, width), alpha and the last shares (prompts, classes), and what it took."""
        prompts, words = list(world.prompts), list(world.words.values())
        edited, classes = _last_tokens(pipe, prompts), _last_tokens(pipe, words)
        kept = _last_tokens(pipe, unrelated_captions(prompts) + words)
        gram = self.ridge * torch.eye(edited[0].shape[1]) + sum(c.T @ c for c in edited)
        gram += self.preserve_scale * sum(c.T @ c for c in kept)
        alpha, D = torch.zeros(len(prompts), len(words)), torch.zeros_like(gram)
        steps, before = torch.full((len(prompts), 1), self.step), torch.zeros_like(alpha)
        passes = self.inference_steps * (2 if self.guidance_scale > 1 else 1) + len(words) * len(LOG_SNRS)
        options = {"guidance_scale": self.guidance_scale, "num_inference_steps": self.inference_steps}
        for iteration in range(self.iterations + 1):
            _edit(layers, weights, D)
            latents = []
            for prompt in prompts:
                noise = [generator("uce", world.seed, prompt, image) for image in range(self.images)]
                latents.append(pipe([prompt] * self.images, generator=noise, output_type="latent", **options).images)
            _edit(layers, weights, torch.zeros_like(D))
            seen = [
                told_by_words(pipe, of, prompt, world.words, world.seed).bincount(minlength=len(words))
                for of, prompt in zip(latents, prompts, strict=True)
            ]
            shares = torch.stack(seen) / self.images
            missing = 1 / len(words) - shares
            if iteration == self.iterations or missing.abs().max() <= self.tolerance:
                break
            steps = torch.where((missing * before).sum(dim=1, keepdim=True) < 0, steps / 2, steps)
            alpha, before = alpha + steps * missing.where(missing.abs() > self.tolerance, 0.0), missing
            pairs = ((i, p, min(len(c), len(a))) for i, c in enumerate(edited) for p, a in enumerate(classes))
            D = sum(alpha[i, p] * classes[p][:n].T @ edited[i][:n] for i, p, n in pairs) @ gram.inverse()
        forwards = 1.0 * (iteration + 1) * passes * len(prompts) * self.images
        return D, {"alpha": alpha.tolist(), "shares": shares.tolist(), "forwards": forwards}


@torch.no_grad()
def told_by_words(
    pipe: Any, latents: torch.Tensor, prompt: str, words: Mapping[str, str], seed: int = 0
) -> torch.Tensor:
    """The class (images,) whose words, behind the prompt, let the model denoise latents (images, C, H, W) best."""
    schedule, losses = NoiseSchedule(pipe.scheduler), torch.zeros(len(words), len(latents))
    for log_snr in LOG_SNRS:
        noise = torch.randn(latents.shape, generator=generator("told by words", seed, str(log_snr))).to(latents)
        timesteps = torch.full((len(latents),), schedule.timestep_at(log_snr), device=latents.device)
        noisy, target = (of(latents, noise, timesteps) for of in (schedule.add_noise, schedule.target))
        for row, ending in enumerate(words.values()):
            embeddings = encode(pipe, [f"{prompt} {ending}"]).expand(len(latents), -1, -1)
            predicted = pipe.unet(noisy, timesteps, embeddings, return_dict=False)[0]
            losses[row] += per_sample_loss(predicted, target).cpu()
    return losses.argmin(dim=0)


def _last_tokens(pipe: Any, captions: list[str]) -> list[torch.Tensor]:
    """Embeddings (tokens, width) of each caption's last word and all behind it, on the CPU in 32 bits."""
    lengths = [len(ids) for ids in pipe.tokenizer(captions, truncation=True).input_ids]
    return [row[length - 2 :].float().cpu() for row, length in zip(encode(pipe, captions), lengths, strict=True)]


@torch.no_grad()
def _edit(layers: list[Any], weights: list[torch.Tensor], D: torch.Tensor) -> None:
    """Let each layer's weights be W + W D."""
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.copy_(weight + (weight.float() @ D.to(weight.device)).to(weight.dtype))
