"""Fail unless the demo's results hold what the README promises."""

import json
import sys
from pathlib import Path

path = Path(sys.argv[1])
results = json.loads(path.read_text(encoding="utf-8"))
reports = [path.with_name(name) for name in ("report.html", "report.md")]
audit, base, guided = results["run"]["audit"], results["models"]["base"], results["models"]["guided"]
promises = {
    "it ends with a report of these results": all(
        report.is_file() and report.stat().st_mtime >= path.stat().st_mtime for report in reports
    ),
    "the audit finds a bias": audit["biased"],
    "AUROC >= 0.98": audit["auroc"] >= 0.98,
    "precision and recall >= 0.90": min(audit["precision"], audit["recall"]) >= 0.90,
    "at most 8 forwards per image": audit["forwards_per_image"] <= 8,
    "the module is at most 15% of the denoiser": results["run"]["module"]["share_of_denoiser"] <= 0.15,
}
for scale, plain in base.items():
    now, at_least = guided[scale], 0.6 if scale == "1.0" else 0.9
    # At the demo's few images, three times the floor of a perfectly fair sampler.
    fair = 3 * now["bias_floor"]
    promises[f"CFG {scale}: base Bias >= {at_least}"] = plain["bias"] >= at_least
    promises[f"CFG {scale}: guided Bias <= {fair:.2f}"] = now["bias"] <= fair
    promises[f"CFG {scale}: guided accuracy within 0.05 of base"] = now["accuracy"] >= plain["accuracy"] - 0.05
    promises[f"CFG {scale}: guided Frechet distance below base"] = now["frechet"] < plain["frechet"]
for promise, kept in promises.items():
    print("ok    " if kept else "BROKEN", promise)
sys.exit(0 if all(promises.values()) else 1)
