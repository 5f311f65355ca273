"""A long run of the demo with a checkpoint every 20 steps: whether memory and open files stay as they are.

    python -m benchmarks.soak --minutes 20

Every two seconds the resident memory and the open files of each rank are read from /proc. After the first quarter, in which buffers and
caches fill, the medians of the second and of the last quarter are compared, per rank. At the end the run is told to stop, by SIGTERM, and
has to leave a checkpoint of its last step.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import tyro

from benchmarks.common import Grid, Verdict, report
from megapar.training.checkpoint import newest_checkpoint
from megapar.training.metrics import read_metrics

Samples = dict[int, list[tuple[int, int]]]
"""By rank: (resident bytes, open files), over time."""


def ranks_of(out: Path) -> dict[int, int]:
    """Rank to process number, of the run that writes to `out`."""
    found = {}
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdecimal() and str(out).encode() in (place / "cmdline").read_bytes():
                words = (place / "environ").read_bytes().split(b"\0")
                found |= {int(word[5:]): int(place.name) for word in words if word.startswith(b"RANK=")}
        except OSError:
            continue  # it has ended meanwhile
    return found


def sample(process: int) -> tuple[int, int]:
    status = (Path("/proc") / str(process) / "status").read_text()
    resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
    return resident, len(list((Path("/proc") / str(process) / "fd").iterdir()))


def soak(config: Path, out: Path, minutes: float, save_every: int) -> tuple[Samples, int]:
    """What was seen, and the exit status after SIGTERM."""
    told = ["--nproc", "auto", "--out", str(out), "--save-every", str(save_every), "--run.keep-last", "3", "--steps", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "-m", "megapar", "train", str(config), *told], env=environment, stdout=subprocess.DEVNULL)
    found: Samples = defaultdict(list)
    try:
        while not read_metrics(out / "metrics.jsonl"):
            if run.poll() is not None:
                raise SystemExit("the run ended before its first step, see above")
            time.sleep(0.5)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end and run.poll() is None:
            for rank, process in ranks_of(out).items():
                found[rank].append(sample(process))
            time.sleep(2.0)
        run.send_signal(signal.SIGTERM)
        return found, run.wait(120)
    finally:
        run.kill()


def main(config: Path = Path("configs/demo.toml"), minutes: float = 20.0, save_every: int = 20) -> None:
    """Runs, compares, writes results/soak.json.

    Args:
        config: of the run.
        minutes: how long.
        save_every: steps between two checkpoints.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        found, status = soak(config, out, minutes, save_every)
        records = read_metrics(out / "metrics.jsonl")
        steps = [record["step"] for record in records if "loss" in record]
        saves = [record["checkpoint"] for record in records if "checkpoint" in record]
        newest = newest_checkpoint(out / "checkpoints")
    rows, verdicts = [], []
    for rank, seen in sorted(found.items()):
        quarter = len(seen) // 4
        parts = seen[quarter : 2 * quarter], seen[3 * quarter :]
        (memory, later), (files, files_later) = ([statistics.median(s[kind] for s in part) for part in parts] for kind in (0, 1))
        rows.append([str(rank), f"{memory / 1e6:.1f}", f"{later / 1e6:.1f}", f"{files:.0f}", f"{files_later:.0f}"])
        verdicts.append(Verdict(f"rank {rank}: memory, last quarter / second", later / memory, at_most=1.02))
        verdicts.append(Verdict(f"rank {rank}: open files, last quarter - second", files_later - files, at_most=0.0))
    failed = [save for save in saves if save["error"]]
    verdicts.append(Verdict("saves that failed", len(failed), at_most=0.0))
    last = newest is not None and newest.name == f"step-{steps[-1]:08d}"
    verdicts.append(Verdict("the last step is in a checkpoint after SIGTERM", float(last), at_least=1.0))
    stall = statistics.median(save["stall"] for save in saves)
    title = f"{minutes:g} minutes, {steps[-1]} steps, {len(saves)} checkpoints, median stall {1e3 * stall:.0f} ms, exit status {status}"
    columns = ["rank", "MB, second quarter", "MB, last quarter", "open files, second quarter", "last quarter"]
    report("soak", [Grid(title, columns, rows)], verdicts, {}, {str(rank): seen for rank, seen in found.items()})


if __name__ == "__main__":
    tyro.cli(main)
