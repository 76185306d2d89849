"""Two processes do what one does: the same groups, the same images, losses equal but for the order of sums."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import make_tiny_pipeline
from invdiff import distributed
from invdiff.auditing.result import Audit
from invdiff.auditing.run import audit
from invdiff.config import AuditConfig, FinetuneConfig, TrainConfig
from invdiff.data.captioned import load_captioned_images
from invdiff.errors import ConfigError
from invdiff.training.finetune import finetune
from invdiff.training.train import train

JOB = Path(__file__).with_name("whole_job.py")


def start(family, data, out, processes):
    """Run the whole job in so many processes that find each other on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    launcher = [*torchrun, "--master-port", str(port)] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(JOB), family, str(data), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def jobs(tiny_folder, tmp_path_factory):
    """The folders of the same job done by one process and by two."""
    folders = [tmp_path_factory.mktemp(f"processes-{count}") for count in (1, 2)]
    for count, folder in zip((1, 2), folders, strict=True):
        job = start("sd1", tiny_folder, folder, count)
        printed, _ = job.communicate(timeout=240)
        assert job.returncode == 0, printed
    assert [(folder / "processes").read_text() for folder in folders] == ["1", "2"]
    return folders


def test_two_processes_find_the_same_groups(jobs):
    one, two = (Audit.load(folder / "audit") for folder in jobs)
    assert one.fingerprint == two.fingerprint
    assert (one.scores == two.scores).all()
    assert one.prompts == two.prompts


def test_training_losses_agree(jobs):
    one, two = (
        [json.loads(line) for line in (folder / "module" / "log.jsonl").read_text().splitlines()] for folder in jobs
    )
    assert [row["step"] for row in one] == [row["step"] for row in two] == [10, 20]
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        for row, other in zip(first["group_losses"], second["group_losses"], strict=True):
            assert other == pytest.approx(row, rel=1e-4)


def test_two_processes_draw_the_same_images_of_the_same_groups(jobs):
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in sorted((folder / "base").rglob("*.png"))}
        for folder in jobs
    )
    assert len(one) == 6
    assert one == two
    for name in ("base", "guided"):
        manifests = [(folder / name / "manifest.jsonl").read_text() for folder in jobs]
        assert manifests[0] == manifests[1]
        assert len(manifests[0].splitlines()) == 6


def test_a_batch_that_cannot_be_shared_is_refused(tiny_folder, tmp_path, monkeypatch):
    pipe, data = make_tiny_pipeline(), load_captioned_images(tiny_folder)
    config = AuditConfig(solver="exact", min_images=4, min_share=0.1)
    found = audit(pipe, data, config=config, cache_dir=tmp_path, progress=False)
    monkeypatch.setattr("invdiff.training.train.num_processes", lambda: 3)
    with pytest.raises(ConfigError, match="a batch_size that 3 processes can share, got 64"):
        train(pipe, data, found, tmp_path / "m", config=TrainConfig(), cache_dir=tmp_path, progress=False)


def test_fine_tuning_is_for_one_process(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    with pytest.raises(ConfigError, match="Expected one process for finetune, got 2"):
        finetune(load_captioned_images(tiny_folder), tmp_path, config=FinetuneConfig(steps=1), progress=False)
