"""Tab Compare: results of one run or of several, as figures, curves and a Pareto front, and the report of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import ConfigError, InvDiffError
from ..evaluation.results import Results
from ..report.compare import compare
from ..report.read import Parts, Run, read_run
from ..report.results_view import changes, costs
from ..report.view import glance
from ..report.write import save_report
from ..text import one_line
from .pieces import notice, piece, refusal
from .workspace import open_data

_QUIET: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private"}


class CompareTab:
    """The tab, built inside a `gr.Blocks`.

    Args:
        runs: Name to run, each with results; at least one.
    """

    def __init__(self, runs: Mapping[str, Parts]) -> None:
        self._runs = dict(runs)
        names = list(self._runs)
        with gr.Row():
            self._chosen = gr.CheckboxGroup(
                names, value=names[:1], label="Results", visible=len(names) > 1, elem_id="compare-runs"
            )
        self._page = gr.HTML(elem_id="compare")
        self._report = gr.Button("Write the report", size="sm", elem_id="compare-report")
        self._status = gr.HTML(elem_id="compare-status")
        self._chosen.change(self.show, self._chosen, self._page, trigger_mode="always_last", **_QUIET)
        self._report.click(self._write, self._chosen, self._status, **_QUIET)

    @property
    def loads(self) -> list[Any]:
        """The components that `first` fills."""
        return [self._page]

    def first(self) -> list[Any]:
        """Return what a page shows when it is opened."""
        return [self.show(list(self._runs)[:1])]

    def show(self, names: Sequence[str]) -> str:
        """Return the figures of the chosen runs as HTML."""
        try:
            chosen = [name for name in self._runs if name in names]
            if not chosen:
                raise ConfigError("Expected at least one of the results to be chosen, got none. Tick one.")
            return self._shown(chosen)
        except InvDiffError as error:
            return refusal(error)

    def _shown(self, names: Sequence[str]) -> str:
        if len(names) == 1:
            parts = self._runs[names[0]]
            run = read_run(Parts(results=parts.results, images=parts.images))
        else:
            run = Run(results=together({name: self._results(name) for name in names}))
        assert run.results is not None
        chosen = compare(run.results, run.images)
        assert chosen is not None
        found, spent, above = changes(run, chosen), costs(run, chosen, run.results), glance(run, chosen, 0.95)
        shown = [piece("headlines", above)]
        if above.pairs:
            shown.append(piece("pairs", above.pairs, above.names))
        shown.append(piece("plots", [*spent.over_guidance, *spent.over_module_scale]))
        shown += [piece("table", table) for table in (*found.fairness, *spent.tables)]
        notes = [notice(f"{note}.") for note in run.results.notes]
        return "".join([*shown, *notes])

    def _results(self, name: str) -> Results:
        results = self._runs[name].results
        assert results is not None
        return Results.load(results)

    def _write(self, names: Sequence[str]) -> str:
        """Write the report of each chosen run beside its results."""
        try:
            chosen = [name for name in self._runs if name in names]
            if not chosen:
                raise ConfigError("Expected at least one of the results to be chosen, got none. Tick one.")
            written = []
            for name in chosen:
                parts = self._runs[name]
                assert parts.results is not None
                folder = Path(parts.results).parent
                written.append(
                    save_report(
                        folder,
                        run=folder,
                        audit=parts.audit,
                        data=open_data(parts) if parts.audit is not None else None,
                        results=parts.results,
                        images=parts.images,
                        module=parts.module,
                    )
                )
        except InvDiffError as error:
            return refusal(error)
        return notice(f"Written: {', '.join(one_line(str(path)) for path in written)}")


def together(runs: Mapping[str, Results]) -> Results:
    """Return the results of several runs as one, each model's name after its run's.

    Raises:
        ConfigError: They are not of the same attribute and confidence.
    """
    first = next(iter(runs.values()))
    for name, results in runs.items():
        for what in ("attribute", "confidence"):
            here, there = getattr(first, what), getattr(results, what)
            if here != there:
                raise ConfigError(
                    f"Expected results of the same {what} to compare, got {one_line(str(here), 40)!r} and, in "
                    f"{name!r}, {one_line(str(there), 40)!r}. Choose others."
                )
    models = {f"{name}: {model}": of for name, results in runs.items() for model, of in results.models.items()}
    chosen = compare(first, {})
    baseline = chosen.before if chosen else ""
    notes = tuple(dict.fromkeys(note for results in runs.values() for note in results.notes))
    return replace(first, models=models, baseline=f"{next(iter(runs))}: {baseline}", notes=notes, run={})
