"""Loss against tokens while the batch grows: a ramp-up, beside the batch it starts with and the one it ends with, held all along.

    python -m benchmarks.batch_ramp                    # --samples 2048 to try it out

A Llama-style decoder on the sources of Python's standard library, the same samples in the same order in every run, one process, fp32. The
learning rate follows one schedule in samples: warm-up, then a cosine, times the root of batch size over LARGE. Columns: steps; mean
training loss over each quarter of the tokens, and the held-out loss at the end, nats a token. Bars: a ramp-up takes at most
half of the steps of the small batch, and its held-out loss is at most half as far above the small batch's as the large batch's is. The
picture is results/batch_ramp.png.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import RESULTS, Grid, Verdict, report
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.training.batch_size import BatchSchedule
from megapar.training.config import Config, DataConfig, OptimizerConfig, RunConfig
from megapar.training.loop import train
from megapar.training.metrics import read_metrics

SMALL, LARGE = 8, 64
SEQUENCE = 128
QUARTERS = 4
PEAK = 6e-3
"""Learning rate of the large batch."""


@dataclass(frozen=True)
class Curve:
    """A run. trained: of every step, (samples consumed after it, batch size, mean loss); held_out: (samples, loss)."""

    steps: int
    trained: list[tuple[int, int, float]]
    held_out: list[tuple[int, float]]


def runs(samples: int) -> dict[str, dict[str, Any]]:
    """Each run's batch in [run], and its peak learning rate."""
    small = PEAK * (SMALL / LARGE) ** 0.5
    return {
        f"ramp-up, {SMALL} to {LARGE}": {"batch_size": LARGE, "rampup": f"{SMALL} {SMALL} {samples // 2}", "lr": PEAK},
        f"{SMALL} all along": {"batch_size": SMALL, "lr": small},
        f"{LARGE} all along": {"batch_size": LARGE, "lr": PEAK},
    }


def config_of(options: dict[str, Any], samples: int, out: Path) -> Config:
    """The config of one of `runs`; the rate of a ramp-up is that of its last batch size, and follows it."""
    lr, batch = options["lr"], {name: value for name, value in options.items() if name != "lr"}
    sizes = BatchSchedule.ramp(batch["rampup"], batch["batch_size"]) if "rampup" in batch else BatchSchedule.parse(batch["batch_size"])
    schedule = {"schedule": "cosine", "schedule_unit": "samples", "batch_scaling": "sqrt", "warmup": 0.02}
    length = {"length": f"{samples} samples", "micro_batch_size": SMALL, "eval_every": max(1, sizes.steps(samples) // 8)}
    return Config(
        model=DecoderConfig(hidden_size=128, layers=4, heads=4, ffn_size=352, init_std=0.05),
        data=DataConfig(max_bytes=8_000_000, vocab_size=2048, sequence_length=SEQUENCE, held_out=0.02),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 10, **schedule),
        run=RunConfig(**batch, **length, sample_tokens=0, out=str(out)),
    )


def curve(metrics: Path) -> Curve:
    """What a run's metrics.jsonl tells."""
    records = read_metrics(metrics)
    steps = [r for r in records if "loss" in r]
    samples = {r["step"]: r["samples"] for r in steps}
    return Curve(
        len(steps),
        [(r["samples"], r["batch_size"], r["loss"]) for r in steps],
        [(samples[r["step"]], r["held_out_loss"]) for r in records if "held_out_loss" in r],
    )


def quarters(found: Curve) -> list[float]:
    """Mean training loss of the samples of each quarter; a step belongs to the one in which it ends."""
    total = found.trained[-1][0]
    sums, counts = [0.0] * QUARTERS, [0] * QUARTERS
    for after, size, loss in found.trained:
        quarter = (after - 1) * QUARTERS // total
        sums[quarter] += size * loss
        counts[quarter] += size
    return [loss / max(1, count) for loss, count in zip(sums, counts, strict=True)]


def verdicts(found: dict[str, Curve]) -> list[Verdict]:
    """The bars of the ramp-up, which is the first run, the small batch the second."""
    ramp, small, large = found.values()
    losses = [run.held_out[-1][1] for run in (ramp, small, large)]
    return [
        Verdict("steps of the ramp-up, over the small batch's", ramp.steps / small.steps, at_most=0.5),
        Verdict("held-out loss above the small batch's, over the large batch's", (losses[0] - losses[1]) / (losses[2] - losses[1]), 0.5),
    ]


def plot(found: dict[str, Curve], path: Path) -> None:
    """Training loss, a running mean over 1/50 of the samples, and held-out loss over tokens."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for color, (name, run) in enumerate(found.items()):
        window, at, points = run.trained[-1][0] / 50, 0, list[tuple[float, float]]()
        for i, (after, _, _) in enumerate(run.trained):
            while run.trained[at][0] <= after - window:
                at += 1
            part = run.trained[at : i + 1]
            points.append((after * SEQUENCE, sum(size * loss for _, size, loss in part) / sum(size for _, size, _ in part)))
        axes.plot(*zip(*points, strict=True), color=f"C{color}", linewidth=1, alpha=0.7, label=f"{name}, {run.steps} steps")
        axes.plot([s * SEQUENCE for s, _ in run.held_out], [loss for _, loss in run.held_out], "o", color=f"C{color}", markersize=3)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token): training, and held out (dots)")
    axes.set_xscale("log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def rows(found: dict[str, Curve]) -> list[list[str]]:
    return [
        [name, f"{run.steps}", *(f"{loss:.3f}" for loss in quarters(run)), f"{run.held_out[-1][1]:.4f}"]
        for name, run in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16384, help=f"length of each run, {SEQUENCE} tokens each")
    parser.add_argument("--no-write", action="store_true", help="leave results/ as it is")
    asked = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, options) in enumerate(runs(asked.samples).items()):
            out = Path(folder) / f"{number}"
            train(config_of(options, asked.samples, out), ParallelMesh.alone())
            found[name] = curve(out / "metrics.jsonl")
    columns = ["batch", "steps", *(f"quarter {i + 1}" for i in range(QUARTERS)), "held out"]
    grid = Grid(f"loss over {asked.samples * SEQUENCE:,} tokens", columns, rows(found))
    if not asked.no_write:
        RESULTS.mkdir(exist_ok=True)
        plot(found, RESULTS / "batch_ramp.png")
    samples = {name: {"trained": run.trained, "held_out": run.held_out} for name, run in found.items()}
    report("batch_ramp", [grid], verdicts(found), {}, samples, write=not asked.no_write)


if __name__ == "__main__":
    main()
