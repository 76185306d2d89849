"""The tokens backend: learned vectors for each group of each hidden factor, appended to the prompt embedding.

Like textual inversion (Gal et al., ICLR 2023, arXiv 2208.01618), but of groups, and beside the prompt's own tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..errors import ConfigError, ModelError
from ..models.families import DenoiserCall, Family, family_of
from ..models.frozen import FrozenDenoiser
from .base import Guidance, GuidanceType, Rows

SPEED = 20.0  # how much faster a vector moves than what is learned, so that other backends' learning rate fits


class GuidanceTokens(Guidance):
    """A few vectors a group that the model reads as further tokens of the prompt; those of several factors follow.

    A vector is `unit` times the sum of a random start, the same for all groups, and what is learned, which starts at
    zero. A token that is there has weight in attention, whatever it holds: while nothing is learned, and at scale 0,
    none is appended. In `invariant` mode the same vectors serve all groups. Beside what `Guidance` lists, the config
    has `tokens`, vectors of each group, `prompt_dim`, their width, and `unit`: the size of an element of a prompt
    embedding, so that one learning rate fits every text encoder.
    """

    backend: ClassVar[str] = "tokens"
    options: ClassVar[tuple[str, ...]] = ("tokens",)
    start: torch.Tensor

    @register_to_config
    def __init__(
        self,
        *,
        tokens: int = 4,
        prompt_dim: int = 768,
        unit: float = 1.0,
        num_groups: Sequence[int] = (2,),
        factor_names: Sequence[str] = (),
        mode: str = "balanced",
        null_adapter: str = "on",
        denoiser_class: str = "UNet2DConditionModel",
        prediction_type: str = "epsilon",
        weight_signature: Sequence[float] = (),
        base_model: str = "",
        loras: Sequence[Sequence[str]] = (),
        mixes: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if null_adapter != "on":
            raise ConfigError(
                f"Expected null_adapter 'on' or 'auto' with tokens, got {null_adapter!r}: all rows of a call have "
                "as many tokens, and not every model reads a mask. Take the lora backend to leave the null row alone."
            )
        sizes = num_groups if mode == "balanced" else (1,)
        self.vectors = nn.Parameter(torch.zeros(sum(sizes), tokens, prompt_dim))
        # Equal tokens would have equal gradients, and stay equal.
        self.register_buffer("start", torch.randn(len(sizes), tokens, prompt_dim))

    @classmethod
    def fitting(cls, family: Family, denoiser: Any, *, tokens: int = 4) -> dict[str, Any]:  # type: ignore[override]
        """The width of the prompt embeddings."""
        width = family.shape(denoiser).prompt_dim
        if not width:
            raise ModelError(
                f"Expected a model that reads prompt embeddings, got {family.title}, which reads none. Take another."
            )
        return {"tokens": tokens, "prompt_dim": width}

    @classmethod
    def for_pipeline(cls: type[GuidanceType], pipe: Any, **options: Any) -> GuidanceType:
        """As `Guidance.for_pipeline`; the null prompt's embeddings tell `unit`."""
        guidance = super().for_pipeline(pipe, **options)
        with torch.no_grad():
            embeds = family_of(pipe).encode_captions(pipe, [""])["prompt_embeds"].float()
        sizes = embeds.square().mean(dim=-1).sqrt()
        # The median, since a few tokens may be many times as long; zeros stand for a text encoder that is absent.
        guidance.register_to_config(unit=sizes[sizes > 0].median().item())
        return guidance

    def guided(self, frozen: FrozenDenoiser, call: DenoiserCall, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction and the middle features with the tokens appended, learned or not; see `Guidance`."""
        embeds = self._appended(call.condition["prompt_embeds"].to(frozen.device), rows)
        condition = call.condition | {"prompt_embeds": embeds}
        if "prompt_attention_mask" in condition:
            condition["prompt_attention_mask"] = self._masked(condition["prompt_attention_mask"])
        return frozen.predict(call.noisy_latents, call.timesteps, condition)

    def before(self, arguments: dict[str, Any], rows: Rows | None) -> dict[str, Any]:
        # The prompt embeddings with the tokens behind them, and what is of their length.
        if rows is None or not self.vectors.any():
            return {}
        changed = {"encoder_hidden_states": self._appended(arguments["encoder_hidden_states"], rows)}
        if arguments.get("encoder_attention_mask") is not None:
            changed["encoder_attention_mask"] = self._masked(arguments["encoder_attention_mask"])
        if arguments.get("txt_ids") is not None:  # of Flux: text has no place
            changed["txt_ids"] = F.pad(arguments["txt_ids"], (0, 0, 0, self.start[..., 0].numel()))
        return changed

    def check_scale(self, scale: float) -> None:
        if scale not in (0, 1):
            raise ConfigError(
                f"Expected scale 0 or 1 with tokens, got {scale!r}: a token is there or not, and a shorter one has "
                "hardly less weight in attention. Take the lora or module backend for strengths between."
            )

    def _appended(self, embeds: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Prompt embeddings (rows, length, width) with the vectors of each row's groups behind them."""
        before = torch.tensor([0, *accumulate(self.num_groups)][:-1])  # groups of the factors before each
        places = rows.environments.cpu() + before if self.sees_environment else torch.zeros(len(embeds), 1).long()
        vectors = self.config["unit"] * (self.start + SPEED * self.vectors[places])  # (rows, factors, tokens, width)
        return torch.cat([embeds, vectors.flatten(1, 2).to(embeds)], dim=1)

    def _masked(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask (rows, length), or a bias of attention (rows, 1, length), that lets our tokens be read."""
        return F.pad(mask, (0, self.start[..., 0].numel()), value=1 if mask.ndim == 2 else 0)
