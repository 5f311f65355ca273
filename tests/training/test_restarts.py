"""Runs that are ended from outside and started again: by torchrun after a kill, by hand with another number of ranks after SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.kills import measure
from megapar.training.checkpoint import checkpoints, newest_checkpoint
from megapar.training.metrics import read_metrics
from tests.training.test_interrupts import CONFIG, ROOT, Job


def test_a_run_whose_ranks_are_killed_ends_with_the_weights_of_the_one_that_was_not():
    """`python -m benchmarks.kills` does it a hundred times."""
    found = measure(kills=2, steps=120, seed=3, longest=7.0)
    assert found.wrong == []
    assert found.alike


def train(folder: Path, *told: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megapar", "train", str(folder / "c.toml"), *told]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_sigterm_saves_and_another_number_of_ranks_goes_on(tmp_path):
    assert "tp = 2" in CONFIG
    layout = ("--tp", "1", "--dp", "auto", "--run.micro-batch-size", "1", "--resume", "auto", "--run.sample-tokens", "0")
    job = Job(tmp_path / "job", *layout)
    metrics = job.out / "metrics.jsonl"
    while not metrics.exists() or len(read_metrics(metrics)) < 3:
        assert job.process.poll() is None, (job.folder / "stderr").read_text()
        time.sleep(0.05)
    job.process.send_signal(signal.SIGTERM)
    job.process.wait(30)
    saved = newest_checkpoint(job.out / "checkpoints")
    assert saved is not None, (job.folder / "stderr").read_text()
    step = int(saved.name.removeprefix("step-"))
    assert step == max(record["step"] for record in read_metrics(metrics) if "loss" in record)
    told = [*layout, "--corpus", str(job.folder / "c.txt"), "--out", str(job.out), "--nproc", "1"]
    out = train(job.folder, *told, "--steps", str(step + 4), "--change", "run.steps")
    assert f"resumed at step {step}" in out and "parallel.dp was 2 and is 1" in out and "run.steps was 1000000" in out
    records = [record for record in read_metrics(metrics) if "loss" in record]
    assert [(r["step"], r["samples"]) for r in records] == [(n, 2 * n) for n in range(1, step + 5)]
    assert [path.name for path in checkpoints(job.out / "checkpoints")] == [f"step-{n:08d}" for n in (step, step + 4)]
