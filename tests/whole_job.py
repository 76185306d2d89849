"""Audit, train and generate on a tiny pipeline; run by `torchrun` as well as alone: `whole_job.py FAMILY DATA OUT`."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from invdiff import AuditConfig, GenerateConfig, TrainConfig, audit, generate, load_captioned_images, train
from invdiff.auditing import evidence as scores_module
from invdiff.data import encode as encode_module
from invdiff.distributed import is_main, num_processes
from invdiff.training import objective
from tiny import CAPTIONS, make_tiny


def run(family: str, data_dir: Path, out: Path) -> None:
    # Small shards, so that there is something to share.
    encode_module.SHARD_SIZE, scores_module.SHARD_SIZE, objective.IMAGES_PER_LEVEL = 4, 4, 4
    pipe, data = make_tiny(family), load_captioned_images(data_dir)
    options = {"cache_dir": out / "cache", "progress": False}
    found = audit(pipe, data, config=AuditConfig(solver="exact", min_images=4, min_share=0.1, batch_size=4), **options)
    if is_main():
        found.save(out / "audit")
        (out / "processes").write_text(str(num_processes()))
    training = TrainConfig(steps=20, batch_size=8, mixed_precision="no", checkpoint_every=10)
    module = train(pipe, data, found, out / "module", config=training, **options)
    drawing = GenerateConfig(images_per_prompt=3, num_inference_steps=2, batch_size=2)
    generate(pipe, list(CAPTIONS), out / "guided", module=module, config=drawing, progress=False)
    generate(pipe, list(CAPTIONS), out / "base", config=drawing, progress=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
