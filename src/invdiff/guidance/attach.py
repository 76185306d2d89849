"""Put a guidance module on any pipeline's denoiser, and take it off again."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
import weakref
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, ModelError
from ..files import fingerprint
from ..models.families import Condition, DenoiserCall, Family, family_of
from ..models.families.base import to
from ..models.frozen import FeatureCapture, FrozenDenoiser, Hook, do_nothing
from ..models.load import GUIDED, denoiser_of, loras_of
from ..models.schedule import NoiseSchedule
from .environments import EnvironmentMix, Environments
from .module import GuidanceModule, weight_signature

END_OF_CALL = "maybe_free_model_hooks"
"""The method with which every diffusers pipeline ends a call."""


def attach(
    pipe: Any,
    module: GuidanceModule,
    scale: float = 1.0,
    environments: Environments = "uniform",
    *,
    seed: int = 0,
    strict: bool = True,
) -> Attachment:
    """Guide every image that `pipe` draws from now on: f~ = f + Delta * g_psi.

    Use it as a context manager, or call `detach()` on the returned attachment::

        with attach(pipe, module, scale=1.0):
            images = pipe("a photo of a waterbird", num_images_per_prompt=8).images

    Several modules may be attached at once: each reads the frozen prediction, so their shifts add. Other pipelines
    that share the denoiser (image-to-image, inpainting, ControlNet) are guided too.

    Args:
        pipe: A diffusers pipeline of a supported family; its weights are not touched.
        module: A module made for this pipeline's model. A copy of it is attached, in the pipeline's precision.
        scale: Delta, the strength; 0 leaves the pipeline bit-identical.
        environments: The target mix, spread over the images of a call: `"uniform"`, proportions, those of named
            factors such as `{"factor 1": [0.7, 0.3]}`, `"iid"` (uniform, each image by its own noise), or the group of
            each image. See `EnvironmentMix`. An invariant module never sees the group and takes the two words only.
        seed: Another seed draws other groups for the same starting noise.
        strict: Also refuse a model of the right shape with other weights.

    Raises:
        ModelError: The module was trained for another model, or the denoiser is compiled already.
        ConfigError: `environments` do not fit the module's groups.
    """
    check_fit(pipe, module, strict=strict)
    return Attachment(pipe, module, scale, mix_for(module, environments, seed=seed))


def mix_for(module: GuidanceModule, environments: Environments, *, seed: int = 0) -> EnvironmentMix:
    """The target mix of a module's groups; of an invariant module proportions or groups are a `ConfigError`."""
    if not module.sees_environment and not isinstance(environments, str):
        raise ConfigError(
            "Expected environments 'uniform' with an invariant module, which never sees the group, got "
            f"{environments!r}. Leave them out, or train a module in balanced mode."
        )
    return EnvironmentMix(environments, module.num_groups, factor_names=module.factor_names, seed=seed)


def check_fit(pipe: Any, module: GuidanceModule, *, strict: bool = True) -> None:
    """Raise `ModelError` that names every difference, unless `module` fits `pipe`'s denoiser, not compiled yet."""
    denoiser, wanted = denoiser_of(pipe), module.config
    kind, parts = type(denoiser).__name__, dict(denoiser.named_modules())
    for path in ("", *accumulate(wanted["feature_path"].split("."), "{}.{}".format)):
        part = parts.get(path)
        if getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod"):
            raise ModelError(
                f"Expected {kind}{path and '.' + path} not to be compiled yet, since compiled code ignores new hooks, "
                "found it compiled. Attach first, then compile."
            )
    found: dict[str, Any] = {"denoiser_class": kind, "prediction_type": NoiseSchedule(pipe.scheduler).prediction_type}
    if wanted["denoiser_class"] == kind:
        found |= dataclasses.asdict(family_of(pipe).shape(denoiser))
    wrong = [
        f"{name}: expected {wanted[name]}, found {value}" for name, value in found.items() if wanted[name] != value
    ]
    remedy = "."
    if not wrong and strict:
        expected, actual = np.asarray(wanted["weight_signature"]), np.asarray(weight_signature(denoiser))
        if expected.shape != actual.shape or not same_weights(expected, actual):
            wrong = ["weights: expected those it was trained beside, found others of the same shape"]
        ours, theirs = wanted["loras"], loras_of(pipe)  # several may have one name
        if sorted(of for _, of in ours) != sorted(of for _, of in theirs):
            names = tuple(", ".join(name for name, _ in loras) or "none" for loras in (ours, theirs))
            wrong.append(f"LoRAs: expected {names[0]}, found {names[1]}")
        remedy = " (strict=False attaches it all the same)."
    if wrong:
        raise ModelError(
            f"The guidance module was trained for another model ({wanted['base_model'] or 'unnamed'}): "
            f"{'; '.join(wrong)}. Load the pipeline it was trained for, or train a module for this one{remedy}"
        )


def same_weights(expected: np.ndarray, actual: np.ndarray) -> bool:
    """Whether two signatures, (weights,), are of one model; NaN in `actual` is not compared.

    Weights may be stored in 16 bits on either side, or in 8 (layerwise casting), which keep 2 or 3 bits of a number.
    """
    tolerance = np.full(expected.shape, 0.02)
    for dtype, rounding in ((torch.float8_e4m3fn, 1 / 16), (torch.float8_e5m2, 1 / 8)):
        for values in map(torch.from_numpy, (expected, actual)):
            tolerance[(values.to(dtype).to(values.dtype) == values).numpy()] = rounding
    far = np.abs(expected - actual) > 1e-3 + tolerance * np.maximum(np.abs(expected), np.abs(actual))
    return not far.any()


class Attachment:
    """A guidance module on a pipeline's denoiser; `detach()` restores the model.

    Attributes:
        scale: Delta, the strength of guidance; change it at any time, as the mix.
        mix: The target mix that the groups of images are drawn from.
        environments: Groups of the rows of the newest batch, (rows, factors), or None before the first.
        calls: How often the denoiser has run since the module was attached.
    """

    def __init__(self, pipe: Any, module: GuidanceModule, scale: float, mix: EnvironmentMix) -> None:
        self.scale, self.mix, self.calls = float(scale), mix, 0
        self.environments: torch.Tensor | None = None
        denoiser, self._family = denoiser_of(pipe), family_of(pipe)
        self._module = copy.deepcopy(module).eval().requires_grad_(False)
        # Of the newest images: the scheduler's timesteps, first and last timestep, first latents.
        self._timesteps: torch.Tensor | None = None
        self._start, self._last, self._first = np.inf, np.inf, torch.empty(0)
        # Phi(y), the condition that it encodes (kept, so that no other tensor takes its place), and how to know it.
        self._phi: torch.Tensor | None = None
        self._encoded: Condition = {}
        self._seen: dict[str, tuple[int, object]] | None = None
        self._pipe, self._denoiser = weakref.ref(pipe), weakref.ref(denoiser)
        self._features = FeatureCapture(denoiser, module.config["feature_path"], self._read_features)
        self._output = GUIDED[denoiser] = GUIDED.get(denoiser) or _GuidedOutput(denoiser, self._family)
        self._output.attachments.append(self)
        if not isinstance(vars(pipe).get(END_OF_CALL), _CallWatch):
            setattr(pipe, END_OF_CALL, _CallWatch(pipe))
        vars(pipe)[END_OF_CALL].calls[self] = 0

    def detach(self) -> None:
        """Restore the plain model. Calling it twice does no harm."""
        denoiser, pipe = self._denoiser(), self._pipe()
        self._features.close()
        if denoiser is not None and self in self._output.attachments:
            self._output.attachments.remove(self)
            if not self._output.attachments:
                self._output.handle.remove()
                del GUIDED[denoiser]
        watch = None if pipe is None else vars(pipe).get(END_OF_CALL)
        if isinstance(watch, _CallWatch):
            watch.calls.pop(self, None)
            if not watch.calls:
                del vars(pipe)[END_OF_CALL]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.detach()
        if kind is None and self.calls == 0:
            warnings.warn(
                "The guidance module was attached, but the denoiser never ran meanwhile: nothing was guided. Draw "
                "inside the `with` block, with the pipeline that the module was attached to.",
                stacklevel=2,
            )

    @torch.no_grad()
    def _read_features(self, block_output: Any) -> torch.Tensor:
        """Project the block's output at once, since it is many times larger than its projection."""
        hidden_states = self._family.hidden_states(block_output)
        if self.scale == 0:
            return hidden_states[:, :0]
        self._follow_placement(hidden_states)
        return self._module.project(hidden_states)

    @torch.no_grad()
    def shift(self, call: DenoiserCall, model_pred: torch.Tensor) -> torch.Tensor | None:
        """Delta * g_psi beside the frozen prediction, both (rows, channels, height, width); None at scale 0."""
        self.calls += 1
        features = self._features.take()
        environments = self._follow_images(call.noisy_latents, float(call.timesteps[0]))
        if self.scale == 0:
            return None
        self._follow_placement(model_pred)
        latents, features = call.noisy_latents.to(model_pred.dtype), self._family.on_grid(features, call.noisy_latents)
        environments, code = environments.to(model_pred.device), self._code(call.condition, model_pred)
        read = (latents, call.timesteps, call.condition, model_pred, features, environments)
        return self.scale * self._module(*read, projected=True, code=code)

    def _follow_placement(self, tensor: torch.Tensor) -> None:
        weight = self._module.conv_in.weight  # a module's own `device` and `dtype` look through all its weights
        if weight.device != tensor.device or weight.dtype != tensor.dtype:
            # As any module: diffusers' own `to` warns of layers to be kept in 32 bits, of which there are none.
            torch.nn.Module.to(self._module, tensor.device, tensor.dtype)
            self._seen = None

    def _code(self, condition: Condition, like: torch.Tensor) -> torch.Tensor | None:
        """Phi(y), computed anew only where the pipeline passes other tensors than at the step before."""
        # Tensors of inference mode have no version: they never count as seen.
        seen = {name: (id(t), object() if t.is_inference() else t._version) for name, t in condition.items()}
        if seen != self._seen:
            self._seen, self._encoded = seen, dict(condition)
            self._phi = self._module.encode(to(condition, like.device, like.dtype))
        return self._phi

    def _follow_images(self, noisy_latents: torch.Tensor, timestep: float) -> torch.Tensor:
        """The groups of each row, (rows, factors); where new images begin, they are drawn from their noise.

        New images are noticed by the scheduler's new timesteps, or by a timestep that comes back to the highest or
        rises (KDPM2's rises within an image too, but by less than 1). In 16 bits the first few can be the same number;
        then the latents decide, which have hardly moved.
        """
        timesteps, rows = getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None), len(noisy_latents)
        lingers = timestep == self._start == self._last and _hardly_moved(self._first, noisy_latents)
        comes_back = (timestep >= self._start and not lingers) or timestep > self._last + 1
        self._last = timestep
        if self.environments is None or timesteps is not self._timesteps or comes_back:
            self._timesteps, self._start, self._first = timesteps, timestep, noisy_latents.detach()
            self.environments = self.mix.rows(noisy_latents)
        elif len(self.environments) % rows and rows % len(self.environments):
            self.environments = self.mix.rows(noisy_latents)
        else:  # the same images, in more or fewer rows where classifier-free guidance was switched on the way
            self.environments = self.environments.repeat(-(-rows // len(self.environments)), 1)[:rows]
        return self.environments


def _hardly_moved(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether latents have mostly the same signs; those of other noise agree in half of them."""
    rows = min(len(before), len(after))
    alike = before.shape[1:] == after.shape[1:]
    return alike and ((before[:rows] > 0) == (after[:rows] > 0)).float().mean().item() > 0.75


class _GuidedOutput:
    """The one forward hook of a guided denoiser: f~ = f + the sum of Delta * g_psi, each beside the frozen f."""

    def __init__(self, denoiser: torch.nn.Module, family: Family) -> None:
        self.attachments: list[Attachment] = []
        self._family, self._channels = family, family.shape(denoiser).latent_channels
        # The signature of the class, since offloading replaces the forward of the instance.
        self._signature = inspect.signature(type(denoiser).forward)
        # A plain forward hook survives CPU offload; one of diffusers' own hook registry does not.
        self.handle = denoiser.register_forward_hook(Hook(self._guide), with_kwargs=True)

    @torch.compiler.disable
    def _guide(self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self._family.read(denoiser, self._signature.bind(denoiser, *args, **kwargs).arguments)
        model_pred = self._family.prediction(output[0], call, self._channels)
        shifts = [found for each in self.attachments if (found := each.shift(call, model_pred)) is not None]
        if not shifts:
            return None
        guided = self._family.shifted(output[0], sum(shifts[1:], start=shifts[0]))
        return (guided, *output[1:]) if isinstance(output, tuple) else type(output)(sample=guided)


class _CallWatch(Hook):
    """In place of the method that ends a pipeline's calls: raises where a call ran without its guidance."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(self._end_call)
        self._pipe = weakref.ref(pipe)
        self.calls: dict[Attachment, int] = {}

    def _end_call(self) -> None:
        pipe = self._pipe()
        if pipe is not None:  # else a shallow copy has outlived it
            getattr(type(pipe), END_OF_CALL)(pipe)
        for attachment, before in self.calls.items():
            self.calls[attachment] = attachment.calls
            if attachment.calls == before:
                raise ModelError(
                    "Expected the guided denoiser to run during this call, but its hook did not fire: the images were "
                    "drawn without guidance. The denoiser was replaced, compiled or wrapped after the module was "
                    "attached. Detach, and attach to the denoiser in use (before compiling it)."
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(memo.get(id(self._pipe())), END_OF_CALL, do_nothing)  # of a copied pipeline: its own


class GuidedDenoiser:
    """f~ = f + g_psi, environments drawn by each row's noise: the denoiser that later rounds of the game audit."""

    def __init__(self, frozen: FrozenDenoiser, module: GuidanceModule) -> None:
        self.schedule, self.device = frozen.schedule, frozen.device
        self._frozen, self._module = frozen, module.to(frozen.device)
        self._mix = EnvironmentMix("iid", module.num_groups)
        weights = (value.cpu().contiguous().numpy().tobytes() for value in module.state_dict().values())
        self.fingerprint = fingerprint(frozen.fingerprint, *weights)

    @torch.no_grad()
    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guided prediction (B, C, H, W) and the frozen middle features (B, D, H', W')."""
        model_pred, features = self._frozen(noisy_latents, timesteps, condition)
        environments = self._mix.rows(noisy_latents).to(self.device)
        noisy_latents, timesteps = noisy_latents.to(self.device), timesteps.to(self.device)
        condition = to(condition, self.device, torch.float32)
        shift = self._module(noisy_latents, timesteps, condition, model_pred.float(), features.float(), environments)
        return model_pred + shift.to(model_pred.dtype), features
