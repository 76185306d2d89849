"""Kill runs, fill disks and damage inputs: each must end in the right result or in one clear line.

    python scripts/abuse.py                  # all three campaigns, about an hour on two cores
    python scripts/abuse.py damage --count 20 --seed 7
    python scripts/abuse.py kill --only 13   # one trial again, by its number

`kill` ends audit, train, generate or evaluate (one process, or two that work together) by SIGKILL at a random moment,
runs the same command again and compares every file with those of an undisturbed run. `disk` does the same on a disk
that is full at a random size and grows before the second run (a tmpfs, in a mount namespace of its own: Linux only).
`damage` flips bits in an input, cuts it short or blanks a part. All on a tiny model with random weights.

Outcomes: "right" (the undisturbed result), "error" (one line that starts with "error:"), "other data" (the damage
left a readable file of other contents, in a format without checksums, and the run is sound), and "WRONG": a
traceback, a hang, lost work, images missing without a word, or other bytes than those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "400"}

PROMPTS = ["a photo of a landbird", "a photo of a waterbird"]
CACHE = ["--cache-dir", "cache"]
STEPS = {
    "audit": ["audit", "model", "photos", "--output", "audit", "--min-images", "4", "--solver", "exact", "-q", *CACHE],
    "train": ["train", "model", "photos", "audit", "--output", "module", "--config", "often.yaml", "-q", *CACHE],
    "generate": ["generate", "model", *PROMPTS, "--module", "module", "--output", "guided", "--config", "few.yaml",
                 "-q"],
    "evaluate": ["evaluate", "base=base", "guided=guided", "--annotator", "annotator", "--attribute", "background",
                 "--reference", "photos", "--output", "results.json", "-q"],
}  # fmt: skip
MADE = {"audit": ["audit"], "train": ["module"], "generate": ["guided"], "evaluate": ["results.json", "results.csv"]}
PATIENCE = 120
"""Seconds after which a run counts as hanging."""


@dataclass
class Ended:
    """How a run ended: its exit status (-9 where it was killed, None where it hung) and all it printed."""

    code: int | None
    said: str
    seconds: float

    def fault(self) -> str:
        """Why this end is none that a user should meet; empty where it is right or one clear line."""
        if self.code is None:
            return "hangs"
        if "Traceback" in self.said:
            return "traceback: " + self.said.strip().splitlines()[-1][:160]
        if self.code != 0 and "error:" not in self.said:
            return f"exit {self.code} without an error: {self.said.strip()[-160:]!r}"
        return ""


def start(arguments: list[str], log: Path, **environment: str) -> int:
    """Fork a process that runs `invdiff ARGUMENTS` in this folder; all libraries are imported already."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= environment
        sys.argv = ["invdiff", *arguments]
        from invdiff.cli import main

        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # this process must end here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str], *, processes: int = 1, kill_after: float | None = None) -> Ended:
    """Run a command as one process or as several that find each other, and kill them all after some seconds."""
    began, folder = time.monotonic(), Path(tempfile.mkdtemp())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    alive = {}
    for rank in range(processes):
        together = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        alive[start(arguments, folder / str(rank), **together)] = rank
    codes: dict[int, int] = {}
    hung = killed = False
    while alive:
        for process in list(alive):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[alive.pop(process)] = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        failed = processes > 1 and any(codes.values())  # as torchrun does: one that fails ends the others
        hung = hung or (bool(alive) and seconds > PATIENCE)
        killed = killed or (kill_after is not None and seconds > kill_after)
        if hung or failed or killed:
            for process in alive:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    said = "".join((folder / str(rank)).read_text(errors="replace") for rank in range(processes))
    shutil.rmtree(folder)
    worst = max(codes.values(), key=lambda code: (code > 0, code < 0, code))
    return Ended(None if hung else worst, said, time.monotonic() - began)


def succeed(arguments: list[str], *, processes: int = 1) -> Ended:
    """Run a command that must succeed."""
    ended = run(arguments, processes=processes)
    assert ended.code == 0, ended.said
    return ended


def contents(folder: Path, names: list[str]) -> dict[str, bytes]:
    """The bytes of every file of the named files and folders, temporary files included."""
    files = [file for name in names for file in (folder / name, *(folder / name).rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Names of files that are absent in one of two results, or have other bytes there."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def build(work: Path) -> None:
    """Make a tiny model, data and annotator, and run every step undisturbed: before each, a copy in `before-STEP`."""
    import datasets
    from PIL import Image

    from conftest import write_tiny_folder
    from tiny import make_tiny

    scene = work / "scene"
    scene.mkdir(parents=True)
    make_tiny("sd1").save_pretrained(scene / "model")
    write_tiny_folder(scene / "photos", 48)
    for name in ("07", "11"):  # a format without checksums beside PNG
        Image.open(scene / f"photos/{name}.png").convert("RGB").save(scene / f"photos/{name}.jpg", quality=95)
        (scene / f"photos/{name}.png").unlink()
    table = (scene / "photos/metadata.csv").read_text()
    (scene / "photos/metadata.csv").write_text(table.replace("07.png", "07.jpg").replace("11.png", "11.jpg"))
    (scene / "often.yaml").write_text("steps: 30\nbatch_size: 8\ncheckpoint_every: 2\nmixed_precision: 'no'\n")
    (scene / "few.yaml").write_text("images_per_prompt: 6\nnum_inference_steps: 3\nbatch_size: 2\n")
    with contextlib.chdir(scene):
        annotator = ["annotator", "train", "photos", "--output", "annotator", "--attribute", "background"]
        plain = ["generate", "model", *PROMPTS, "--output", "base", "--config", "few.yaml"]
        for arguments in ([*annotator, "--steps", "4"], plain):
            succeed(arguments)
        rows = [json.loads(line) for line in (scene / "base/manifest.jsonl").read_text().splitlines()]
        (scene / "drawn").mkdir()
        for row in rows:
            name = row["file_name"].replace("/", "-")
            shutil.copy(scene / "base" / row["file_name"], scene / "drawn" / name)
            row |= {"file_name": name, "sex": "fm"[row["seed"] % 2]}
        (scene / "drawn/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        images = [{"bytes": (scene / f"photos/{n:02d}.png").read_bytes(), "path": None} for n in (0, 1, 2, 3) * 6]
        datasets.Dataset.from_dict({"image": images, "text": PROMPTS * 12}).to_parquet(scene / "table.parquet")
        for step, arguments in STEPS.items():
            shutil.copytree(scene, work / f"before-{step}")
            succeed(arguments)
        shutil.copytree(scene, work / "after")


@contextlib.contextmanager
def copy(source: Path) -> Iterator[Path]:
    """A copy of a scene as the current folder, which vanishes afterwards."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder, contextlib.chdir(folder):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        yield Path(folder)


UNDISTURBED: dict[tuple[str, int], tuple[dict[str, bytes], float]] = {}


def undisturbed(work: Path, step: str, processes: int) -> tuple[dict[str, bytes], float]:
    """The files that a step makes, and its seconds, measured once."""
    if (step, processes) not in UNDISTURBED:
        with copy(work / f"before-{step}") as folder:
            seconds = succeed(STEPS[step], processes=processes).seconds
            UNDISTURBED[step, processes] = contents(folder, MADE[step]), seconds
    return UNDISTURBED[step, processes]


def kill(work: Path, numbers: random.Random) -> tuple[str, str]:
    """Kill a step at a random moment, run it again, and compare."""
    step, processes = numbers.choice(list(STEPS)), numbers.choice((1, 1, 2))
    if step == "evaluate":
        processes = 1  # has no share to take
    wanted, seconds = undisturbed(work, step, processes)
    moment = numbers.uniform(0, 1.05) * seconds
    what = f"{step}, {processes} process(es), killed after {moment:.2f} s"
    with copy(work / f"before-{step}") as folder:
        run(STEPS[step], processes=processes, kill_after=moment)
        again = run(STEPS[step], processes=processes)
        if again.fault() or again.code != 0:
            return "WRONG", f"{what}: {again.fault() or again.said.strip()[-160:]}"
        wrong = differing(wanted, contents(folder, MADE[step]))
        return ("WRONG", f"{what}: other bytes in {', '.join(wrong)}") if wrong else ("right", what)


def disk(work: Path, numbers: random.Random) -> tuple[str, str]:
    """Run a step on a disk that fills on the way, then again with room, in a mount namespace of its own."""
    step = numbers.choice(list(STEPS))
    source = work / f"before-{step}"
    wanted, _ = undisturbed(work, step, 1)
    used = sum(-(-file.stat().st_size // 4096) + 1 for file in source.rglob("*")) * 4096
    made = sum(-(-len(data) // 4096) for data in wanted.values()) * 4096
    size = int(used + numbers.uniform(0, 1.2) * (made + 65536))
    what = f"{step}, disk full at {size // 1024} KiB"
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            outcome, why = pool.apply(_on_small_disk, (step, source, size, wanted))
        except Exception as error:  # noqa: BLE001  # whatever a child raised is a finding: the campaign goes on
            return "WRONG", f"{what}: the campaign itself failed: {error!r}"
    return outcome, f"{what}{why}"


def _on_small_disk(step: str, source: Path, size: int, wanted: dict[str, bytes]) -> tuple[str, str]:
    libc, ids = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
    new_user, new_mounts, remount = 0x10000000, 0x00020000, 32
    if libc.unshare(new_user | new_mounts):
        raise OSError(ctypes.get_errno(), "cannot make a mount namespace")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {ids[0]} 1"), ("gid_map", f"0 {ids[1]} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    place = tempfile.mkdtemp(dir=source.parent)

    def mount(flags: int, size: int) -> None:
        if libc.mount(b"tmpfs", place.encode(), b"tmpfs", flags, f"size={size}".encode()):
            raise OSError(ctypes.get_errno(), "cannot mount a tmpfs")

    mount(0, 1 << 30)
    shutil.copytree(source, place, dirs_exist_ok=True)
    mount(remount, size)
    os.chdir(place)
    first = run(STEPS[step])
    if first.fault():
        return "WRONG", f": {first.fault()}"
    mount(remount, 1 << 30)
    again = run(STEPS[step])
    if again.code != 0:
        return "WRONG", f": run again with room: {again.fault() or again.said.strip()[-160:]}"
    wrong = differing(wanted, contents(Path(place), MADE[step]))
    shutil.rmtree(place, ignore_errors=True)
    if wrong:
        return "WRONG", f": other bytes in {', '.join(wrong)}"
    return ("right", ", it was enough") if first.code == 0 else ("error", f": {first.said.strip()[-110:]}")


AUDIT = STEPS["audit"]
PARQUET = ["audit", "model", "table.parquet", *AUDIT[3:]]
LABELS = ["evaluate", "drawn", "--annotator", "labels", "--attribute", "sex", "--output", "labels.json", "-q"]
REPORT = ["report", ".", "--output", "report"]
DAMAGED: list[tuple[str, str, list[str], list[str]]] = [
    # where it happens, to which files, what reads them, into what
    ("before-audit", "photos/*.png", AUDIT, ["audit"]),
    ("before-audit", "photos/*.jpg", AUDIT, ["audit"]),
    ("before-audit", "photos/metadata.csv", AUDIT, ["audit"]),
    ("before-audit", "table.parquet", PARQUET, ["audit"]),
    ("before-audit", "model/*/*.safetensors", AUDIT, ["audit"]),
    ("before-audit", "model/*.json", AUDIT, ["audit"]),
    ("before-audit", "model/*/*.json", AUDIT, ["audit"]),
    ("before-train", "cache/*/*/*", STEPS["train"], ["module"]),
    ("before-train", "audit/*.json", STEPS["train"], ["module"]),
    ("before-train", "audit/*.safetensors", STEPS["train"], ["module"]),
    ("before-train", "often.yaml", STEPS["train"], ["module"]),
    ("before-generate", "module/*", STEPS["generate"], ["guided"]),
    *(("before-evaluate", f"guided/{files}", STEPS["generate"], ["guided"]) for files in ("*/*.png", "*.json*")),
    ("before-evaluate", "drawn/metadata.jsonl", LABELS, ["labels.json"]),
    ("before-evaluate", "drawn/*.png", LABELS, ["labels.json"]),
    ("before-evaluate", "annotator/*", STEPS["evaluate"], MADE["evaluate"]),
    ("before-evaluate", "base/*/*.png", STEPS["evaluate"], MADE["evaluate"]),
    ("after", "results.json", REPORT, ["report"]),
    ("after", "audit/*", REPORT, ["report"]),
]
CHECKED = {".png", ".parquet"}
"""Formats with a checksum, or whose damage must not pass for other data."""
PRISTINE: dict[int, dict[str, bytes]] = {}


def spoil(data: bytes, numbers: random.Random) -> tuple[bytes, str]:
    """Some bits flipped, the end cut off, or a part blanked, as a bad disk or a broken download does."""
    how, place = numbers.choice(("flip", "cut", "blank")), numbers.randrange(max(1, len(data)))
    if how == "cut":
        return data[:place], f"cut to {place} of {len(data)} bytes"
    spoilt = bytearray(data)
    if how == "blank":
        spoilt[place : place + 512] = bytes(len(spoilt[place : place + 512]))
        return bytes(spoilt), f"512 bytes blanked at {place}"
    places = [numbers.randrange(len(data) * 8) for _ in range(numbers.choice((1, 4, 16)))] if data else []
    for bit in places:
        spoilt[bit // 8] ^= 1 << bit % 8
    return bytes(spoilt), f"{len(places)} bits flipped"


def damage(work: Path, numbers: random.Random) -> tuple[str, str]:
    """Damage one input and run what reads it."""
    number = numbers.randrange(len(DAMAGED))
    before, pattern, arguments, made = DAMAGED[number]
    if number not in PRISTINE:
        with copy(work / before) as folder:
            succeed(arguments)
            PRISTINE[number] = contents(folder, made)
    with copy(work / before) as folder:
        file = numbers.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
        data, how = spoil(file.read_bytes(), numbers)
        file.write_bytes(data)
        what = f"{arguments[0]}: {file.relative_to(folder)} {how}"
        ended = run(arguments)
        if ended.fault():
            return "WRONG", f"{what}: {ended.fault()}"
        if ended.code != 0:
            return "error", f"{what}: {ended.said.strip().splitlines()[-1][:200]}"
        after = contents(folder, made)
        if not differing(PRISTINE[number], after):
            return "right", what
        if "could not be read" in ended.said:
            return "error", f"{what}: announced"
        loose = b"NaN" in b"".join(after.values()) and not file.name.endswith(".jsonl")
        if file.suffix in CHECKED or loose or after.keys() != PRISTINE[number].keys():
            return "WRONG", f"{what}: exit 0, other result in {', '.join(differing(PRISTINE[number], after))}"
        return "other data", what


CAMPAIGNS: dict[str, tuple[Callable[[Path, random.Random], tuple[str, str]], int]] = {
    "kill": (kill, 50),
    "disk": (disk, 20),
    "damage": (damage, 200),
}


def main() -> None:
    """Run campaigns and print how many trials ended how; exit 1 where any was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", nargs="*", choices=[*CAMPAIGNS, []], help="which; all of them unless given")
    parser.add_argument("--seed", type=int, default=0, help="of all trials; another seed gives others")
    parser.add_argument("--count", type=int, help="trials of each campaign; 50, 20 and 200 unless given")
    parser.add_argument("--only", type=int, help="run the trial of this number only")
    parser.add_argument("--verbose", action="store_true", help="print every trial")
    arguments = parser.parse_args()
    import diffusers  # noqa: F401  # imported once, here; trials are forks of this process
    import torch
    import transformers  # noqa: F401

    import invdiff.report  # noqa: F401

    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="invdiff-abuse-") as folder:
        work = Path(folder)
        os.environ["INVDIFF_CACHE"] = str(work / "home")
        build(work)
        for name in arguments.campaign or CAMPAIGNS:
            attempt, usual = CAMPAIGNS[name]
            ends: Counter[str] = Counter()
            for trial in range(arguments.count or usual) if arguments.only is None else [arguments.only]:
                outcome, what = attempt(work, random.Random(f"{name} {arguments.seed} {trial}"))
                ends[outcome] += 1
                if outcome == "WRONG" or arguments.verbose or arguments.only is not None:
                    print(f"{name} {trial}: {outcome}: {what}", flush=True)
            counts = ", ".join(f"{n} {end}" for end, n in ends.items())
            print(f"{name}: {sum(ends.values())} tried, {counts}", flush=True)
            wrong += ends["WRONG"]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
