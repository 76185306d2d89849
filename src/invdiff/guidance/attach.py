"""Put a guidance module on any pipeline's denoiser, and take it off again."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
import weakref
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..errors import ConfigError, ModelError, check_kinds
from ..files import fingerprint, weights_digest
from ..models.families import Condition, DenoiserCall, Family, family_of
from ..models.frozen import FrozenDenoiser, Hook, do_nothing
from ..models.load import GUIDED, denoiser_of, loras_of
from ..models.schedule import NoiseSchedule
from .base import Guidance, Rows, weight_signature
from .environments import EnvironmentMix, Environments, strata

MOST_COMBINATIONS = 16  # of groups of several factors, that a later round averages over
END_OF_CALL = "maybe_free_model_hooks"  # the method with which every diffusers pipeline ends a call


def attach(
    pipe: Any,
    module: Guidance,
    scale: float = 1.0,
    environments: Environments = "uniform",
    *,
    seed: int = 0,
    strict: bool = True,
) -> Attachment:
    """Guide every image that `pipe` draws from now on, at strength Delta.

    Use it as a context manager, or call `detach()` on the returned attachment::

        with attach(pipe, module, scale=1.0):
            images = pipe("a photo of a waterbird", num_images_per_prompt=8).images

    Several of one backend may be attached at once, and their effects add. Other pipelines that share the denoiser
    (image-to-image, inpainting, ControlNet) are guided too. Where guidance is off in the null row, that is the row of
    the null caption, or of the negative prompt in its place.

    Args:
        pipe: A diffusers pipeline of a supported family; its weights are not touched.
        module: A guidance made for this pipeline's model. A copy of it is attached, in the pipeline's precision.
        scale: Delta, the strength; 0 leaves the pipeline bit-identical.
        environments: The target mix, spread over the images of a call: `"uniform"`, proportions as `[1.0, 0.0]`, those
            of named factors as `{"factor 1": [0.7, 0.3]}`, `"iid"` (uniform, each image by its own noise), or each
            image's group, `torch.tensor([1, 0])`. See `EnvironmentMix`. An invariant module takes the two words only.
        seed: Another seed draws other groups for the same starting noise. Beside others, the next that none of them
            has, so that their groups are independent.
        strict: Also refuse a model of the right shape with other weights.

    Raises:
        ModelError: It was trained for another model, another backend is attached, or the denoiser is compiled.
        ConfigError: `environments` do not fit the module's groups, or `scale` its backend.
    """
    check_fit(pipe, module, strict=strict)
    return Attachment(pipe, module, scale, mix_for(module, environments, seed=seed))


def mix_for(module: Guidance, environments: Environments, *, seed: int = 0) -> EnvironmentMix:
    """The target mix of a module's groups; of an invariant module proportions or groups are a `ConfigError`."""
    if not module.sees_environment and not isinstance(environments, str):
        raise ConfigError(
            "Expected environments 'uniform' with an invariant module, which never sees the group, got "
            f"{environments!r}. Leave them out, or train a module in balanced mode."
        )
    return EnvironmentMix(environments, module.num_groups, factor_names=module.factor_names, seed=seed)


def check_fit(pipe: Any, module: Guidance, *, strict: bool = True) -> None:
    """Raise `ModelError` that names every difference, unless `module` fits `pipe`'s denoiser, not compiled yet."""
    check_kinds(module=(module, Guidance))
    denoiser, wanted = denoiser_of(pipe), module.config
    kind = type(denoiser).__name__
    for path, part in denoiser.named_modules():
        compiled = getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
        if compiled and (not path or any(f"{hooked}.".startswith(f"{path}.") for hooked in module.hooked)):
            raise ModelError(
                f"Expected {kind}{path and '.' + path} not to be compiled yet, since compiled code ignores new hooks, "
                "found it compiled. Attach first, then compile."
            )
    found: dict[str, Any] = {"denoiser_class": kind, "prediction_type": NoiseSchedule(pipe.scheduler).prediction_type}
    if wanted["denoiser_class"] == kind:
        fitting = module.fitting(family_of(pipe), denoiser)  # options were free to choose
        found |= {name: value for name, value in fitting.items() if name not in module.options}
    wrong = [_difference(name, wanted[name], value) for name, value in found.items() if wanted[name] != value]
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


def _difference(name: str, expected: Any, found: Any) -> str:
    """What differs, in words; of the shapes of layers, the first."""
    if isinstance(found, dict):
        expected = expected or {}
        layer = next(each for each in expected | found if expected.get(each) != found.get(each))
        name, expected, found = f"shape of {layer}", expected.get(layer, "none"), found.get(layer, "none")
    return f"{name}: expected {expected}, found {found}"


def same_weights(expected: np.ndarray, actual: np.ndarray) -> bool:
    """Whether two signatures, (weights,), are of one model; NaN in `actual` is not compared.

    Weights may be stored in 16 bits on either side, or in 8 (layerwise casting), which keep 2 or 3 bits of a number.
    """
    tolerance, least = np.full(expected.shape, 1 / 128), np.full(expected.shape, 1e-7)
    for dtype, rounding in ((torch.float8_e4m3fn, 1 / 16), (torch.float8_e5m2, 1 / 8)):
        for values in map(torch.from_numpy, (expected, actual)):
            eighth = (values.to(dtype).to(values.dtype) == values).numpy()
            tolerance[eighth], least[eighth] = rounding, 1e-3
    far = np.abs(expected - actual) > least + tolerance * np.maximum(np.abs(expected), np.abs(actual))
    return not far.any()


class Attachment:
    """A guidance module on a pipeline's denoiser; `detach()` restores the model.

    Attributes:
        scale: Delta, the strength of guidance; change it at any time, as the mix.
        mix: The target mix that groups of images are drawn from; set it to what `attach` takes as `environments`.
        calls: How often the denoiser has run since the module was attached.
    """

    def __init__(self, pipe: Any, module: Guidance, scale: float, mix: Any) -> None:
        self.guidance = copy.deepcopy(module).eval().requires_grad_(False)
        self.scale, self.mix, self.calls, self._own_calls = scale, mix, 0, 0
        self._groups: torch.Tensor | None = None
        denoiser, family = denoiser_of(pipe), family_of(pipe)
        # Of the newest images: the scheduler's timesteps, first and last timestep.
        self._timesteps: torch.Tensor | None = None
        self._start, self._last = np.inf, np.inf
        self._before: torch.Tensor | None = None  # the latents of the call before, of the same images
        self._pipe, self._denoiser = weakref.ref(pipe), weakref.ref(denoiser)
        self._null: Condition = {}
        self._doubles_rows = family.doubles_rows
        if module.config["null_adapter"] != "on" and getattr(pipe, "text_encoder", self) is not None:
            self._null = family.null_condition(pipe)
        attached = GUIDED[denoiser].attachments if denoiser in GUIDED else []
        if attached and (other := attached[0].guidance.backend) != module.backend:
            raise ModelError(
                f"Expected guidance of one backend on a model, found {other!r} attached and got {module.backend!r}. "
                "Detach the other first."
            )
        if any(each._module() is module for each in attached):
            warnings.warn(
                "The same guidance is attached to this model already, and both effects add up. Detach the first.",
                stacklevel=3,
            )
        while self.mix.seed in [each.mix.seed for each in attached]:
            self.mix.seed += 1  # else their groups would go together
        self._module = weakref.ref(module)
        self._uninstall = self.guidance.install(denoiser, family)
        self._output = GUIDED[denoiser] = GUIDED.get(denoiser) or _GuidedCalls(denoiser, family)
        self._output.attachments.append(self)
        if not isinstance(vars(pipe).get(END_OF_CALL), _CallWatch):
            setattr(pipe, END_OF_CALL, _CallWatch(pipe))
        vars(pipe)[END_OF_CALL].calls[self] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale":
            self.guidance.check_scale(value)
        elif name == "mix" and not isinstance(value, EnvironmentMix):
            value = mix_for(self.guidance, value, seed=self.mix.seed)
        elif name == "environments":
            raise ConfigError("Expected mix to be set, got environments: the groups that were drawn from it. Set mix.")
        super().__setattr__(name, float(value) if name == "scale" else value)

    @property
    def environments(self) -> torch.Tensor | None:
        """Groups of the rows of the newest batch, (rows, factors), or None before the first."""
        return self._groups

    def detach(self) -> None:
        """Restore the plain model. Calling it twice does no harm."""
        denoiser, pipe = self._denoiser(), self._pipe()
        self._uninstall()
        if denoiser is not None and self in self._output.attachments:
            self._output.attachments.remove(self)
            if not self._output.attachments:
                self._output.close()
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

    def begin(self, call: DenoiserCall) -> Rows | None:
        """What guides the rows of a call; None at scale 0."""
        (pipe, doubled), last = _running_pipeline(), self._last
        self.calls += 1
        self._own_calls += pipe is None or self in getattr(vars(pipe).get(END_OF_CALL), "calls", ())
        environments = self._follow_images(call.noisy_latents, float(call.timesteps[0]), pipe, doubled)
        again = pipe is not None and self._last == last and self._before is not None
        null = self._null_rows(call, pipe, doubled, self._before if again else None)
        self._before = call.noisy_latents
        null = None if null is None else null & ~self.guidance.guides_null(environments)
        return Rows(environments, self.scale, null) if self.scale else None

    def _null_rows(
        self, call: DenoiserCall, pipe: Any, doubled: bool | None, before: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The rows of the null caption, (rows,) of bool; None where all run under guidance.

        `before` are the latents of the running pipeline's call before, where that was of the same images and timestep.
        """
        if self.guidance.config["null_adapter"] == "on" or not call.condition:
            return None
        null = rows_alike(call.condition, self._null)
        if before is not None and torch.equal(before, call.noisy_latents):
            null[:] = True  # Flux's negative prompts come in a call of their own, after that of the prompts
        elif "class_labels" not in call.condition and doubled is not False:
            # Of negative prompts, some of which may be empty; not where null rows come last, in a loop of one's own.
            first, *others = call.noisy_latents.chunk(self._copies(pipe, doubled) or 2)
            repeated = len(others) > 0 and all(torch.equal(other, first) for other in others)
            null[: len(first)] |= repeated and (pipe is not None or not bool(null[len(first) :].all()))
        return null

    def _copies(self, pipe: Any, doubled: bool | None) -> int | None:
        """How often each image comes in a call of the running pipeline; None where nothing says it."""
        if pipe is not None and not self._doubles_rows:
            return 1
        perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
        return None if doubled is None else 1 + bool(doubled) + bool(perturbed)

    def _follow_images(
        self, noisy_latents: torch.Tensor, timestep: float, pipe: Any, doubled: bool | None
    ) -> torch.Tensor:
        """The groups of each row, (rows, factors); where new images begin, they are drawn from their noise.

        New images are noticed by the scheduler's new timesteps, by a timestep that comes back to the first, or by one
        that rises (KDPM2's rises within an image too, but by less than 1) while the latents are others: they have
        hardly moved where the first few timesteps are one number in 16 bits, or where an image is inverted.
        """
        scheduler, rows = getattr(pipe or self._pipe(), "scheduler", None), len(noisy_latents)
        timesteps = getattr(scheduler, "timesteps", None)
        rises, last = timestep >= self._start or timestep > self._last + 1, self._last
        moved, self._last = rises and not _hardly_moved(self._before, noisy_latents), timestep
        if self._groups is None or timesteps is not self._timesteps or moved or timestep == self._start != last:
            self._timesteps, self._start = timesteps, timestep
            self._before = self._groups = None
        if self._groups is None or (len(self._groups) % rows and rows % len(self._groups)):
            self._groups = self.mix.rows(noisy_latents, self._copies(pipe, doubled))
        else:  # the same images, in more or fewer rows where classifier-free guidance was switched on the way
            self._groups = self._groups.repeat(-(-rows // len(self._groups)), 1)[:rows]
        return self._groups


def _running_pipeline() -> tuple[DiffusionPipeline | None, bool | None]:
    """The pipeline that calls the denoiser, not always the one attached to; None in a loop of one's own.

    And whether it doubles rows for classifier-free guidance: None where it says so neither by property nor, as
    PixArt's, by a variable. DiT's do not.
    """
    frame, name = inspect.currentframe(), "do_classifier_free_guidance"
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(found := frame.f_locals.get("self"), DiffusionPipeline):
            return found, getattr(found, name, frame.f_locals.get(name))
        frame = frame.f_back
    return None, None


def rows_alike(condition: Condition, one: Condition) -> torch.Tensor:
    """The rows of a condition that are those of `one`, of a single row: (rows,) of bool, on the CPU."""
    alike = torch.zeros(len(next(iter(condition.values()))), dtype=torch.bool)
    for name in ("prompt_embeds", "class_labels"):
        if name in condition and name in one and condition[name].shape[1:] == one[name].shape[1:]:
            # Embeddings may differ as far as 16 bits make them, labels of classes may not.
            rtol, atol = (0.02, 1e-3) if condition[name].is_floating_point() else (0.0, 0.0)
            same = torch.isclose(condition[name], one[name].to(condition[name]), rtol=rtol, atol=atol)
            alike = same.reshape(len(alike), -1).all(dim=1).cpu()
    return alike


def _hardly_moved(before: torch.Tensor | None, after: torch.Tensor) -> bool:
    """Whether latents have mostly the same signs; those of other noise agree in half of them."""
    if before is None or before.shape[1:] != after.shape[1:]:
        return False
    return ((before[: len(after)] > 0) == (after[: len(before)] > 0)).float().mean().item() > 0.75


class _GuidedCalls:
    """The hooks of a guided denoiser, before and after its forward pass."""

    def __init__(self, denoiser: torch.nn.Module, family: Family) -> None:
        self.attachments: list[Attachment] = []
        self._family, self._channels = family, family.shape(denoiser).latent_channels
        # The signature of the class, since offloading replaces the forward of the instance.
        self._signature = inspect.signature(type(denoiser).forward)
        self._call: DenoiserCall | None = None
        # Plain forward hooks survive CPU offload; those of diffusers' own hook registry do not.
        self._handles = (
            denoiser.register_forward_pre_hook(Hook(self._begin), with_kwargs=True),
            denoiser.register_forward_hook(Hook(self._end)),
        )

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def _begin(self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self._signature.bind(denoiser, *args, **kwargs)
        self._call = self._family.read(denoiser, bound.arguments)
        for each in self.attachments:
            bound.arguments.update(each.guidance.before(bound.arguments, each.begin(self._call)))
        return bound.args[1:], bound.kwargs

    @torch.compiler.disable
    def _end(self, denoiser: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call: Any = self._call
        self._call = None
        model_pred = self._family.prediction(output[0], call, self._channels)
        shifts = [found for each in self.attachments if (found := each.guidance.after(call, model_pred)) is not None]
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
        if (pipe := self._pipe()) is not None:  # else a shallow copy has outlived it
            getattr(type(pipe), END_OF_CALL)(pipe)
        before, self.calls = self.calls, {attachment: attachment._own_calls for attachment in self.calls}
        if any(before[attachment] == calls for attachment, calls in self.calls.items()):
            raise ModelError(
                "Expected the guided denoiser to run during this call, but its hook did not fire: the images were "
                "drawn without guidance. The denoiser was replaced, compiled or wrapped after the module was "
                "attached. Detach, and attach to the denoiser in use (before compiling it)."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(memo.get(id(self._pipe())), END_OF_CALL, do_nothing)  # of a copied pipeline: its own


class GuidedDenoiser:
    """f~ averaged over all groups, as often as each other: the denoiser that later rounds of the game audit."""

    def __init__(self, frozen: FrozenDenoiser, module: Guidance, null: Condition) -> None:
        """`null` is the condition of the null caption, one row."""
        self.schedule, self.device = frozen.schedule, frozen.device
        self._null = null if module.config["null_adapter"] != "on" else {}
        self._frozen, self._module = frozen, module.to(frozen.device)
        sizes = module.num_groups if module.sees_environment else (1,)
        # Of many factors, as of prompts with groups of their own, not every combination.
        spread = strata(min(math.prod(sizes), MOST_COMBINATIONS), "combinations", sizes) * sizes
        self._combinations = torch.from_numpy(spread).long().split(1)
        self.fingerprint = fingerprint(frozen.fingerprint, weights_digest(self._module))

    @torch.no_grad()
    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guided prediction (B, C, H, W) and middle features (B, D, H', W')."""
        unguided = rows_alike(condition, self._null) if condition else None
        call, count = DenoiserCall(noisy_latents, timesteps, condition), len(noisy_latents)
        each = [Rows(groups.repeat(count, 1), null=unguided) for groups in self._combinations]
        found = [self._module.guided(self._frozen, call, rows) for rows in each]
        model_pred, features = (torch.stack(values).mean(dim=0) for values in zip(*found, strict=True))
        return model_pred, features
