"""Labels are for evaluation: permuting or deleting every attribute column changes no byte of audit or module."""

import csv
import random

from conftest import write_tiny_folder
from invdiff.auditing.run import audit
from invdiff.config import AuditConfig, TrainConfig
from invdiff.data.captioned import load_captioned_images
from invdiff.training.train import train

AUDIT = AuditConfig(solver="exact", min_images=4, min_share=0.1)


def audit_and_module(pipe, folder, rows, output) -> dict[str, bytes]:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    data, options = load_captioned_images(folder), {"cache_dir": output / "cache", "progress": False}
    found = audit(pipe, data, config=AUDIT, **options)
    found.save(output / "audit")
    train(pipe, data, found, output / "module", config=TrainConfig(steps=2, batch_size=4), **options)
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and "cache" not in path.parts]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def test_attributes_change_no_byte(tiny_pipe, tmp_path):
    folder = write_tiny_folder(tmp_path / "data")
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    backgrounds = [row["background"] for row in rows]
    random.Random(0).shuffle(backgrounds)
    permuted = [{**row, "background": value} for row, value in zip(rows, backgrounds, strict=True)]
    assert permuted != rows
    deleted = [{"file_name": row["file_name"], "text": row["text"]} for row in rows]
    before, *others = (
        audit_and_module(tiny_pipe, folder, table, tmp_path / str(number))
        for number, table in enumerate((rows, permuted, deleted))
    )
    assert {"audit/audit.json", "module/diffusion_pytorch_model.safetensors"} <= before.keys()
    assert others == [before, before]
