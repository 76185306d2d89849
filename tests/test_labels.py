"""Labels are for evaluation: permuting or deleting every attribute column changes no byte of audit or module."""

import csv
import random

import pytest

from conftest import write_tiny_folder
from invdiff.auditing.run import audit
from invdiff.config import AuditConfig, TrainConfig
from invdiff.data.captioned import load_captioned_images
from invdiff.training.train import train


def permute(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    values = [row["background"] for row in rows]
    random.Random(0).shuffle(values)
    return [{**row, "background": value} for row, value in zip(rows, values, strict=True)]


def delete(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"file_name": row["file_name"], "text": row["text"]} for row in rows]


def audit_and_module(pipe, folder, output) -> dict[str, bytes]:
    data = load_captioned_images(folder)
    config = AuditConfig(solver="exact", min_images=4, min_share=0.1)
    found = audit(pipe, data, config=config, cache_dir=output / "cache", progress=False)
    found.save(output / "audit")
    train(
        pipe,
        data,
        found,
        output / "module",
        config=TrainConfig(steps=2, batch_size=4),
        cache_dir=output / "cache",
        progress=False,
    )
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and "cache" not in path.parts]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.mark.parametrize("change", [permute, delete])
def test_attributes_change_no_byte(tiny_pipe, tmp_path, change):
    folder = write_tiny_folder(tmp_path / "data")
    before = audit_and_module(tiny_pipe, folder, tmp_path / "before")
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    changed = change(rows)
    assert changed != rows
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(changed[0]))
        writer.writeheader()
        writer.writerows(changed)
    after = audit_and_module(tiny_pipe, folder, tmp_path / "after")
    assert {"audit/audit.json", "module/diffusion_pytorch_model.safetensors"} <= before.keys()
    assert after == before
