"""Labels are for evaluation: permuting or deleting every attribute column changes no byte of audit or module."""

from conftest import contents, write_tiny_folder
from invdiff import AuditConfig, TrainConfig, audit, load_captioned_images, train


def audit_and_module(pipe, folder, table, output):
    (folder / "metadata.csv").write_text("\n".join(map(",".join, table)))
    data, options = load_captioned_images(folder), {"cache_dir": output / "cache", "progress": False}
    found = audit(pipe, data, config=AuditConfig(solver="exact", min_images=4, min_share=0.1), **options)
    found.save(output / "audit")
    train(pipe, data, found, output / "module", config=TrainConfig(steps=2, batch_size=4, preserve=0), **options)
    return {name: data for name, data in contents(output).items() if not name.startswith("cache")}


def test_attributes_change_no_byte(tiny_pipe, tmp_path):
    folder = write_tiny_folder(tmp_path / "data")
    whole = [line.split(",") for line in (folder / "metadata.csv").read_text().splitlines()]
    moved = [whole[1:][at][2:] for at in (5, 0, 7, 2, 11, 4, 1, 9, 6, 10, 3, 8)]
    permuted = [whole[0], *([*row[:2], *of] for row, of in zip(whole[1:], moved, strict=True))]
    tables = {"whole": whole, "permuted": permuted, "none": [row[:2] for row in whole]}
    before, *others = (audit_and_module(tiny_pipe, folder, of, tmp_path / name) for name, of in tables.items())
    assert permuted != whole
    assert {"audit/audit.json", "module/diffusion_pytorch_model.safetensors"} <= before.keys()
    assert others == [before, before]
