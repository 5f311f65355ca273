"""What 16 bits save, in time and memory: a decoder's whole training step in fp32, bf16 and fp16, one process on one thread.

    python -m benchmarks.precision

The decoder, the steps and the contenders are those of benchmarks/zero.py, "alone": two micro-batches, clipping, AdamW. Ours have an fp32
master beside 16-bit weights, accumulate in fp32, and in fp16 a dynamic loss scale, which has settled before anything is measured. torch's
bf16 is weights in bf16 with fp32 masters, or autocast.

tokens/s     of the median step
x fp32       tokens/s over those of the same library in fp32, median of the ratios taken within each repeat
tensor MB    the most bytes of tensors at once in a step, weights, optimizer state and gradients included
MB/sequence  what each sequence more in a micro-batch adds to that: its activations
of fp32      that over the same library's in fp32
"""

from __future__ import annotations

from functools import partial

import torch
import tyro
from torch import Tensor

from benchmarks import zero_memory
from benchmarks.common import Contender, Grid, Verdict, interleaved, ratio, report, start
from benchmarks.zero_case import ALONE, AUTOCAST, OURS, TORCH, Case, Trainer, train
from benchmarks.zero_trainers import Ours, trainer

KINDS = {
    f"{OURS} fp32": ("fp32", f"{OURS} {ALONE}"),
    f"{OURS} bf16": ("bf16", f"{OURS} {ALONE}"),
    f"{OURS} fp16": ("fp16", f"{OURS} {ALONE}"),
    f"{TORCH} fp32": ("fp32", f"{TORCH} {ALONE}"),
    f"{TORCH} bf16": ("bf16", f"{TORCH} {ALONE}"),
    f"{TORCH} bf16{AUTOCAST}": ("bf16", f"{TORCH} {ALONE}{AUTOCAST}"),
}
SETTLED = 30
"""Steps after which a loss scale no longer falls."""
LARGE = 16
"""Sequences in a micro-batch with which the peak is in backward, not in the update."""


def case_of(name: str) -> tuple[Case, str]:
    precision, contender = KINDS[name]
    return Case(precision=precision), contender  # type: ignore[arg-type]


def skipped(made: Trainer) -> int:
    return made.optimizer.skipped_steps if isinstance(made, Ours) else 0


def measure(repeats: int) -> tuple[list[list[float]], dict[str, tuple[float, float]]]:
    """In a rank by itself: seconds by repeat and contender; by contender, MB of tensors in a step, and what a sequence more adds."""
    made = {name: trainer(*case_of(name)) for name in KINDS}
    found = [Contender(name, lambda data: data, partial(train, one)) for name, one in made.items()]
    draw = partial(Case().draw, rank=0)
    interleaved(found, draw, repeats=1, inner=1, warmup=SETTLED)
    before = {name: skipped(one) for name, one in made.items()}
    seconds = interleaved(found, draw, repeats=repeats, inner=1)[0]
    assert before == {name: skipped(one) for name, one in made.items()}, "a skipped step takes less time"
    del made, found
    memory = {}
    for name in KINDS:
        most = zero_memory.tensors_of(*case_of(name))
        memory[name] = most(Case().sizes.b) / 1e6, (most(2 * LARGE) - most(LARGE)) / LARGE / 1e6
    return seconds.tolist(), memory


def table(seconds: Tensor, memory: dict[str, tuple[float, float]]) -> tuple[Grid, list[Verdict]]:
    """Rows of all contenders; and the bars: ours in 16 bits are faster than in fp32, and a sequence takes less."""
    names, sizes, rows, bars = list(KINDS), Case().sizes, [], []
    tokens = sizes.b * sizes.s * sizes.micro_batches
    for i, name in enumerate(names):
        plain = f"{name.partition(' ')[0]} fp32"
        faster, less = ratio(seconds, names, plain, name), memory[name][1] / memory[plain][1]
        speed = f"{tokens / float(seconds[:, i].median()):.0f}"
        rows.append([name, speed, f"{faster:.2f}", f"{memory[name][0]:.0f}", f"{memory[name][1]:.2f}", f"{less:.2f}"])
        if name.startswith(OURS) and name != plain:
            bars += [Verdict(f"tokens/s of {name} / {plain}", faster, at_least=1.0)]
            bars += [Verdict(f"MB a sequence of {name} / {plain}", less, at_most=0.75)]
    return Grid(f"Precision: {sizes}", ["one step", "tokens/s", "x fp32", "tensor MB", "MB/sequence", "of fp32"], rows), bars


def main(repeats: int = 9) -> None:
    """Measures, prints, writes results/precision.json.

    Args:
        repeats: measurements of each contender, at least 7.
    """
    seconds, memory = start(1, measure, repeats, timeout=1200)[0]
    grid, bars = table(torch.tensor(seconds, dtype=torch.float64), memory)
    report("precision", [grid], bars, {}, {"names": list(KINDS), "seconds": seconds, "mb": memory})


if __name__ == "__main__":
    tyro.cli(main)
