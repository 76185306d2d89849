"""Write the measured figures of benchmarks/results/ into README.md and docs/benchmarks.md.

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


def figures(part: str) -> Any:
    """Return the figures of one part of benchmarks/birds.py."""
    return json.loads((RESULTS / f"birds-{part}.json").read_text(encoding="utf-8"))["figures"]


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


BLOCKS = {
    "bias": bias_table,
    "groups": groups_table,
    "one-prompt": one_prompt_table,
    "no-bias": no_bias_line,
    "explicit": explicit_table,
    "paraphrases": lambda: models_table("paraphrases"),
    "strength": lambda: models_table("strength"),
}


def rendered(text: str) -> str:
    """Return `text` with every marked block made anew."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- figures: {name} -->\n{BLOCKS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- figures: ([a-z-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite or check both files."""
    stale = []
    for path in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
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
