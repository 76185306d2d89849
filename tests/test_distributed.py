"""Two processes do what one does: the same groups, the same images, losses equal but for the order of sums."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes

import invdiff.distributed
from conftest import PROCESSES, make_tiny_pipeline
from invdiff.auditing import evidence
from invdiff.auditing.result import Audit
from invdiff.data import encode
from invdiff.distributed import is_main, num_processes
from invdiff.errors import ConfigError
from invdiff.training import objective
from invdiff.training import train as train_module
from test_cli import run
from tiny import CAPTIONS

SMALL = {
    (encode, "SHARD_SIZE"): 4,  # so that there is something to share
    (evidence, "SHARD_SIZE"): 4,
    (objective, "LEVELS"): 4,
    (objective, "IMAGES_PER_LEVEL"): 4,
    (train_module, "DIAGNOSTIC_BATCHES"): 2,
}
FINDING = invdiff.AuditConfig(solver="exact", min_images=4, min_share=0.1, batch_size=4)


def one_of_two(rank: int, port: str, folder: Path, out: Path) -> None:
    """The job as a process that a launcher started does it."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= PROCESSES | own
    whole_job(folder, out)


def whole_job(folder: Path, out: Path) -> None:
    """Audit, train and generate."""
    for (module, name), value in SMALL.items():
        setattr(module, name, value)
    pipe, data = make_tiny_pipeline(), invdiff.load_captioned_images(folder)
    options = {"cache_dir": out / "cache", "progress": False}
    found = invdiff.audit(pipe, data, config=FINDING, **options)
    if is_main():
        found.save(out / "audit")
        (out / "processes").write_text(str(num_processes()))
    training = invdiff.TrainConfig(steps=12, batch_size=8, preserve=0, mixed_precision="no", checkpoint_every=10)
    module = invdiff.train(pipe, data, found, out / "module", config=training, **options)
    drawing = invdiff.GenerateConfig(images_per_prompt=3, num_inference_steps=2, batch_size=2)
    invdiff.generate(pipe, list(CAPTIONS), out / "guided", module=module, config=drawing, progress=False)
    invdiff.generate(pipe, list(CAPTIONS), out / "base", config=drawing, progress=False)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def jobs(tiny_folder, tmp_path_factory):
    """The folders of the same job done by this process and by two that find each other on this machine."""
    folders = [tmp_path_factory.mktemp(f"processes-{count}") for count in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in SMALL:
            patch.setattr(module, name, getattr(module, name))  # put back after the job
        whole_job(tiny_folder, folders[0])
    multiprocessing.set_forkserver_preload([__name__])  # imported once for both
    arguments = free_port(), tiny_folder, folders[1]
    running = start_processes(one_of_two, arguments, nprocs=2, join=False, start_method="forkserver")
    assert any(running.join(timeout=120) for _ in range(2))  # False for the first of the two that ends
    assert [(folder / "processes").read_text() for folder in folders] == ["1", "2"]
    return folders


def test_two_processes_find_the_same_groups(jobs):
    for name in ("audit.safetensors", "audit.json"):
        one, two = ((folder / "audit" / name).read_bytes() for folder in jobs)
        assert one == two
    assert Audit.load(jobs[0] / "audit").biased


def test_training_losses_agree(jobs):
    logs = [(folder / "module" / "log.jsonl").read_text().splitlines() for folder in jobs]
    one, two = ([json.loads(line) for line in lines] for lines in logs)
    assert [row["step"] for row in one] == [row["step"] for row in two] == [10, 12]
    for row, other in zip(one, two, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert torch.allclose(*(torch.tensor(each["group_losses"]) for each in (row, other)), rtol=1e-4)


def test_two_processes_draw_the_same_images_of_the_same_groups(jobs):
    one, two = ({p.relative_to(job): p.read_bytes() for p in sorted((job / "base").rglob("*.png"))} for job in jobs)
    assert len(one) == 6
    assert one == two
    for name in ("base", "guided"):
        manifests = [(folder / name / "manifest.jsonl").read_text() for folder in jobs]
        assert manifests[0] == manifests[1]
        assert len(manifests[0].splitlines()) == 6


def test_what_processes_cannot_share_is_refused(jobs, data, tiny_pipe, tmp_path, monkeypatch):
    found = Audit.load(jobs[0] / "audit")
    monkeypatch.setattr("invdiff.training.train.num_processes", lambda: 3)
    with pytest.raises(ConfigError, match="a batch_size that 3 processes can share, got 32"):
        invdiff.train(tiny_pipe, data, found, tmp_path / "m", cache_dir=jobs[0] / "cache", progress=False)
    for name, value in PROCESSES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="Expected one process for finetune, got 2"):
        invdiff.finetune(data, tmp_path, config=invdiff.FinetuneConfig(steps=1), progress=False)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_do_not_come_are_waited_for_and_not_for_long(tiny_pipe_dir, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(invdiff.distributed, "NOTICE", invdiff.distributed.NOTICE / 40)
    monkeypatch.setattr(invdiff.distributed, "JOINING", invdiff.distributed.JOINING / 400)
    monkeypatch.setattr(invdiff.distributed.PartialState, "_shared_state", {})  # no group was joined yet
    left = PROCESSES | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": free_port()}
    done = run("generate", tiny_pipe_dir, "a photo", "--output", tmp_path, "-q", env=left)
    assert done.exit_code == 1
    waiting, error = done.stderr.splitlines()
    assert waiting.startswith(f"waiting for 2 processes, of which this is number {int(rank) + 1}. To run alone: unset")
    assert error.startswith("error: Expected 2 processes to come together at localhost")
    assert "To run alone: unset WORLD_SIZE" in error
