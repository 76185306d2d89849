"""The pictures beside a report's Markdown, which cannot hold images of its own."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.results import Results
from ..files import atomic_path, is_inside
from .audit_pictures import MOST_PROMPTS, OVERVIEW, overview
from .charts import save_line_charts
from .comparison import Comparison, choose, choose_images, in_order, measures_of, same_seeds
from .comparison_pictures import Shares, save_before_after
from .curves import module_lines, over_guidance, over_module_scale
from .found import withheld
from .sources import AuditSource, Sources
from .words import at_scale

PICTURES = {
    "before_after": "report-before-after.png",
    "groups": "report-groups.png",
    "bias": "report-bias.png",
    "scale": "report-module-scale.png",
}
_EVEN = "0 is balanced, 1 is always the same class"


def save_pictures(output_dir: Path, sources: Sources, audit: Path | None) -> dict[str, str]:
    """Write the pictures that there is something for, and remove those of an earlier report.

    Args:
        output_dir: Where the Markdown lies.
        sources: What the report is made from.
        audit: The audit's folder.

    Returns:
        File name by kind, as in `PICTURES`.
    """
    results = sources.measured.results if sources.measured else None
    chosen = choose(results) if results else choose_images(sources.images)
    paths = {name: output_dir / file_name for name, file_name in PICTURES.items()}
    written = {
        "before_after": chosen is not None and _before_after(paths["before_after"], sources, results, chosen),
        "groups": sources.audit is not None and _groups(paths["groups"], sources.audit, audit),
        "bias": results is not None and chosen is not None and _bias(paths["bias"], results, chosen),
        "scale": results is not None and chosen is not None and _scale(paths["scale"], sources, results, chosen),
    }
    for name, path in paths.items():
        if not written[name]:
            path.unlink(missing_ok=True)
    return {name: file_name for name, file_name in PICTURES.items() if written[name]}


def _before_after(path: Path, sources: Sources, results: Results | None, chosen: Comparison) -> bool:
    pairs = same_seeds(sources.images, chosen)
    if not pairs:
        return False
    shares: Shares | None = None
    if results:
        known = {model: measures_of(results, model, chosen.key) for model in (chosen.before, chosen.after)}
        shares = {model: measures.shares for model, measures in known.items() if measures}
        if any(prompt not in of_model for of_model in shares.values() for prompt in list(pairs)[:2]):
            shares = None
    save_before_after(path, pairs, chosen, shares=shares)
    return True


def _groups(path: Path, source: AuditSource, folder: Path | None) -> bool:
    if source.data is None:
        # People may have changed the audit since its own picture was drawn.
        own = None if folder is None or source.audit.edits.changed else folder / OVERVIEW
        if folder is None or own is None or not own.is_file() or not is_inside(own, folder):
            return False
        with atomic_path(path) as temporary:
            temporary.write_bytes(own.read_bytes())
        return True
    if withheld(source):
        return False
    data = source.data
    unfound = [prompt for prompt in source.audit.prompts if not prompt.found]
    overview(
        source.pages[:MOST_PROMPTS],
        unfound,
        lambda chosen: [data.image(source.rows[at]) for at in chosen],
        source.audit.words,
    ).save(path)
    return True


def _bias(path: Path, results: Results, chosen: Comparison) -> bool:
    curves = over_guidance(results, in_order(results, chosen), chosen)
    if not curves:
        return False
    save_line_charts(
        path,
        [curves[0].panel],
        title="Bias at every guidance scale",
        subtitle=f"How far apart the classes' shares are: {_EVEN}",
        x_name=curves[0].x_name,
    )
    return True


def _scale(path: Path, sources: Sources, results: Results, chosen: Comparison) -> bool:
    curves = over_module_scale(module_lines(results, sources.images, chosen), chosen.key)
    if not curves:
        return False
    save_line_charts(
        path,
        [curve.panel for curve in curves],
        title="Bias and quality at every scale of the module",
        subtitle=f"Scale 0 is the base model, 1 is what the module was trained for; {at_scale(chosen.key)}",
        x_name=curves[0].x_name,
    )
    return True
