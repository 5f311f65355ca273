"""A run that ends, Ctrl-C, a rank that dies and a rank that hangs, under megapar's own launcher: nothing is left running."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megapar import ParallelMesh
from megapar.models.pipelined import PipelinedDecoder
from megapar.training.checkpoint import load_checkpoint, newest_checkpoint
from megapar.training.config import OptimizerConfig
from megapar.training.config_file import load_config
from megapar.training.metrics import read_metrics
from megapar.training.step import zero

CONFIG = """
[model]
hidden_size = 16
layers = 1
heads = 4
ffn_size = 24
[data]
tokenizer = "bytes"
sequence_length = 16
[parallel]
device = "cpu"
tp = 2
timeout = 10.0
[run]
steps = 1_000_000
batch_size = 2
micro_batch_size = 2
save_every = 1_000_000
"""
ROOT = Path(__file__).resolve().parents[2]
ACCIDENTS = {"interrupted": signal.SIGINT, "killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "killed in a pipeline": signal.SIGKILL}
PIPELINE = ("--tp", "1", "--pp", "2", "--model.layers", "2", "--microbatches", "2", "--run.micro-batch-size", "1")


class Job:
    """`megapar train --nproc 2` in a process group of its own."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.out = folder, folder / "out"
        folder.mkdir()
        (folder / "c.txt").write_text(" ".join(random.Random(0).choices(["cat", "mat", "rain"], k=400)))
        (folder / "c.toml").write_text(CONFIG)
        told = [str(folder / "c.toml"), "--nproc", "2", "--corpus", str(folder / "c.txt"), "--out", str(self.out), *overrides]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megapar", "train", *told], stdout=stdout, stderr=stderr, env=environment, start_new_session=True
            )

    def pids(self) -> dict[str, int]:
        """Every living process of the job, by rank; the launcher's is ""."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if str(self.out) in (entry / "cmdline").read_text():
                        words = (entry / "environ").read_text().split("\0")
                        found[next((word[5:] for word in words if word.startswith("RANK=")), "")] = int(entry.name)
                except (FileNotFoundError, ProcessLookupError):  # it has just ended
                    continue
        return found

    def wait_for_training(self) -> None:
        deadline = time.monotonic() + 90
        while len(read_metrics(self.out / "metrics.jsonl")) < 3:
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, f"no step within 90 s: {self.stderr}"
            time.sleep(0.05)

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Iterator[dict[str, Job]]:
    """A job for each accident; all of them start together, and each has its accident as soon as it trains."""
    folder = tmp_path_factory.mktemp("jobs")
    started = {name: Job(folder / name, *(PIPELINE if "pipeline" in name else ())) for name in ACCIDENTS}
    started["finished"] = Job(folder / "finished", *PIPELINE, "--steps", "4", "--run.sample-tokens", "3")
    try:
        for name in ACCIDENTS:
            job = started[name]
            job.wait_for_training()
            if name == "interrupted":
                os.killpg(job.process.pid, signal.SIGINT)
            else:
                os.kill(job.pids()["1"], ACCIDENTS[name])
        yield started
    finally:
        for job in started.values():
            for pid in job.pids().values():
                os.kill(pid, signal.SIGKILL)
            job.process.wait()


def test_a_run_to_its_end(jobs):
    job = jobs["finished"]
    assert job.process.wait(60) == 0
    assert "megapar: " not in job.stderr
    out = (job.folder / "stdout").read_text()
    assert out.count("held-out loss") == 2, "said once while it runs and once at the end, by one rank"
    assert f"model {job.out / 'model'}" in out
    assert {path.name for path in (job.out / "model").glob("*.safetensors")} == {f"rank-0000{rank}-00000.safetensors" for rank in (0, 1)}
    trace = json.loads((job.out / "timeline.json").read_text())["traceEvents"]
    computed = {event["name"] for event in trace if event["ph"] == "X"}
    assert computed == {f"{stage}{kind}{m}" for stage in (0, 1) for kind in "FB" for m in (0, 1)}
    assert (job.out / "timeline.png").stat().st_size > 1000 and "simulated" in out


def test_ctrl_c_stops_all_ranks_and_keeps_what_was_done(jobs):
    job = jobs["interrupted"]
    assert job.process.wait(30) == 130
    assert job.pids() == {}
    assert "Traceback" not in job.stderr
    text = (job.out / "metrics.jsonl").read_text()
    records = read_metrics(job.out / "metrics.jsonl")
    assert text.endswith("}\n")
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert f"stopped at step {len(records)} of 1000000" in (job.folder / "stdout").read_text()
    folder = newest_checkpoint(job.out / "checkpoints")
    assert folder is not None
    mesh = ParallelMesh.alone()
    config = load_config(job.folder / "c.toml").model
    model = PipelinedDecoder(config, 257, mesh, optimize=zero(OptimizerConfig(), mesh))
    assert model.optimizer is not None
    state = load_checkpoint(folder, model.optimizer.boxes(), mesh)
    assert state["step"] == len(records)


@pytest.mark.parametrize("name", ["killed", "killed in a pipeline"])
def test_a_rank_that_dies_is_named_and_ends_the_others(jobs, name):
    job = jobs[name]
    assert job.process.wait(45) == 1
    assert "rank 1 stopped answering" in job.stderr
    assert "rank 1 was killed by SIGKILL" in job.stderr
    assert "Traceback" not in job.stderr
    assert job.pids() == {}


def test_a_rank_that_hangs_is_named_and_ends_the_others(jobs):
    job = jobs["stopped"]
    deadline = time.monotonic() + 45
    while "rank 1 stopped answering" not in job.stderr:
        assert time.monotonic() < deadline, f"not named in 45 s: {job.stderr}"
        time.sleep(0.1)
    # The launcher gives a rank 30 s to end by itself; this one cannot, so it is not waited for here.
    pids = job.pids()
    if "1" in pids:
        os.kill(pids["1"], signal.SIGKILL)
    assert job.process.wait(30) == 1
    assert "Traceback" not in job.stderr
    assert job.pids() == {}
