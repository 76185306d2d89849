"""InvDiff (Hou et al., KDD 2025) with the network of its released code: a second full UNet d beside the frozen f.

    f~(z_t, t, y) = (1 - Delta) f(z_t, t, y) + Delta d(z_t, t, Phi(y))

Groups W come first, from the frozen model's loss of each image at one random timestep; then d descends
mean_e L_e + lambda Var_e(L_e). Variant "released" has the faults of the code, which the paper does not ask for:

* the losses that W is inferred from compare the prediction with the latents, whatever the model predicts;
* W is inferred over all captions at once, and its rows are taken for those of other images, as its shuffled loader
  does: another order of the rows;
* d is a copy whose last layer is zero, so that training starts at (1 - Delta) f; it is trained at Delta 0.5 whatever
  is asked, and drawn from at the Delta that is asked;
* no captions are dropped, though images are drawn with classifier-free guidance;
* Var_e is over the groups in one batch, whose images are drawn alike.

Variant "paper": the model's own target; W of each caption maximises dispersion with degree omega; Phi is a layer over
the text embeddings that starts as the identity, d a copy of f; training at the Delta of sampling, captions dropped,
each group as often, and L_e moving means. The paper speaks of a light module; ours of it is the backend `module`.

Both: learning rate 1e-4, batches of 64; no mirroring, and no half precision unless asked for. The released code mixes
up W on Waterbirds only; its README sets omega to 0, here it is the code's default, 3.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from methods import Fitted, World
from torch import Tensor, nn

from invdiff import FinetuneConfig
from invdiff.auditing.splits import gradient_groups
from invdiff.data.encode import EncodedImages, as_encoded
from invdiff.errors import ConfigError
from invdiff.files import read_tensors, write_tensors
from invdiff.models.frozen import FrozenDenoiser
from invdiff.models.schedule import NoiseSchedule, per_sample_loss
from invdiff.seeds import derived_seed, generator
from invdiff.training.checkpoint import TrainingRun
from invdiff.training.objective import MovingGroupLosses, objective_weights
from rivals.keeping import WORK, fitted_once, settings_of

RELEASED_DELTA = 0.5
"""At which the released code trains."""
WEIGHTS = "second.safetensors"


class Second(nn.Module):
    """d(z_t, t, Phi(y)): a full copy of a UNet, behind a layer over its text embeddings."""

    def __init__(self, unet: Any, *, released: bool) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet).requires_grad_(True)
        self.phi: nn.Module = nn.Identity()
        if released:
            nn.init.zeros_(self.unet.conv_out.weight)
            nn.init.zeros_(self.unet.conv_out.bias)
        else:
            width = unet.config.cross_attention_dim
            self.phi = nn.Linear(width, width, device=unet.device)
            nn.init.eye_(self.phi.weight)
            nn.init.zeros_(self.phi.bias)


@contextmanager
def mixed(unet: Any, second: Second, delta: float) -> Iterator[None]:
    """While it is open, `unet` predicts f~ in place of f, each row by itself; the gradient is that of d."""
    signature = inspect.signature(type(unet).forward)

    def mix(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = signature.bind(module, *args, **kwargs).arguments
        call = {name: value for name, value in call.items() if name != "self"}
        call |= {"encoder_hidden_states": second.phi(call["encoder_hidden_states"]), "return_dict": False}
        prediction = (1 - delta) * output[0] + delta * second.unet(**call)[0]
        return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)

    handle = unet.register_forward_hook(mix, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def released_groups(losses: np.ndarray, num_groups: int, omega: float, seed: int) -> np.ndarray:
    """W (N, E) of losses (N,) as the released code infers it: 500 steps of Adam, then projected on the simplex.

    Maximises the standard deviation of L_e plus omega times the least l_i W_ie of any image and group.
    """
    values = torch.from_numpy(losses).float()[:, None]
    weights = torch.rand(len(losses), num_groups, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.01)
    for _ in range(500):
        weighted = values * weights
        objective = (weighted.sum(dim=0) / weights.sum(dim=0)).std() + omega * weighted.min()
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
        with torch.no_grad():
            weights.clamp_(min=0)
            weights /= weights.sum(dim=1, keepdim=True)
    return weights.detach().numpy()


@dataclass(frozen=True)
class InvDiff:
    """Both variants, at equal cost unless `steps` are given."""

    variant: Literal["paper", "released"] = "paper"
    forwards: int = 62_400
    """Cost in forward passes of an image, as of our audit of 4,000 images and 400 steps of adapters, 32 images each.
    A step of this costs four an image: f, and d forwards and backwards."""
    steps: int = 0
    """0 takes what `forwards` allow; the paper's are 10,000."""
    batch_size: int = 64
    mixed_precision: Literal["no", "bf16"] = "no"
    learning_rate: float = 1e-4
    num_groups: int = 8
    """E."""
    omega: float | None = None
    """The dispersion degree: 0.5 unless given, or 3 for the released code, its own default on its own scale."""
    penalty: float = 1.0
    """lambda."""
    delta: float = 0.8
    caption_dropout: float = 0.1
    """Not of the released code."""
    true_groups: bool = False
    """Take the classes of the hidden attribute, of each caption, for W: the method without its inference."""

    @property
    def supervision(self) -> str:
        """None, unless groups are told of."""
        return "labels" if self.true_groups else "none"

    @property
    def released(self) -> bool:
        """Whether it has the faults of the code."""
        return self.variant == "released"

    def fit(self, world: World, folder: Path) -> Fitted:
        """Infer W, then train d."""
        if self.variant not in ("paper", "released"):
            raise ConfigError(f"Expected variant 'paper' or 'released', got {self.variant!r}.")
        pipe = world.biased()
        settings = settings_of(self, world, pipe)
        encoded, second = as_encoded(pipe, world.data, world.cache), Second(pipe.unet, released=self.released)
        searched = 0 if self.true_groups else len(encoded)
        steps = self.steps or max(1, round((self.forwards - searched) / (4 * self.batch_size)))

        def train() -> dict[str, Any]:
            if self.true_groups:
                pairs = zip(world.data.captions, world.labelled.attributes[world.attribute], strict=True)
                cells = np.array([" ".join(pair) for pair in pairs])[encoded.source_index]
                of_class = np.unique(cells, return_inverse=True)[1]
                weights = np.eye(of_class.max() + 1, dtype=np.float32)[of_class]
            else:
                weights = self.groups(pipe, encoded, world.seed)
            self._train(pipe, second, encoded, weights, steps, folder, settings)
            write_tensors(folder / WEIGHTS, second.state_dict())
            return {"steps": steps, "shares of groups": weights.mean(axis=0).round(4).tolist()}

        figures = fitted_once(folder, settings, train)
        second.load_state_dict(read_tensors(folder / WEIGHTS))
        second.eval().requires_grad_(False)
        return Fitted(
            pipe,
            hooked=lambda seed: mixed(pipe.unet, second, self.delta),
            parameters=sum(weight.numel() for weight in second.parameters()),
            forwards=float(searched + 4 * steps * self.batch_size),
            sampling=2.0,
            about=figures,
        )

    def groups(self, pipe: Any, encoded: EncodedImages, seed: int) -> np.ndarray:
        """W (N, E), from a loss at one random timestep of each image."""
        losses = []
        with FrozenDenoiser(pipe) as frozen:
            for rows in torch.arange(len(encoded)).split(self.batch_size):
                rng = generator("one timestep", seed, int(rows[0]))
                noisy_latents, timesteps, target = noised(frozen.schedule, encoded.latents[rows], rng, frozen.device)
                model_pred, _ = frozen(noisy_latents, timesteps, encoded.condition(encoded.caption_ids[rows]))
                target = encoded.latents[rows].to(frozen.device) if self.released else target
                losses.append(per_sample_loss(model_pred, target).cpu())
        values, captions = torch.cat(losses).double().numpy(), encoded.caption_ids.numpy()
        if self.released:
            omega = 3.0 if self.omega is None else self.omega
            weights = released_groups(values, self.num_groups, omega, derived_seed("W", seed))
            return weights[torch.randperm(len(weights), generator=generator("misaligned", seed)).numpy()]
        omega = 0.5 if self.omega is None else self.omega
        weights = np.full((len(values), self.num_groups), 1 / self.num_groups, dtype=np.float32)
        for caption in range(len(encoded.captions)):
            own = captions == caption
            if own.sum() > self.num_groups:  # fewer are of any group
                weights[own] = gradient_groups(values[own], self.num_groups, omega=omega, seed=seed)
        return weights

    def _train(
        self,
        pipe: Any,
        second: Second,
        encoded: EncodedImages,
        weights: np.ndarray,
        steps: int,
        folder: Path,
        settings: dict[str, Any],
    ) -> None:
        schedule, device, released = NoiseSchedule(pipe.scheduler), pipe.unet.device, self.released
        embeds, of_image = encoded.conditions["prompt_embeds"].to(device), torch.from_numpy(weights)
        num_groups = weights.shape[1]
        moving, seed = MovingGroupLosses((1, num_groups), 0.95), settings["seed"]
        options = {"learning_rate": self.learning_rate, "mixed_precision": self.mixed_precision}
        config = FinetuneConfig(steps=steps, ema_decay=0.0, **options)
        run = TrainingRun(second, config, folder / WORK, settings, running=moving)
        pipe.unet.requires_grad_(False).eval()
        second.train()

        def loss_at(step: int) -> Tensor:
            rng = generator("invdiff", seed, step)
            groups = torch.arange(self.batch_size) % num_groups
            if released:
                rows = torch.randint(len(encoded), (self.batch_size,), generator=rng)
            else:
                rows = torch.multinomial(of_image.T[groups], 1, generator=rng)[:, 0]
            dropout = 0.0 if released else self.caption_dropout
            dropped = torch.rand(self.batch_size, generator=rng) < dropout
            captions = encoded.caption_ids[rows].where(~dropped, encoded.null_id)
            noisy_latents, timesteps, target = noised(schedule, encoded.latents[rows], rng, device)
            with run.accelerator.autocast():  # for one step: it keeps its copies of weights until it ends
                model_pred = pipe.unet(noisy_latents, timesteps, embeds[captions.to(device)]).sample
            losses = per_sample_loss(model_pred.float(), target)
            if released:
                return batch_objective(losses, of_image[rows].to(device), self.penalty)
            # mean_i w_e(i) grad l_i is the gradient of mean_e L_e + lambda Var_e(L_e), with L_e moving means.
            of_group = objective_weights(moving.means()[0, :, 1], self.penalty)[groups].to(device)
            found = losses.detach().cpu()
            moving.update(torch.zeros_like(groups), groups, torch.stack([found, found], dim=1))
            return (of_group * losses).mean()

        with mixed(pipe.unet, second, RELEASED_DELTA if released else self.delta):
            run.minimise(loss_at, f"InvDiff, {self.variant}")


def batch_objective(losses: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """mean_e L_e + lambda Var_e(L_e) over the groups of a batch that have any loss, of losses (B,) and W (B, E)."""
    means = (losses @ weights) / (weights.sum(dim=0) + 1e-9)
    means = means[means > 1e-9]
    return means.mean() + (penalty * means.var() if len(means) > 1 else 0.0)


def noised(
    schedule: NoiseSchedule, latents: Tensor, rng: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, one random timestep each, and the model's own target."""
    noise = torch.randn(latents.shape, generator=rng)
    timesteps = torch.randint(schedule.num_train_timesteps, (len(latents),), generator=rng)
    batch = [each.to(device) for each in (latents, noise, timesteps)]
    return schedule.add_noise(*batch), batch[2], schedule.target(*batch)
