"""Find, remove and measure hidden biases in text-to-image diffusion models, without labels.

What needs torch is imported when it is first asked for, so that `import invdiff` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import (
    ArchitectureConfig,
    AuditConfig,
    DemoConfig,
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    TrainConfig,
)
from .errors import InvDiffError

if TYPE_CHECKING:
    from .auditing.result import Audit as Audit
    from .auditing.run import audit as audit
    from .data.captioned import load_captioned_images as load_captioned_images
    from .evaluation.annotators.load import load_annotator as load_annotator
    from .evaluation.calibrate import calibrate as calibrate
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.results import Results as Results
    from .guidance.attach import attach as attach
    from .guidance.backends import load_guidance as load_guidance
    from .guidance.lora import GuidanceLoRA as GuidanceLoRA
    from .guidance.module import GuidanceModule as GuidanceModule
    from .guidance.tokens import GuidanceTokens as GuidanceTokens
    from .models.load import load_pipeline as load_pipeline
    from .report.write import save_report as save_report
    from .sampling import generate as generate
    from .training.finetune import finetune as finetune
    from .training.train import train as train

_HOME = {
    "Audit": "auditing.result",
    "GuidanceLoRA": "guidance.lora",
    "GuidanceModule": "guidance.module",
    "GuidanceTokens": "guidance.tokens",
    "Results": "evaluation.results",
    "attach": "guidance.attach",
    "audit": "auditing.run",
    "calibrate": "evaluation.calibrate",
    "evaluate": "evaluation.evaluate",
    "finetune": "training.finetune",
    "generate": "sampling",
    "load_annotator": "evaluation.annotators.load",
    "load_captioned_images": "data.captioned",
    "load_guidance": "guidance.backends",
    "load_pipeline": "models.load",
    "save_report": "report.write",
    "train": "training.train",
}

__version__: str
__all__ = [
    "ArchitectureConfig",
    "AuditConfig",
    "DemoConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "InvDiffError",
    "TrainConfig",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("invdiff")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
