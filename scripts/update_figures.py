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


def sweep(name: str) -> list[dict[str, Any]]:
    """Return the rows of one of benchmarks/sweeps/."""
    rows: list[dict[str, Any]] = figures(name, "sweep")["rows"]
    return rows


def name_of(row: dict[str, Any]) -> str:
    """Return what tables call the model of a row."""
    return row["mode"] or "base"


def over_seeds(rows: list[dict[str, Any]], figure: str, digits: int = 2) -> str:
    """Return the mean over training seeds of a figure, with the lowest and the highest where there are several."""
    values = [row[figure] for row in rows]
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def grouped(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return rows by the values of some columns, in order of appearance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def frechet_of(row: dict[str, Any]) -> str:
    """Return the name of a row's Fréchet distance."""
    return next(name for name in row if name.startswith("Frechet distance"))


def bias_table() -> str:
    """One row per model, one column per guidance scale: Bias, mean and range over training seeds."""
    rows = sweep("guidance-scale")
    frechet = frechet_of(rows[0])
    scales = sorted({row["guidance_scale"] for row in rows})
    head = "| | " + " | ".join(f"CFG {scale:g}" for scale in scales) + " | bird right | Fréchet, CFG 3 |"
    table = [head, "|---" * (len(scales) + 3) + "|"]
    for (mode,), of_mode in grouped(rows, "mode").items():
        at = {scale: found for (scale,), found in grouped(of_mode, "guidance_scale").items()}
        cells = [over_seeds(at[scale], "bias") for scale in scales]
        worst = min(row["subject_accuracy"] for row in of_mode)
        table.append(f"| {mode or 'base'} | {' | '.join(cells)} | {worst:.3f} | {over_seeds(at[3], frechet)} |")
    seeds = len({row["seed"] for row in rows if row["seed"] is not None})
    note = (
        f"Bias of the background at each guidance scale (CFG): 0 is balanced, 1 is always the same. Mean of {seeds} "
        f"training seeds (lowest to highest), {rows[0]['images_per_prompt']} images per prompt each; a perfectly "
        f"fair model would show {rows[0]['bias_floor']:.3f}. Bird right: the lowest share of images that show the "
        "bird asked for. Fréchet distance to a balanced set, on the annotator's features."
    )
    return note + "\n\n" + "\n".join(table)


def full_table() -> str:
    """One row per model, training seed and guidance scale, with 95% intervals."""
    rows = sweep("guidance-scale")
    features = frechet_of(rows[0]).removeprefix("Frechet distance ")
    names = {
        f"Frechet distance {features}": "Fréchet",
        **{f"{figure} {features}": figure for figure in ("KID", "precision", "recall", "coverage")},
    }
    head = ["model", "seed", "CFG", "Bias (95% interval)", "corrected", "bird right", *names.values()]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: (name_of(row) != "base", name_of(row), row["seed"] or 0)):
        cells = [
            name_of(row),
            "-" if row["seed"] is None else str(row["seed"]),
            f"{row['guidance_scale']:g}",
            f"{row['bias']:.3f} ({row['bias_low']:.3f} to {row['bias_high']:.3f})",
            f"{row['bias_corrected']:.3f} ({row['bias_corrected_low']:.3f} to {row['bias_corrected_high']:.3f})",
            f"{row['subject_accuracy']:.3f}",
            *(f"{row[name]:.2f}" for name in names),
        ]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def flatness_line() -> str:
    """How far Bias of each mode varies over guidance scales."""
    words = []
    for (mode,), rows in grouped([row for row in sweep("guidance-scale") if row["mode"]], "mode").items():
        means = [sum(row["bias"] for row in at) / len(at) for at in grouped(rows, "guidance_scale").values()]
        by_seed = [
            max(row["bias"] for row in of_seed) - min(row["bias"] for row in of_seed)
            for of_seed in grouped(rows, "seed").values()
        ]
        words.append(
            f"{mode}: {max(means) - min(means):.3f} between the means over seeds, "
            f"{', '.join(f'{spread:.3f}' for spread in by_seed)} within each seed"
        )
    return f"Highest less lowest Bias over guidance scales. {'. '.join(words)}."


def scale_table() -> str:
    """Bias and Fréchet distance over Delta."""
    rows = sweep("scale")
    frechet = frechet_of(rows[0])
    table = ["| Delta | model | Bias | bird right | Fréchet |", "|---|---|---|---|---|"]
    for (scale, mode), found in sorted(grouped(rows, "scale", "mode").items(), key=lambda item: item[0][0] or 0):
        cells = (over_seeds(found, "bias"), over_seeds(found, "subject_accuracy", 3), over_seeds(found, frechet))
        table.append(f"| {scale or 0:g} | {mode or 'base'} | {' | '.join(cells)} |")
    return "\n".join(table)


def penalty_table() -> str:
    """Bias and Fréchet distance over lambda."""
    rows = [row for row in sweep("penalty") if row["penalty"] is not None]
    frechet = frechet_of(rows[0])
    table = ["| model | lambda | Bias | bird right | Fréchet |", "|---|---|---|---|---|"]
    for (mode, penalty), found in grouped(rows, "mode", "penalty").items():
        cells = (over_seeds(found, "bias"), over_seeds(found, "subject_accuracy", 3), over_seeds(found, frechet))
        table.append(f"| {mode} | {penalty:g} | {' | '.join(cells)} |")
    return "\n".join(table)


def num_groups_table() -> str:
    """Quality of W, Bias and cost over E, for both solvers that always split."""
    head = "| solver | E | AUROC | adjusted Rand | homogeneity | audit, s | training, s | Bias | bird right |"
    table = [head, "|---" * 9 + "|"]
    for solver, name in (("exact", "num-groups"), ("gradient", "num-groups-gradient")):
        rows = [row for row in sweep(name) if row["num_groups"] is not None]
        for (groups,), found in grouped(rows, "num_groups").items():
            first = found[0]
            cells = [
                *(f"{first[f'group_{figure}']:.3f}" for figure in ("auroc", "adjusted_rand", "homogeneity")),
                f"{first['audit_seconds']:.0f}",
                over_seeds(found, "train_seconds", 0),
                over_seeds(found, "bias"),
                over_seeds(found, "subject_accuracy", 3),
            ]
            table.append(f"| {solver} | {groups} | {' | '.join(cells)} |")
    return "\n".join(table)


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


def methods_table(benchmark: str, *, headline: bool = False) -> str:
    """The table of a benchmark of methods, as `python -m benchmarks table` prints it, or its shorter form."""
    tables = importlib.import_module("tables")
    return str((tables.headline if headline else tables.markdown)(benchmark, RESULTS))


BLOCKS = {
    "waterbirds": partial(methods_table, "waterbirds"),
    "waterbirds-headline": partial(methods_table, "waterbirds", headline=True),
    "tuning": partial(methods_table, "tuning"),
    "bias": bias_table,
    "audits": audits_table,
    "explicit": explicit_table,
    "paraphrases": lambda: models_table("paraphrases"),
    "full-table": full_table,
    "flatness": flatness_line,
    "sweep-scale": scale_table,
    "sweep-penalty": penalty_table,
    "sweep-num-groups": num_groups_table,
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
