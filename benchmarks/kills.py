"""A run whose ranks are killed at random moments, under torchrun with restarts: it ends with the weights of the run that nobody killed.

    python -m benchmarks.kills --kills 100

After each kill the newest checkpoint that the run announced, or a newer one, has to be there and whole, file by file. What it costs: the
steps that were trained more than once, and the starts.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro

from benchmarks.common import Grid, Verdict, report
from benchmarks.soak import ranks_of
from megapar.training.checkpoint import checkpoints, read_manifest

CONFIG = """
[model]
hidden_size = 32
layers = 2
heads = 4
ffn_size = 64
[data]
tokenizer = "bytes"
sequence_length = 32
[parallel]
device = "cpu"
dp = 2
timeout = 20.0
[precision]
kind = "bf16"
[run]
batch_size = 8
micro_batch_size = 2
save_every = 20
keep_last = 3
sample_tokens = 0
resume = "auto"
"""
ANNOUNCED = re.compile(r"checkpoint of step (\d+) is on disk")
RANKS = 2


@dataclass
class Run:
    """torchrun with a run below it, in a process group of its own."""

    folder: Path
    steps: int
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        words = random.Random(0).choices(["cat", "mat", "rain", "spain", "on", "the"], k=4000)
        (self.folder / "c.txt").write_text(" ".join(words))
        (self.folder / "c.toml").write_text(CONFIG)
        told = ["--corpus", str(self.folder / "c.txt"), "--out", str(self.folder / "out"), "--steps", str(self.steps)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "1000000"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.folder)}
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *torchrun, "-m", "megapar", "train", str(self.folder / "c.toml"), *told],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoints(self.folder / "out" / "checkpoints")

    def announced(self) -> int:
        """The newest step that the run said is on disk; -1 before the first."""
        return max((int(step) for step in ANNOUNCED.findall((self.folder / "log").read_text(errors="replace"))), default=-1)

    def trained(self) -> int:
        """Grows with every step."""
        metrics = self.folder / "out" / "metrics.jsonl"
        return metrics.stat().st_size if metrics.exists() else 0

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that are alive."""
        return list(ranks_of(self.folder / "out").values())

    def weights(self) -> str:
        """A hash of every file of the last checkpoint but its manifest, which tells times."""
        digest = hashlib.sha256()
        for path in sorted(self.checkpoints[-1].glob("*.safetensors")):
            digest.update(path.name.encode() + path.read_bytes())
        return f"{self.checkpoints[-1].name} {digest.hexdigest()}"

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def whole(folder: Path) -> bool:
    """Whether every file that the manifest names is there as it was written."""
    for name, told in read_manifest(folder)["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != told["sha256"]:
            return False
    return True


def kill_at_random(run: Run, kills: int, draw: random.Random, longest: float) -> tuple[int, list[str]]:
    """(kills, what was wrong after one): a rank is killed up to `longest` seconds after all of them have started, every second time up to
    a quarter of that after they have trained a step."""
    done, wrong = 0, []
    while done < kills and run.process.poll() is None:
        while len(run.ranks()) < RANKS and run.process.poll() is None:
            time.sleep(0.02)
        trained = run.trained()
        while done % 2 and run.trained() == trained and len(run.ranks()) == RANKS:
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, longest / 4 if done % 2 else longest))
        alive = run.ranks()
        if not alive:
            continue
        announced = run.announced()
        os.kill(draw.choice(alive), signal.SIGKILL)
        done += 1
        while set(alive) & set(run.ranks()):
            time.sleep(0.02)  # the others end too, before anything is started again
        found = run.checkpoints
        newest = int(found[-1].name.removeprefix("step-")) if found else -1
        if newest < announced:
            wrong.append(f"kill {done}: step {announced} was announced and the newest checkpoint is of step {newest}")
        if found and not whole(found[-1]):
            wrong.append(f"kill {done}: {found[-1].name} is not whole")
    return done, wrong


@dataclass
class Found:
    """seconds: of the killed run, and of the undisturbed one. wrong: sentences. alike: whether the weights are, to the last bit."""

    kills: int
    resumed: int
    seconds: float
    undisturbed: float
    wrong: list[str]
    alike: bool


def measure(kills: int, steps: int, seed: int, longest: float) -> Found:
    """Both runs, and what is compared of them."""
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Run(Path(folder) / "undisturbed", steps)
        begin = time.perf_counter()
        status = undisturbed.process.wait()
        seconds = time.perf_counter() - begin
        if status:
            raise SystemExit((undisturbed.folder / "log").read_text())
        run = Run(Path(folder) / "killed", steps)
        begin = time.perf_counter()
        try:
            done, wrong = kill_at_random(run, kills, random.Random(seed), longest)
            if run.process.wait():
                raise SystemExit((run.folder / "log").read_text()[-4000:])
        finally:
            run.stop()
        taken = time.perf_counter() - begin
        log = (run.folder / "log").read_text(errors="replace")
        resumed = len(re.findall(r"resumed at step (\d+)", log))
        return Found(done, resumed, taken, seconds, wrong, run.weights() == undisturbed.weights())


def main(kills: int = 100, steps: int = 4000, seed: int = 0, longest: float = 8.0) -> None:
    """Kills ranks of a run, compares, writes results/kills.json.

    Args:
        kills: how many.
        steps: of the run; it has to be long enough for them.
        seed: of the moments and ranks.
        longest: seconds from a start to the kill, at most.
    """
    found = measure(kills, steps, seed, longest)
    for line in found.wrong:
        print(line)
    row = [str(steps), str(found.kills), str(found.resumed), f"{found.seconds:.0f}", f"{found.undisturbed:.0f}"]
    columns = ["steps", "kills", "resumed from a checkpoint", "seconds", "seconds, undisturbed"]
    verdicts = [
        Verdict("kills", found.kills, at_least=kills),
        Verdict("announced checkpoints that were not there, or not whole", len(found.wrong), at_most=0.0),
        Verdict("the last checkpoint has the undisturbed run's bytes", float(found.alike), at_least=1.0),
    ]
    report("kills", [Grid("A run whose ranks are killed", columns, [row])], verdicts, {}, asdict(found))


if __name__ == "__main__":
    tyro.cli(main)
