"""Write the measured figures of benchmarks/results/ into README.md and the pages of docs/.

python scripts/update_figures.py          # rewrite what stands between the markers
python scripts/update_figures.py --check  # exit 1 if anything would change
"""

import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))


def figures(part: str, benchmark: str = "birds") -> Any:
    """Return the figures of one part of benchmarks/birds.py, or of another benchmark."""
    return json.loads((RESULTS / f"{benchmark}-{part}.json").read_text(encoding="utf-8"))["figures"]


def coverage_table() -> str:
    """How often intervals cover, for each truth: Bias, and the metric that is covered least often."""
    measured = figures("coverage", "evaluation")
    table = [
        "| truth | images a prompt | Bias: coverage | mean width | least covered metric | coverage |",
        "|---|---|---|---|---|---|",
    ]
    for truth, entry in measured["truths"].items():
        metrics = entry["metrics"]
        least = min(metrics, key=lambda name: metrics[name]["coverage"])
        table.append(
            f"| {truth} | {entry['images_per_prompt']} | {metrics['bias']['coverage']:.3f} | "
            f"{metrics['bias']['mean_width']:.3f} | {least} | {metrics[least]['coverage']:.3f} |"
        )
    return f"{measured['simulations']:,} simulated evaluations of each truth.\n\n" + "\n".join(table)


def speed_line() -> str:
    """What evaluating 10,000 images costs."""
    m = figures("speed", "evaluation")
    return (
        f"{m['images']:,} images of 64 pixels against {m['reference_images']:,}: {m['evaluation_seconds']:.0f} s, "
        f"after {m['reference_seconds']:.0f} s for the reference, peak memory {m['peak_bytes'] / 2**30:.1f} GiB, "
        f"{m['threads']} CPU thread{'s' if m['threads'] > 1 else ''}, load average {m['load_average']:.1f}."
    )


def augmentation_table() -> str:
    """What classifiers learn from biased photographs and images that are drawn."""
    return str(importlib.import_module("augmentation").table(RESULTS))


def audits_table() -> str:
    """What the audit finds, as `python benchmarks/audits.py table` prints it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from audits import table

    return str(table())


def explicit_table() -> str:
    """Share of images that show the background the caption states."""
    measured = figures("explicit")
    scales = list(measured["base"])
    head = [f"{model}, CFG {float(scale):g}" for scale in scales for model in measured]
    rows = ["| caption | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for prompt in measured["base"][scales[0]]:
        cells = [f"{measured[model][scale][prompt]:.3f}" for scale in scales for model in measured]
        rows.append(f"| {prompt} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def models_table(part: str) -> str:
    """Bias of each model at each guidance scale, without intervals of the README's length."""
    measured = figures(part)
    scales = list(next(iter(measured.values())))
    rows = ["| | " + " | ".join(f"CFG {float(scale):g}" for scale in scales) + " | floor |"]
    rows.append("|---" * (len(scales) + 2) + "|")
    for model, by_scale in measured.items():
        cells = [f"{m['bias']:.3f} ({m['bias_ci'][0]:.3f} to {m['bias_ci'][1]:.3f})" for m in by_scale.values()]
        rows.append(f"| {model} | " + " | ".join(cells) + f" | {by_scale[scales[0]]['bias_floor']:.3f} |")
    return "\n".join(rows)


def families_table() -> str:
    """The audit and the Bias of base and guided images of a class-conditional flow transformer."""
    measured = figures("dit-flow", "families")
    rows = ["| class | AUROC of the minority | adjusted Rand index | shares |", "|---|---|---|---|"]
    for name, m in measured["audit"].items():
        shares = " / ".join(f"{share:.1%}" for share in m["shares"])
        rows.append(f"| {name} | {m['auroc']:.3f} | {m['adjusted_rand']:.3f} | {shares} |")
    scales = list(measured["by_model"]["base"])
    rows += ["", "| | " + " | ".join(f"CFG {float(scale):g}" for scale in scales) + " | floor | bird right |"]
    rows.append("|---" * (len(scales) + 3) + "|")
    for model, by_scale in measured["by_model"].items():
        cells = [f"{m['bias']:.3f} ({m['bias_ci'][0]:.3f} to {m['bias_ci'][1]:.3f})" for m in by_scale.values()]
        right = " / ".join(f"{m['accuracy']:.3f}" for m in by_scale.values())
        rows.append(f"| {model} | " + " | ".join(cells) + f" | {by_scale[scales[0]]['bias_floor']:.3f} | {right} |")
    return "\n".join(rows)


def cost_count_table() -> str:
    """Parameters and FLOPs of each denoiser and of the module that fits it."""
    rows = ["| shape | parameters | module | share | GFLOP a row | module | share |", "|---" * 7 + "|"]
    for name, m in figures("count", "cost")["shapes"].items():
        cells = [
            f"{m['parameters'] / 1e6:,.0f} M",
            f"{m['module_parameters'] / 1e6:.1f} M",
            f"{m['parameter_share']:.1%}",
            f"{m['flops'] / 1e9:,.0f}",
            f"{m['module_flops'] / 1e9:.1f}",
            f"{m['flop_share']:.1%}",
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n\n" + requirements_table("count", ".1%")


def cost_sampling_table() -> str:
    """Seconds plain and guided, and their ratio, with quartiles."""
    measured = figures("sampling", "cost")
    kinds = {"bundled model, 20 steps, CFG 3": measured["bundled"]}
    kinds[f"SD 1.5 shape, {measured['sd15']['what']}"] = measured["sd15"]["batches"]
    rows = ["| | images | pairs | plain, s | guided, s | ratio | ratio of CPU time | load |", "|---" * 8 + "|"]
    rows += [
        f"| {kind} | {images} | {m['repeats']} | {with_quartiles(m['plain_seconds'])} | "
        f"{with_quartiles(m['guided_seconds'])} | {with_quartiles(m['ratio'])} | {with_quartiles(m['cpu_ratio'])} | "
        f"{m['load_average']:.1f} |"
        for kind, by_images in kinds.items()
        for images, m in by_images.items()
    ]
    return "\n".join(rows) + "\n\n" + requirements_table("sampling", ".2f")


def cost_training_table() -> str:
    """Seconds a step and peak memory of both recipes."""
    measured = figures("training", "cost")
    options = measured["options"]
    note = (
        f"Batch {options['batch-size']}, {options['resolution']} pixels, {measured['arithmetic']}, "
        f"{options['steps']} steps each after one to warm up."
    )
    rows = ["| recipe | trained | a step, s | peak memory, GiB | after imports, GiB | load |", "|---" * 6 + "|"]
    rows += [
        f"| {recipe} | {m['trained_parameters'] / 1e6:.1f} M | {with_quartiles(m['step_seconds'])} | "
        f"{m['peak_bytes'] / 2**30:.1f} | {m['resident_after_imports_bytes'] / 2**30:.1f} | "
        f"{m['load_average_before']:.1f} |"
        for recipe, m in measured["recipes"].items()
    ]
    return note + "\n\n" + "\n".join(rows) + "\n\n" + requirements_table("training", ".2f")


def cost_backends_table() -> str:
    """Parameters, a step, memory, and drawing relative to plain, of each backend."""
    measured = figures("backends", "cost")
    counts = list(measured["drawing"])
    head = ["", "trained", "a step, s", "memory of training, MiB"]
    head += [f"drawing {'one image' if images == '1' else f'{images} images'}" for images in counts]
    rows = ["| " + " | ".join([*head, "CPU time alone"]) + " |", "|---" * (len(head) + 1) + "|"]
    for way in next(iter(measured["drawing"].values())):
        if way in ("plain_seconds", "repeats", "load_average"):
            continue
        cells = ["", "", ""]
        if m := measured["training"].get(way):
            cells = [
                f"{m['trained_parameters']:,}",
                with_quartiles(m["step_seconds"]),
                f"{m['peak_bytes'] / 2**20:.0f}",
            ]
        ratios = [measured["drawing"][images][way] for images in counts]
        cells += [with_quartiles(ratio["ratio"]) for ratio in ratios]
        cells.append(" / ".join(f"{ratio['cpu_ratio']['median']:.2f}" for ratio in ratios))
        rows.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n\n" + requirements_table("backends", ".2f")


def requirements_table(part: str, shape: str) -> str:
    """One row per requirement of benchmarks/cost.py: the limit, the figure, whether it is met."""
    rows = ["| requirement | limit | measured | |", "|---|---|---|---|"]
    for name, row in figures(part, "cost")["requirements"].items():
        limit = f"at least {row['at_least']:{shape}}" if "at_least" in row else f"at most {row['at_most']:{shape}}"
        if row["measured"] is None:
            rows.append(f"| {name} | {limit} | | {row['reason']} |")
        else:
            rows.append(f"| {name} | {limit} | {row['measured']:{shape}} | {'met' if row['met'] else '**missed**'} |")
    return "\n".join(rows)


def theory_table(part: str) -> str:
    """One of the tables of benchmarks/theory.py: a row for each entry, a column for each figure of it."""
    measured = figures("mixtures", "theory")
    if part == "penalties":
        head = ["groups", *(f"{loss}, {of}" for loss in measured[part]["equal"] for of in ("biased", "balanced"))]
        entries = {
            name: [value for pair in losses.values() for value in pair] for name, losses in measured[part].items()
        }
    elif part == "scores":
        head = ["W", *next(iter(measured[part].values()))]
        entries = {name: list(row.values()) for name, row in measured[part].items()}
    elif part == "cfg":
        head = ["null row", "by", *(f"CFG {scale:g}" for scale in measured["scales"])]
        entries = {f"{null} | {by}": row for null, rows in measured[part].items() for by, row in rows.items()}
    else:
        head = ["share of the common group", *(f"Delta {delta:g}" for delta in measured[part]["deltas"])]
        entries = {by: measured[part][by] for by in ("formula", "drawn")}
    digits = 4 if part == "penalties" else 3
    rows = [f"| {name} | {' | '.join(f'{value:.{digits}f}' for value in row)} |" for name, row in entries.items()]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


def with_quartiles(values: dict[str, float]) -> str:
    """Return a median with its quartiles."""
    return f"{values['median']:.2f} ({values['lower_quartile']:.2f} to {values['upper_quartile']:.2f})"


def methods_table(benchmark: str) -> str:
    """The table of a benchmark of methods, as `python -m benchmarks table` prints it."""
    return str(importlib.import_module("tables").markdown(benchmark, RESULTS))


def headline_table() -> str:
    """A few methods on photographs of birds, in short."""
    return str(importlib.import_module("tables").headline("waterbirds", RESULTS, HEADLINE))


def preservation_table() -> str:
    """How far images of captions that nobody audited move, with and without preservation."""
    cells = {
        path.stem.rpartition("-seed-")[0]: json.loads(path.read_text(encoding="utf-8"))["figures"]
        for path in sorted((RESULTS / "preservation").glob("*.json"), reverse=True)
    }
    shifts = {name: of["unrelated prompts, CFG 3"] for name, of in cells.items()}
    prompts = {key: key.partition(", ")[2].strip("'") or "mean" for key in next(iter(shifts.values()))}
    rows = [f"| {name} | {' | '.join(f'{of[key]:.3f}' for of in shifts.values())} |" for key, name in prompts.items()]
    return "\n".join([f"| | {' | '.join(shifts)} |", "|---" * (len(shifts) + 1) + "|", *rows])


SUITES = (
    "waterbirds",
    "tuning",
    "fairface-age",
    "fairface-race",
    "fairface-gender",
    "studies",
    "birds",
    "birds-studies",
)
HEADLINE = (
    "biased",
    "ceiling",
    "ours",
    "ours-true",
    "fair-diffusion",
    "tiw",
    "invdiff-released",
    "invdiff-paper-100848",
)
BLOCKS = {
    **{name: partial(methods_table, name) for name in SUITES},
    "waterbirds-headline": headline_table,
    "preservation": preservation_table,
    "audits": audits_table,
    "explicit": explicit_table,
    "paraphrases": lambda: models_table("paraphrases"),
    "augmentation": augmentation_table,
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
