"""What the objectives are worth and what they cost: fill in the middle beside plain training, and samples a second of every objective.

    python -m benchmarks.objectives                    # --seeds 1 --steps 300 to try it out

Fill in the middle: benchmarks/objectives_fim.py says what is compared. Two Llama-style decoders, one trained with some of the documents
transformed, one plainly: the same windows in the same order, the same steps, one thread a run, fp32. Columns: mean over the seeds, and
their spread, largest less smallest, in nats a byte. The plain model's better form is the peer. Bars: the model trained with fim has a loss
of the middle that is at least 3 % below the peer's, and by more than 3 times the larger spread of the two. From left to right its loss is
at most 2 % above the plain model's.

Samples: made by one thread, windows of the same text to (tokens, targets, positions, mask); beside them what a step of the plain model of
configs/fim.toml consumes on one thread. Bar: each objective makes at least twice as many.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Grid, Verdict, report, start
from benchmarks.objectives_fim import CORPUS, PLAIN, PREFIX, SPM, SUFFIX_PREFIX, train_one, write_corpus
from megapar.mesh import ParallelMesh
from megapar.objectives.denoising import Style
from megapar.training.config import Config, ObjectiveConfig, RunConfig
from megapar.training.config_file import load_config
from megapar.training.examples import Examples
from megapar.training.loop import train
from megapar.training.metrics import read_metrics
from megapar.training.text import load_text

LENGTHS = (128, 1024)
STYLES: tuple[Style, ...] = ("sentinel", "infill", "mask", "replace", "delete")
SENTINELS = 128
"""Those of the longest samples."""
OBJECTIVES = {
    "causal_lm": ObjectiveConfig(),
    "prefix_lm": ObjectiveConfig(kind="prefix_lm"),
    "fim, token": ObjectiveConfig(kind="fim", fim_level="token"),
    "fim, character": ObjectiveConfig(kind="fim"),
    **{f"denoising, {style}": ObjectiveConfig(kind="denoising", style=style) for style in STYLES},
    "ul2": ObjectiveConfig(kind="ul2", sentinels=SENTINELS),
    "ul2r": ObjectiveConfig(kind="ul2", denoisers="ul2r", sentinels=SENTINELS),
}
FIM = Path(__file__).parents[1] / "configs" / "fim.toml"
Losses = dict[str, list[float]]


def small_config(sequence_length: int, out: str = "") -> Config:
    """The plain run of configs/fim.toml on one rank, a few steps of 1,024 tokens or one sample."""
    config = load_config(FIM)
    return replace(
        config,
        data=replace(config.data, sequence_length=sequence_length),
        objective=ObjectiveConfig(),
        parallel=replace(config.parallel, tp=1, dp=1),
        run=RunConfig(steps=20, batch_size=max(1, 1024 // sequence_length), sample_tokens=0, out=out),
    )


def needed(sequence_length: int) -> float:
    """Samples a second that training takes on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        config = small_config(sequence_length, folder)
        train(config, ParallelMesh.alone())
        seconds = [r["seconds"] for r in read_metrics(Path(folder) / "metrics.jsonl") if "loss" in r]
    assert isinstance(config.run.batch_size, int)
    return config.run.batch_size / statistics.median(seconds[2:])


def made(examples: Examples, count: int, repeats: int = 5) -> float:
    """Samples a second, the median of a few times `count` of them."""
    found = []
    for repeat in range(-1, repeats):
        begin = time.perf_counter()
        examples.samples((repeat + 1) * count, count)
        if repeat >= 0:
            found.append(count / (time.perf_counter() - begin))
    return statistics.median(found)


def speeds(count: int) -> dict[int, dict[str, float]]:
    """Samples a second by sequence length: of each objective, and under "training" what it takes."""
    torch.set_num_threads(1)
    text = load_text(load_config(FIM).data)
    found = {}
    for s in LENGTHS:
        config = small_config(s)
        by_name = {name: made(Examples(text, replace(config, objective=objective)), count) for name, objective in OBJECTIVES.items()}
        found[s] = {"training": needed(s), **by_name}
    return found


def spread(values: list[float]) -> float:
    return max(values) - min(values)


def peer(plain: Losses) -> str:
    """The plain model's better form."""
    return min((PREFIX, SUFFIX_PREFIX), key=lambda form: statistics.mean(plain[form]))


def verdicts(fim: Losses, plain: Losses, speed: dict[int, dict[str, float]]) -> list[Verdict]:
    """The bars; losses by seed, named as in objectives_fim."""
    ours, theirs = fim[SPM], plain[peer(plain)]
    gain = statistics.mean(theirs) - statistics.mean(ours)
    found = [
        Verdict("loss of the middle, fim over the peer", statistics.mean(ours) / statistics.mean(theirs), at_most=0.97),
        # Not a quotient: one seed alone has no spread.
        Verdict("and lower by, less 3 times the seeds' spread, nats a byte", gain - 3 * max(spread(ours), spread(theirs)), at_least=0),
        Verdict("loss from left to right, fim over plain", statistics.mean(fim[PLAIN]) / statistics.mean(plain[PLAIN]), at_most=1.02),
    ]
    for s, by_name in speed.items():
        slowest = min((name for name in by_name if name != "training"), key=lambda name: by_name[name])
        ratio = by_name[slowest] / by_name["training"]
        found.append(Verdict(f"samples/s of the slowest objective over a training step's, s={s}: {slowest}", ratio, at_least=2))
    return found


def grids(fim: Losses, plain: Losses, speed: dict[int, dict[str, float]]) -> list[Grid]:
    """The two tables."""
    rows = [
        ["fim", _told(fim[PLAIN]), _told(fim[SPM]), "", ""],
        ["plain", _told(plain[PLAIN]), "", *map(_told, (plain[PREFIX], plain[SUFFIX_PREFIX]))],
    ]
    columns = ["trained", PLAIN, f"middle, {SPM}", f"middle, {PREFIX}", f"middle, {SUFFIX_PREFIX}"]
    title = f"nats a byte, {len(fim[PLAIN])} seeds: mean (spread)"
    made = [[name, *(f"{speed[s][name]:,.0f}" for s in speed)] for name in next(iter(speed.values()), {})]
    return [Grid(title, columns, rows), Grid("samples/s, one thread", ["", *(f"s={s}" for s in speed)], made)]


def _told(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({spread(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each of the two models")
    parser.add_argument("--steps", type=int, default=6000, help="of each run")
    parser.add_argument("--no-write", action="store_true", help="leave results/ as it is")
    asked = parser.parse_args()
    speed = speeds(count=256)
    fim: Losses = {}
    plain: Losses = {}
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / CORPUS)
        for seed in range(asked.seeds):
            for losses, found in zip((fim, plain), start(2, train_one, seed, asked.steps, folder, timeout=3600), strict=True):
                for name, value in found.items():
                    losses.setdefault(name, []).append(value)
    samples: dict[str, Any] = {"fim": fim, "plain": plain, "samples_per_second": speed}
    report("objectives", grids(fim, plain, speed), verdicts(fim, plain, speed), {}, samples, write=not asked.no_write)


if __name__ == "__main__":
    main()
