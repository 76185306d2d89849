"""Write the measured figures of benchmarks/results/ into README.md and the pages of docs/.

python scripts/update_figures.py          # rewrite what stands between the markers
python scripts/update_figures.py --check  # exit 1 if anything would change
"""

import re
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import audits  # noqa: E402
import augmentation  # noqa: E402
import tables  # noqa: E402
from kept import RESULTS, markdown_table  # noqa: E402

from invdiff.files import read_json  # noqa: E402


def figures(part: str, benchmark: str = "birds") -> Any:
    """Return the figures of one part of benchmarks/birds.py, or of another benchmark."""
    return read_json(RESULTS / f"{benchmark}-{part}.json")["figures"]


def cfg(scales: Iterable[str]) -> list[str]:
    """The heads of columns of guidance scales."""
    return [f"CFG {float(scale):g}" for scale in scales]


def narrow(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, a single space where a cell is empty."""
    return markdown_table(head, rows).replace("|  |", "| |")


def coverage_table() -> str:
    """How often intervals cover, for each truth: Bias, and the metric that is covered least often."""
    measured, rows = figures("coverage", "evaluation"), []
    for truth, entry in measured["truths"].items():
        metrics = entry["metrics"]
        least = min(metrics, key=lambda name: metrics[name]["coverage"])
        of_bias = [f"{metrics['bias'][name]:.3f}" for name in ("coverage", "mean_width")]
        rows.append([truth, f"{entry['images_per_prompt']}", *of_bias, least, f"{metrics[least]['coverage']:.3f}"])
    head = ["truth", "images a prompt", "Bias: coverage", "mean width", "least covered metric", "coverage"]
    return f"{measured['simulations']:,} simulated evaluations of each truth.\n\n{markdown_table(head, rows)}"


def speed_line() -> str:
    """What evaluating 10,000 images costs."""
    m = figures("speed", "evaluation")
    return (
        f"{m['images']:,} images of 64 pixels against {m['reference_images']:,}: {m['evaluation_seconds']:.0f} s, "
        f"after {m['reference_seconds']:.0f} s for the reference, peak memory {m['peak_bytes'] / 2**30:.1f} GiB, "
        f"{m['threads']} CPU thread{'s' if m['threads'] > 1 else ''}, load average {m['load_average']:.1f}."
    )


def explicit_table() -> str:
    """Share of images that show the background the caption states."""
    measured = figures("explicit")
    of_scales = [(model, scale) for scale in measured["base"] for model in measured]
    head = ["caption", *(f"{model}, {cfg([scale])[0]}" for model, scale in of_scales)]
    prompts = next(iter(measured["base"].values()))
    rows = [[prompt, *(f"{measured[model][scale][prompt]:.3f}" for model, scale in of_scales)] for prompt in prompts]
    return markdown_table(head, rows)


def models_table(measured: dict[str, Any], *, accuracy: bool = False) -> str:
    """Bias of each model at each guidance scale, without intervals of the README's length."""
    rows = []
    for model, by_scale in measured.items():
        each = list(by_scale.values())
        cells = [f"{m['bias']:.3f} ({m['bias_ci'][0]:.3f} to {m['bias_ci'][1]:.3f})" for m in each]
        right = [" / ".join(f"{m['accuracy']:.3f}" for m in each)] if accuracy else []
        rows.append([model, *cells, f"{each[0]['bias_floor']:.3f}", *right])
    return narrow(["", *cfg(by_scale), "floor", *(["bird right"] if accuracy else [])], rows)


def families_table() -> str:
    """The audit and the Bias of base and guided images of a class-conditional flow transformer."""
    measured = figures("dit-flow", "families")
    rows = [
        [name, f"{m['auroc']:.3f}", f"{m['adjusted_rand']:.3f}", " / ".join(f"{share:.1%}" for share in m["shares"])]
        for name, m in measured["audit"].items()
    ]
    found = markdown_table(["class", "AUROC of the minority", "adjusted Rand index", "shares"], rows)
    return f"{found}\n\n{models_table(measured['by_model'], accuracy=True)}"


def cost_count_table() -> str:
    """Parameters and FLOPs of each denoiser and of the module that fits it."""
    rows = [
        [
            name,
            f"{m['parameters'] / 1e6:,.0f} M",
            f"{m['module_parameters'] / 1e6:.1f} M",
            f"{m['parameter_share']:.1%}",
            f"{m['flops'] / 1e9:,.0f}",
            f"{m['module_flops'] / 1e9:.1f}",
            f"{m['flop_share']:.1%}",
        ]
        for name, m in figures("count", "cost")["shapes"].items()
    ]
    head = ["shape", "parameters", "module", "share", "GFLOP a row", "module", "share"]
    return markdown_table(head, rows) + requirements_table("count")


def cost_sampling_table() -> str:
    """Seconds plain and guided, and their ratio, with quartiles."""
    measured = figures("sampling", "cost")
    kinds = {"bundled model, 20 steps, CFG 3": measured["bundled"]}
    kinds[f"SD 1.5 shape, {measured['sd15']['what']}"] = measured["sd15"]["batches"]
    spreads = ("plain_seconds", "guided_seconds", "ratio", "cpu_ratio")
    rows = [
        [kind, images, f"{m['repeats']}", *(with_quartiles(m[name]) for name in spreads), f"{m['load_average']:.1f}"]
        for kind, by_images in kinds.items()
        for images, m in by_images.items()
    ]
    head = ["", "images", "pairs", "plain, s", "guided, s", "ratio", "ratio of CPU time", "load"]
    return narrow(head, rows) + requirements_table("sampling")


def cost_training_table() -> str:
    """Seconds a step and peak memory of both recipes."""
    measured = figures("training", "cost")
    options = measured["options"]
    note = (
        f"Batch {options['batch-size']}, {options['resolution']} pixels, {measured['arithmetic']}, "
        f"{options['steps']} steps each after one to warm up."
    )
    rows = [
        [
            recipe,
            f"{m['trained_parameters'] / 1e6:.1f} M",
            with_quartiles(m["step_seconds"]),
            f"{m['peak_bytes'] / 2**30:.1f}",
            f"{m['resident_after_imports_bytes'] / 2**30:.1f}",
            f"{m['load_average_before']:.1f}",
        ]
        for recipe, m in measured["recipes"].items()
    ]
    head = ["recipe", "trained", "a step, s", "peak memory, GiB", "after imports, GiB", "load"]
    return f"{note}\n\n{markdown_table(head, rows)}{requirements_table('training')}"


def cost_backends_table() -> str:
    """Parameters, a step, memory, and drawing relative to plain, of each backend."""
    measured, rows = figures("backends", "cost"), []
    drawing = measured["drawing"]
    for way in next(iter(drawing.values())):
        if way in ("plain_seconds", "repeats", "load_average"):
            continue
        cells = ["", "", ""]
        if m := measured["training"].get(way):
            cells = [f"{m['trained_parameters']:,}", with_quartiles(m["step_seconds"])]
            cells.append(f"{m['peak_bytes'] / 2**20:.0f}")
        ratios = [of[way] for of in drawing.values()]
        cells += [with_quartiles(ratio["ratio"]) for ratio in ratios]
        rows.append([way, *cells, " / ".join(f"{ratio['cpu_ratio']['median']:.2f}" for ratio in ratios)])
    head = ["", "trained", "a step, s", "memory of training, MiB"]
    head += [f"drawing {'one image' if images == '1' else f'{images} images'}" for images in drawing]
    return markdown_table([*head, "CPU time alone"], rows) + requirements_table("backends")


def requirements_table(part: str) -> str:
    """One row per requirement of a part of benchmarks/cost.py, below its table: limit, figure, whether it is met."""
    shape, rows = ".1%" if part == "count" else ".2f", []
    for name, row in figures(part, "cost")["requirements"].items():
        limit = f"at least {row['at_least']:{shape}}" if "at_least" in row else f"at most {row['at_most']:{shape}}"
        if row["measured"] is None:
            rows.append([name, limit, "", row["reason"]])
        else:
            rows.append([name, limit, f"{row['measured']:{shape}}", "met" if row["met"] else "**missed**"])
    return "\n\n" + narrow(["requirement", "limit", "measured", ""], rows)


def theory_table(part: str) -> str:
    """One of the tables of benchmarks/theory.py: a row for each entry, a column for each figure of it."""
    theory = figures("mixtures", "theory")
    measured = theory[part]
    if part == "penalties":
        head = ["groups", *(f"{loss}, {of}" for loss in measured["equal"] for of in ("biased", "balanced"))]
        entries = {name: [value for pair in losses.values() for value in pair] for name, losses in measured.items()}
    elif part == "scores":
        head = ["W", *next(iter(measured.values()))]
        entries = {name: list(row.values()) for name, row in measured.items()}
    elif part == "cfg":
        head = ["null row", "by", *cfg(theory["scales"])]
        entries = {f"{null} | {by}": row for null, rows in measured.items() for by, row in rows.items()}
    else:
        head = ["share of the common group", *(f"Delta {delta:g}" for delta in measured["deltas"])]
        entries = {by: measured[by] for by in ("formula", "drawn")}
    digits = 4 if part == "penalties" else 3
    return markdown_table(head, [[name, *(f"{value:.{digits}f}" for value in row)] for name, row in entries.items()])


def with_quartiles(values: dict[str, float]) -> str:
    """Return a median with its quartiles."""
    return f"{values['median']:.2f} ({values['lower_quartile']:.2f} to {values['upper_quartile']:.2f})"


def preservation_table() -> str:
    """How far images of captions that nobody audited move, with and without preservation."""
    paths = sorted((RESULTS / "preservation").glob("*.json"), reverse=True)
    of_cells = {path.stem.rpartition("-seed-")[0]: read_json(path)["figures"] for path in paths}
    shifts = {name: of["unrelated prompts, CFG 3"] for name, of in of_cells.items()}
    prompts = {key: key.partition(", ")[2].strip("'") or "mean" for key in next(iter(shifts.values()))}
    rows = [[name, *(f"{of[key]:.3f}" for of in shifts.values())] for key, name in prompts.items()]
    return narrow(["", *shifts], rows)


SUITES = (
    *("waterbirds", "tuning", "fairface-age", "fairface-race", "fairface-gender"),
    *("studies", "birds", "birds-studies"),
)
HEADLINE = (
    *("biased", "ceiling", "ours", "ours-true", "fair-diffusion", "tiw", "tiw-mixture"),
    *("invdiff-released", "invdiff-paper-100848", "invdiff-paper-full"),
)
BLOCKS = {
    **{name: partial(tables.markdown, name, RESULTS) for name in SUITES},
    "waterbirds-headline": partial(tables.headline, "waterbirds", RESULTS, HEADLINE),
    "preservation": preservation_table,
    "audits": audits.table,
    "explicit": explicit_table,
    "paraphrases": lambda: models_table(figures("paraphrases")),
    "augmentation": augmentation.table,
    "coverage": coverage_table,
    "speed": speed_line,
    "families-dit-flow": families_table,
    "cost-count": cost_count_table,
    "cost-sampling": cost_sampling_table,
    "cost-training": cost_training_table,
    "cost-backends": cost_backends_table,
    **{f"theory-{part}": partial(theory_table, part) for part in ("scores", "penalties", "cfg", "delta")},
}


def rendered(text: str) -> str:
    """Return `text` with every marked block made anew."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- figures: {name} -->\n{BLOCKS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- figures: ([a-z-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite or check every page."""
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if (new := rendered(text)) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale:
        print("stale:" if "--check" in sys.argv else "rewritten:", ", ".join(stale))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
