"""Commands as plain functions: each dataclass that a function takes becomes options, made from its fields.

`def audit(*, model: Model, settings: AuditConfig, images: DataOptions)` has an option for every field of `AuditConfig`
and `DataOptions`, with type, range, default and help from there, and `--config FILE` for the settings.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Config, Setting, as_text, settings_of

SETTINGS, DATA, RUN = "Settings", "Data", "Run"
"""Panels of the help."""
Command = Callable[..., None]
_METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT"}


def option(default: Any, help: str, *flags: str, panel: str = SETTINGS, **details: Any) -> Any:
    """An option that is no field of a dataclass; `...` for a default makes it a necessary one."""
    return typer.Option(default, *flags, help=help, rich_help_panel=panel, **details)


def shown_default(words: object) -> str:
    """A default in words, as the help of an option ends with it."""
    return f" [dim]\\[default: {words}][/dim]"


CONFIG = option(..., "JSON or YAML with any settings of this step. Options override it.", "--config", metavar="FILE")


def command(app: typer.Typer, example: str, *, panel: str = "", name: str = "") -> Callable[[Command], Command]:
    """Register a function as a command of `app`, whose help ends with an example."""

    def register(function: Command) -> Command:
        app.command(name or None, rich_help_panel=panel or None, epilog=f"Example: {example}")(_with_options(function))
        return function

    return register


def _with_options(function: Command) -> Command:
    """`function` with an option for each field of its dataclass parameters; rare ones come last in the help."""
    parameters: list[inspect.Parameter] = []
    rare: list[inspect.Parameter] = []
    kinds: dict[str, Any] = {}
    for name, own in inspect.signature(function, eval_str=True).parameters.items():
        if not dataclasses.is_dataclass(own.annotation):
            parameters.append(own)
            continue
        kind: Any = own.annotation
        kinds[name] = kind
        if issubclass(kind, Config):
            parameters.append(
                inspect.Parameter("config", own.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, CONFIG])
            )
        for setting in settings_of(kind).values():
            annotation = _annotation(setting, field_docs(kind)[setting.name], getattr(kind, "panel", SETTINGS))
            parameter = inspect.Parameter(setting.name, own.KEYWORD_ONLY, default=None, annotation=annotation)
            (rare if setting.option.panel else parameters).append(parameter)

    def run(config: Path | None = None, **given: Any) -> None:
        for name, kind in kinds.items():
            start = kind.from_file(config) if config and issubclass(kind, Config) else kind()
            words = {field: given.pop(field) for field in settings_of(kind)}
            chosen = {field: settings_of(kind)[field].from_words(w) for field, w in words.items() if w is not None}
            given[name] = dataclasses.replace(start, **chosen)
        function(**given)

    run.__name__, run.__doc__, run.__annotations__ = function.__name__, function.__doc__, {}
    run.__signature__ = inspect.Signature(parameters + rare)  # type: ignore[attr-defined]  # what typer reads
    return run


def _annotation(setting: Setting, doc: str, panel: str) -> Any:
    """A setting's type as typer reads it, with its option."""
    hint, metavar = setting.type, setting.option.metavar or _METAVARS.get(setting.type)
    limits = {end: limit for end in ("min", "max") if math.isfinite(limit := getattr(setting.range, end))}
    if setting.item in (int, float):
        hint, metavar, limits = str, metavar or "NUMBER,...", {}
    elif setting.item:
        hint, metavar, limits = list[str], metavar or "TEXT", {}
    silent = setting.default is None or setting.default is False or setting.default in ("", (), {})
    default = setting.option.default or ("" if silent else as_text(setting.default))
    return Annotated[
        hint | None,
        option(
            ...,
            doc + (shown_default(default) if default else ""),
            setting.flag,
            panel=setting.option.panel or panel,
            metavar=metavar,
            show_default=False,
            **limits,
        ),
    ]


def field_docs(kind: Any) -> dict[str, str]:
    """The docstring under each field of a dataclass and its bases, on one line, by the field's name."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        docs |= {
            field.target.id: " ".join(doc.value.value.split())
            for field, doc in itertools.pairwise(_classes(base.__module__)[base.__name__].body)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
        }
    return docs


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
