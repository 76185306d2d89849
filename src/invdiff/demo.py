"""The whole story on the bundled model: a hidden bias is found, removed and measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from .assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from .auditing.result import Audit
from .auditing.run import audit
from .config import DemoConfig, EvaluateConfig, GenerateConfig, TrainConfig
from .data.birds import NATURAL_BACKGROUND, BirdsWorld, canonical_prompts
from .data.captioned import CaptionedImages, load_captioned_images
from .evaluation.annotators.conv import ConvAnnotator
from .evaluation.evaluate import evaluate
from .evaluation.results import Results
from .models.load import denoiser_of, load_pipeline
from .report.grids import save_audit_picture
from .report.read import find_parts, rows_by_name
from .report.write import save_report
from .sampling import generate
from .seeds import derived_seed
from .training.train import train


def run_demo(output_dir: str | Path, *, config: DemoConfig | None = None, progress: bool = True) -> Results:
    """Audit, train, generate with and without guidance on the same seeds, evaluate; return the evaluation.

    Everything is written below `output_dir`, last `report.html`; a stopped run goes on where it stopped. The
    attributes of the data are read in the last step only, to judge what was found without them.
    """
    config = config or DemoConfig()
    output_dir = Path(output_dir)
    kept: dict[str, Any] = {"cache_dir": output_dir / "cache", "progress": progress}
    world = BirdsWorld(config.num_images, severity=config.severity, seed=config.seed)
    data = load_captioned_images(world.write(output_dir / "data", progress=progress))
    pipe = load_pipeline(BIRDS_MODEL)
    found = audit(pipe, data, **kept)
    found.save(output_dir / "audit")
    training = TrainConfig(steps=config.steps, seed=config.seed)
    module = train(pipe, data, found, output_dir / "module", config=training, **kept)
    folders: dict[str, list[Path]] = {"base": [], "guided": []}
    drawing: Any = {name: getattr(config, name) for name in ("images_per_prompt", "num_inference_steps", "seed")}
    for guidance_scale in config.guidance_scales:
        settings = GenerateConfig(guidance_scale=guidance_scale, **drawing)
        for name, used in (("base", None), ("guided", module)):
            folder = output_dir / "images" / f"{name}-cfg-{guidance_scale:g}"
            generate(pipe, canonical_prompts(), folder, module=used, config=settings, progress=progress)
            folders[name].append(folder)
    annotator = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)
    seed = derived_seed("reference", config.seed) % 2**31
    balanced = BirdsWorld(config.reference_images, severity=0.5, seed=seed)
    options: Any = {"reference": balanced.captioned(), "config": EvaluateConfig(subject_attribute="subject")}
    measured = evaluate(folders, annotator, "background", **options, progress=progress)
    judged = hidden_truth(found, data) | {"biased": found.biased, "forwards_per_image": found.forwards_per_image}
    parameters = module.num_parameters()
    share = parameters / sum(p.numel() for p in denoiser_of(pipe).parameters())
    of_module = {"parameters": parameters, "share_of_denoiser": share}
    results = replace(measured, run={"audit": judged, "module": of_module, "settings": config.to_dict()})
    save_audit_picture(output_dir / "audit", data)
    results.save(output_dir / "results.json")
    save_report(output_dir, **vars(find_parts(output_dir)))
    return results


def hidden_truth(found: Audit, data: CaptionedImages) -> dict[str, float]:
    """Compare an audit with the background that captions leave unsaid: the only place where labels are read.

    AUROC of scores, and precision and recall of the rare group, for the minority whose background does not agree with
    the bird. An image whose caption states its background is left out: there it is not hidden.
    """
    rows = rows_by_name(found.names, data.names)
    subjects, backgrounds = data.attributes["subject"], data.attributes["background"]
    unsaid = np.array([f" on {backgrounds[row]}" not in data.captions[row] for row in rows])
    minority = np.array([NATURAL_BACKGROUND[subjects[row]] != backgrounds[row] for row in rows])
    truth, rare = minority[unsaid], found.rare()[unsaid]
    return {
        "auroc": float(roc_auc_score(truth, found.scores[0, unsaid])),
        "precision": float(precision_score(truth, rare, zero_division=0)),
        "recall": float(recall_score(truth, rare)),
    }
