"""Write the measured figures of benchmarks/results/ into README.md and the pages of docs/.

python scripts/update_figures.py          # rewrite what stands between the markers
python scripts/update_figures.py --check  # exit 1 if anything would change
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def figures(part: str, benchmark: str = "birds") -> Any:
    """Return the figures of one part of benchmarks/birds.py, or of another benchmark."""
    return json.loads((RESULTS / f"{benchmark}-{part}.json").read_text(encoding="utf-8"))["figures"]


def bias_table() -> str:
    """One row per model, one column per guidance scale: Bias with its interval."""
    measured = figures("bias")
    scales = list(measured["base"])
    floor = measured["base"][scales[0]]["bias_floor"]
    count = measured["base"][scales[0]]["images_per_prompt"]
    head = "| | " + " | ".join(f"CFG {float(scale):g}" for scale in scales) + " | bird right | Fréchet |"
    rows = [head, "|---" * (len(scales) + 3) + "|"]
    for model in ("base", "balanced", "invariant"):
        cells = [f"{m['bias']:.2f} ({m['bias_ci'][0]:.2f} to {m['bias_ci'][1]:.2f})" for m in measured[model].values()]
        accuracy = " / ".join(f"{m['accuracy']:.3f}" for m in measured[model].values())
        frechet = " / ".join(f"{m['frechet']:.2f}" for m in measured[model].values())
        rows.append(f"| {model} | " + " | ".join(cells) + f" | {accuracy} | {frechet} |")
    note = (
        f"Bias of the background at each guidance scale (CFG), with 95% intervals: 0 is balanced, 1 is always the "
        f"same. {count} images per prompt, environments drawn independently; a perfectly fair sampler would show "
        f"{floor:.3f}. Fréchet distance to a balanced set, on the annotator's features."
    )
    return note + "\n\n" + "\n".join(rows)


def groups_table() -> str:
    """Recovery of the hidden minority on each seed of data."""
    rows = ["| data seed | AUROC | precision | recall | forwards per image |", "|---|---|---|---|---|"]
    rows += [
        f"| {seed} | {m['auroc']:.3f} | {m['precision']:.3f} | {m['recall']:.3f} | {m['forwards_per_image']:.2f} |"
        for seed, m in figures("groups").items()
    ]
    return "\n".join(rows)


def one_prompt_table() -> str:
    """Adjusted Rand index under a single caption."""
    rows = ["| data seed | adjusted Rand index | AUROC |", "|---|---|---|"]
    rows += [f"| {seed} | {m['adjusted_rand']:.3f} | {m['auroc']:.3f} |" for seed, m in figures("one-prompt").items()]
    return "\n".join(rows)


def no_bias_line() -> str:
    """How often an unbiased world is called so."""
    measured = figures("no-bias")
    return f"Called unbiased: {measured['said_no_bias']} of {len(measured['seeds'])} seeds of data."


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


def with_quartiles(values: dict[str, float]) -> str:
    """Return a median with its quartiles."""
    return f"{values['median']:.2f} ({values['lower_quartile']:.2f} to {values['upper_quartile']:.2f})"


BLOCKS = {
    "bias": bias_table,
    "groups": groups_table,
    "one-prompt": one_prompt_table,
    "no-bias": no_bias_line,
    "explicit": explicit_table,
    "paraphrases": lambda: models_table("paraphrases"),
    "strength": lambda: models_table("strength"),
    "families-dit-flow": families_table,
    "cost-count": cost_count_table,
    "cost-sampling": cost_sampling_table,
    "cost-training": cost_training_table,
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
