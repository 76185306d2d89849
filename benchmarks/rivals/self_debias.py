"""Self-debiasing in spirit: while images are drawn, each is pushed to a cluster of the model's own features.

Without any word or label, plainly drawn images of each prompt are put into clusters by what the UNet's middle block
shows at all steps (k-means); a cluster's centre at a step is the mean of its images' features there. Then each image
is given a cluster, uniformly and independently, and its prediction is moved against
    (1 - p) grad_z (log p - mean log p),  p = softmax_k(-|h(z) - centre_k|^2 / 2 sqrt(D)),
at each step, the gradient scaled to `strength` times the prediction's own size. Features are means over the grid,
over their standard deviation within clusters. Both epsilon and v point away from the image, so that both are moved
against the gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from methods import Fitted, World
from sklearn.cluster import KMeans

from invdiff.errors import ConfigError, ModelError
from invdiff.files import read_tensors, write_tensors
from invdiff.seeds import derived_seed, generator
from rivals.calls import Call, hooked
from rivals.keeping import fitted_once, settings_of


@dataclass(frozen=True)
class SelfDebias:
    """Balances clusters of the model's own images."""

    supervision = "none"

    strength: float = 4.0
    """Size of the push, relative to the prediction's."""
    clusters: int = 2
    images: int = 64
    """Plainly drawn images of each prompt, that clusters are of."""
    inference_steps: int = 20
    """Of these images; other steps take the centres of the nearest timestep."""

    def fit(self, world: World, folder: Path) -> Fitted:
        """Draw images of each prompt and cluster them, or read the centres back."""
        pipe, path, prompts = world.biased(), folder / "self_debias.safetensors", list(world.prompts)
        if pipe.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(f"Expected epsilon or v_prediction, got {pipe.scheduler.config.prediction_type}.")

        def cluster() -> dict[str, Any]:
            each = [self._cluster(pipe, prompt, world.seed) for prompt in prompts]
            shares = [of.pop("shares").tolist() for of in each]
            write_tensors(path, {name: torch.stack([of[name] for of in each]) for name in each[0]})
            return {"shares": shares, "forwards": 1.0 * len(prompts) * self.images * self.inference_steps}

        settings = settings_of(replace(self, strength=0.0), world, pipe)  # clusters are those of any strength
        figures = fitted_once(folder, settings, cluster)
        found = read_tensors(path)

        def push(call: Call, prediction: torch.Tensor) -> torch.Tensor:
            if unknown := {*call.prompts} - {*prompts}:
                raise ConfigError(f"Expected a prompt that clusters were made of, got {min(unknown)!r}. Fit it too.")
            rows = [prompts.index(prompt) for prompt in call.prompts]
            return self._push(call, prediction, {name: of[rows] for name, of in found.items()})

        return Fitted(
            pipe,
            hooked=lambda seed: hooked(pipe, self.clusters, seed, after=push),
            forwards=figures["forwards"],
            sampling=2.5,  # a pass of the captioned row, forwards and backwards
            about={"shares": figures["shares"]},
        )

    @torch.no_grad()
    def _cluster(self, pipe: Any, prompt: str, seed: int) -> dict[str, torch.Tensor]:
        """Centres (steps, clusters, D), scales (steps, D), timesteps (steps,) and shares (clusters,) of one prompt."""
        noise = [generator("self-debias", seed, prompt, image) for image in range(self.images)]
        with middle_features(pipe.unet) as seen:
            options = {"guidance_scale": 1.0, "num_inference_steps": self.inference_steps, "output_type": "latent"}
            pipe([prompt] * self.images, generator=noise, **options)
        features, timesteps = torch.stack(seen).float().cpu(), torch.as_tensor(pipe.scheduler.timesteps).float().cpu()
        whole = (features - features.mean(dim=1, keepdim=True)) / features.std(dim=1, keepdim=True).clamp(min=1e-6)
        kmeans = KMeans(self.clusters, n_init=10, random_state=derived_seed("self-debias", seed) % 2**32)
        of = torch.from_numpy(kmeans.fit_predict(whole.transpose(0, 1).flatten(1).numpy())).long()
        centres = torch.stack([features[:, of == cluster].mean(dim=1) for cluster in range(self.clusters)], dim=1)
        scales = (features - centres[:, of]).square().mean(dim=1).sqrt().clamp(min=1e-6)
        shares = of.bincount(minlength=self.clusters) / len(of)
        return {"centres": centres, "scales": scales, "timesteps": timesteps[: len(features)], "shares": shares}

    def _push(self, call: Call, prediction: torch.Tensor, of: dict[str, torch.Tensor]) -> torch.Tensor:
        """The shift (images, C, H, W); `of` has what `_cluster` found for each image's prompt as rows."""
        timestep = torch.as_tensor(call.arguments["timestep"]).flatten()[0].item()
        step = int((of["timesteps"][0] - timestep).abs().argmin())
        with torch.enable_grad(), middle_features(call.pipe.unet) as seen:
            latents = call.latents.detach().requires_grad_()
            captions = call.arguments["encoder_hidden_states"][-call.images :]
            call.predict(captions, latents)
            features = seen[0].float()
            centres, scales = (of[name][:, step].to(features) for name in ("centres", "scales"))
            distances = ((features[:, None] - centres) / scales[:, None]).square().sum(dim=2)
            log_p = (-distances / (2 * features.shape[1] ** 0.5)).log_softmax(dim=1)
            rows = torch.arange(call.images, device=features.device)
            own = log_p[rows, torch.tensor(call.groups, device=features.device)]
            (gradient,) = torch.autograd.grad((own - log_p.mean(dim=1)).sum(), latents)
        size = prediction[-call.images :].square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        gradient = gradient / gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        unsure = (1 - own.detach().exp())[:, None, None, None]
        return -self.strength * unsure * size * gradient


@contextmanager
def middle_features(unet: Any) -> Iterator[list[torch.Tensor]]:
    """Means over the grid of the middle block's output, (rows, D), of each forward pass inside the block."""
    seen: list[torch.Tensor] = []
    handle = unet.mid_block.register_forward_hook(lambda block, args, output: seen.append(output.mean(dim=(2, 3))))
    try:
        yield seen
    finally:
        handle.remove()
