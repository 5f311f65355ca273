"""ZeRO's stages in a decoder's whole training step: data-parallel ranks, gradient accumulation, clipping by the global norm, AdamW.

    python -m benchmarks.zero --deepspeed DIR      DIR: where pip put DeepSpeed
    python -m benchmarks.zero --eager --deepspeed DIR      nothing compiled: three minutes
    python -m benchmarks.zero --quick              a small model, two repeats: does everything run?
    python -m benchmarks.zero --memory             instead: the largest micro-batch that each stage fits under a cap (zero_memory.py)

gloo, one thread a rank, the same decoder for all: plain PyTorch (benchmarks/plain_llama.py) under the peers (benchmarks/zero_peers.py),
each eager and with each block and the loss compiled; megapar's layers under ours, and once more in a launch of its own with
MEGAPAR_BACKEND=reference, plain PyTorch instead of the kernels, beside the eager peers: what the runtime alone is worth. In fp32, and with
bf16 weights and an fp32 master. Every rank draws tokens of its own, new ones each step. Before anything is timed, the weights of all after
two clipped steps must agree with one process's.

tokens/s     of the median step, all ranks together; of the slowest rank
x ...        tokens/s over that of the contender named, median of the ratios taken within each repeat
step ms      wall time of the whole step
update ms    of that, from the return of the last backward to the end: what is left of reductions, the norm, AdamW, fetching weights
waiting ms   exposed communication: of the step, how long a rank's training thread does not compute: wall time less its CPU time, plus
             the CPU time that it spins in megapar's shared memory. Mean of the ranks. "alone" shows what of it is the machine's
of limit     the limit over the step's time. The limit: the same kind's "alone", a rank's own micro-batches without any communication (all
             ranks at once); of its update one part in so many as there are ranks where the optimizer is sharded
MB sent      by a rank each step, if every collective uses the fewest bytes (benchmarks/common.py: Counts)
peak MB      what building and three steps add to the memory of the process, of the fullest rank (of own processes each)
tensor MB    of that, the most bytes of tensors at once in a step, weights and optimizer state included; no shared or gloo's own memory
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from benchmarks import zero_memory
from benchmarks.common import Contender, Grid, LaunchError, Verdict, count, interleaved, ratio, reason, report
from benchmarks.pipeline import with_backend
from benchmarks.zero_case import ALL_OURS, ALONE, AUTOCAST, COMPILED, DEEPSPEED, OURS, PEERS, TORCH, Case, Data, Sizes, Trainer, train
from benchmarks.zero_peers import PACKAGES, Torch
from benchmarks.zero_trainers import trainer
from megapar.shared_memory import SharedMemory

LIKE = [["torch DDP"], ["torch ZeRO-1", "DeepSpeed 1"], ["torch FSDP2 2", "DeepSpeed 2"], ["torch FSDP2 3", "DeepSpeed 3"]]
"""The peers of each stage."""
BARS = {"": 1.5, "reference": 1.0}
"""What our speed has to be of the fastest of them, by backend."""
TINY = Sizes(layers=2, hidden=64, heads=4, ffn=96, vocab=128, s=16)
CHECKED: dict[str, Any] = {"lr": 1.0, "eps": 1.0, "max_norm": 0.1}
"""Options of the comparison of weights. With eps far above the gradients AdamW's update is all but linear in them, where with the usual one
it is their sign, which hides a wrong scale."""
AGREE = {"fp32": 1e-4, "bf16": 5e-2}
"""torch sums squares in fp32, and its norm of millions of gradients is off by 1e-5."""


def names_of(case: Case, compiled: bool) -> list[str]:
    """Contenders of one launch."""
    theirs = [f"{TORCH} {ALONE}", *PEERS]
    if case.precision == "bf16":
        theirs += [f"{TORCH} {kind}{AUTOCAST}" for kind in (ALONE, "DDP")]
    names = [*ALL_OURS, f"{OURS} {ALONE}", *theirs, *(name + COMPILED for name in theirs if compiled)]
    return [name for name in names if case.deepspeed or not name.startswith(DEEPSPEED)]


def limit_of(name: str) -> str:
    """The contender that does the same without communication."""
    return f"{OURS if name.startswith(OURS) else TORCH} {ALONE}" + "".join(variant for variant in (AUTOCAST, COMPILED) if variant in name)


def replicates(name: str) -> bool:
    """Whether every rank updates all weights."""
    return any(kind in name for kind in (ALONE, "DDP", f"{OURS} 0"))


def errors(case: Case, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """In one rank: by contender, the largest relative errors of a tensor's change in two steps, and of the gradient's norm.

    Against one process that trains in fp32 on the tokens of all ranks; for those that train alone, on its own ones.
    """
    case, found = replace(case, **CHECKED), {}
    rank = dist.get_rank()
    rights = {False: right_weights(case, range(dist.get_world_size())), True: right_weights(case, [rank])}
    for name in names:
        before, right, norms = rights[ALONE in name]
        made, got = trainer(case, name), []
        for step in range(len(norms)):
            made.backward(case.draw(step, rank))
            got.append(float(made.update()))
        weights = made.weights()
        assert weights.keys() == right.keys(), f"{name} trains {sorted(weights)}, expected {sorted(right)}"
        changes = [float((weights[key] - right[key]).norm() / (right[key] - before[key]).norm()) for key in right]
        found[name] = max(changes), max(abs(a / b - 1) for a, b in zip(got, norms, strict=True))
    return found


def right_weights(case: Case, ranks: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights of one process before and after two steps on the tokens of these ranks, and its gradients' norms."""
    made = Torch(replace(case, precision="fp32"), ALONE)
    before, norms = made.weights(), []
    for step in range(2):
        made.backward([micro_batch for rank in ranks for micro_batch in case.draw(step, rank)])
        norms.append(float(made.update()))
    assert min(norms) > case.max_norm, f"gradients of norm {norms} are not clipped to {case.max_norm}, which compares no clipping"
    return before, made.weights(), norms


def check(found: dict[str, tuple[float, float]], precision: str) -> None:
    for name, (change, norm) in found.items():
        assert change <= AGREE[precision], f"{name}: a tensor's change is off by {change:.1e}"
        assert norm <= AGREE[precision], f"{name}: the gradient's norm is off by {norm:.1e}"


@dataclass
class Stopwatch:
    """Steps a trainer, and keeps seconds of each step: of the whole, of the update, and waited."""

    trainer: Trainer
    spun: list[float]

    def __post_init__(self) -> None:
        self.seconds: list[tuple[float, float, float]] = []

    def step(self, data: Data) -> None:
        self.spun.clear()
        begin, computing = time.perf_counter(), time.thread_time()
        self.trainer.backward(data)
        middle = time.perf_counter()
        self.trainer.update()
        end, computed = time.perf_counter(), time.thread_time() - computing
        self.seconds.append((end - begin, end - middle, end - begin - computed + sum(self.spun)))


@contextmanager
def spinning() -> Iterator[list[float]]:
    """A list to which every wait in shared memory adds the CPU seconds that it took."""
    spun: list[float] = []
    real = SharedMemory._spin

    def timed(memory: SharedMemory, *args: Any) -> None:
        begin = time.thread_time()
        real(memory, *args)
        spun.append(time.thread_time() - begin)

    with mock.patch.object(SharedMemory, "_spin", timed):
        yield spun


def measure(case: Case, names: Sequence[str], repeats: int) -> tuple[list[list[list[float]]], list[int]]:
    """In one rank: seconds [whole, update, waited] by repeat and contender, and bytes that a rank sends."""
    check(errors(case, names), case.precision)
    with spinning() as spun:
        watches = [Stopwatch(trainer(case, name), spun) for name in names]
        found = [Contender(name, lambda data: data, watch.step) for name, watch in zip(names, watches, strict=True)]
        draw = partial(case.draw, rank=dist.get_rank())
        sent = [count(one, draw(-1)).sent for one in found]
        interleaved(found, draw, repeats=repeats, inner=1, warmup=2)
    seconds = torch.tensor([watch.seconds[-repeats:] for watch in watches], dtype=torch.float64).permute(2, 1, 0).contiguous()
    dist.all_reduce(seconds[:2], dist.ReduceOp.MAX)
    dist.all_reduce(seconds[2], dist.ReduceOp.SUM)
    seconds[2] /= dist.get_world_size()
    return seconds.tolist(), sent


def peak(case: Case, name: str) -> tuple[float, float]:
    """In one rank: MB that building the contender and three steps added to the peak of the process; MB of tensors in a step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = trainer(case, name)
    for repeat in range(3):
        train(made, case.draw(repeat, dist.get_rank()))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    del made
    return grown, zero_memory.tensors_of(case, name)(case.sizes.b) / 1e6


def grid(title: str, case: Case, world: int, names: list[str], seconds: Tensor, sent: list[int], peaks: list[Any], base: str) -> Grid:
    sizes, rows = case.sizes, []
    tokens = world * sizes.b * sizes.s * sizes.micro_batches
    median = seconds.median(dim=1).values
    for i, name in enumerate(names):
        whole, update, waited = median[:, i].tolist()
        least = ""
        if limit_of(name) in names:
            alone = seconds[:, :, names.index(limit_of(name))]
            limits = alone[0] - alone[1] * (1 - 1 / world) * (not replicates(name))
            least = f"{float((limits / seconds[0, :, i]).median()):.2f}"
        times = [f"{1e3 * value:.1f}" for value in (whole, update, waited)]
        quotient = f"{ratio(seconds[0], names, base, name):.2f}"
        bytes_ = [f"{sent[i] / 1e6:.1f}", *(f"{value:.0f}" for value in peaks[i])]
        rows.append([name, f"{tokens / whole:.0f}", quotient, *times, least, *bytes_])
    columns = ["one step", "tokens/s", f"x {base}", "step ms", "update ms", "waiting ms", "of limit"]
    return Grid(title, [*columns, "MB sent", "peak MB", "tensor MB"], rows)


def runnable(world: int, backend: str, case: Case, names: Sequence[str], timeout: float, missing: dict[str, str]) -> dict[str, Any]:
    """Those of `names` that run, each tried in a launch of its own, with their peaks."""
    peaks = {}
    for name in names:
        try:
            each = with_backend(backend, world, peak, case, name, timeout=timeout)
            peaks[name] = [max(column) for column in zip(*each, strict=True)]
        except LaunchError as error:
            missing[f"{name}, {case.precision}"] = reason(error)
    return peaks


def verdicts(where: str, names: list[str], seconds: Tensor, peaks: dict[str, Any], bar: float) -> list[Verdict]:
    """Stage for stage: our speed over the fastest peer's, our tensors over the smallest eager peer's."""
    wall = seconds[0].median(dim=0).values
    bars = []
    for stage, own in enumerate(ALL_OURS):
        rivals = [name for name in names if name.startswith(tuple(LIKE[stage]))]
        if own in names and rivals:
            fastest = min(rivals, key=lambda name: float(wall[names.index(name)]))
            smallest = min((name for name in rivals if name in LIKE[stage]), key=lambda name: peaks[name][1])
            bars.append(Verdict(f"{where}: tokens/s of {own} / {fastest}", ratio(seconds[0], names, fastest, own), at_least=bar))
            bars.append(Verdict(f"{where}: tensors of {own} / {smallest}", peaks[own][1] / peaks[smallest][1], at_most=1.0))
    return bars


def is_peer(name: str) -> bool:
    return not name.startswith(OURS) and ALONE not in name


def launch(case: Case, ranks: int, backend: str, peaks: dict[str, Any], repeats: int) -> tuple[Grid, list[Verdict], dict[str, Any]]:
    """One launch of the contenders that `peaks` names: its table, bars and samples."""
    names = list(peaks)
    listed, sent = with_backend(backend, ranks, measure, case, names, repeats, timeout=1800)[0]
    seconds = torch.tensor(listed, dtype=torch.float64)
    where = f"{ranks} ranks, {case.precision}, {backend or 'kernels'}"
    base = min(filter(is_peer, names), key=lambda name: float(seconds[0, :, names.index(name)].median()))
    table = grid(f"ZeRO, {where}: {case.sizes}", case, ranks, names, seconds, sent, list(peaks.values()), base)
    samples = {"names": names, "seconds": listed, "sent": sent, "peak_mb": list(peaks.values())}
    return table, verdicts(where, names, seconds, peaks, BARS[backend]), {where: samples}


def launches(case: Case, ranks: int, repeats: int, timeout: float, quick: bool, missing: dict[str, str]) -> Iterator[Any]:
    """Of one precision: with the kernels, then with the reference beside the eager peers, whose peaks stay what they were."""
    names = names_of(case, compiled=not quick)
    if quick:
        yield launch(case, ranks, "", dict.fromkeys(names, (math.nan, math.nan)), repeats)
        return
    peaks = runnable(ranks, "", case, names, timeout, missing)
    yield launch(case, ranks, "", peaks, repeats)
    own = runnable(ranks, "reference", case, [name for name in names if name.startswith(OURS)], timeout, missing)
    eager = {name: peak for name, peak in peaks.items() if not name.startswith(OURS) and COMPILED not in name}
    yield launch(case, ranks, "reference", own | eager, repeats)


def main(
    repeats: int = 7,
    ranks: int = 2,
    deepspeed: Path | None = None,
    quick: bool = False,
    eager: bool = False,
    memory: bool = False,
    cap: int = 256,
    timeout: float = 400,
) -> None:
    """Measures, prints, writes results/zero.json; with --memory results/zero_memory.json.

    Args:
        repeats: measurements of each contender, at least 7.
        ranks: processes.
        deepspeed: folder that holds DeepSpeed, by pip install --target; it is missing otherwise.
        quick: a small model, two repeats, nothing compiled, no reference, no peaks, a cap of 4 MB; writes nothing.
        eager: nothing compiled, no reference, no peaks: three minutes.
        memory: the largest micro-batches instead.
        cap: MB of tensors that they may take.
        timeout: seconds that a contender gets to start.
    """
    common: dict[str, Any] = {"sizes": TINY if quick else Sizes(), "deepspeed": str(deepspeed.resolve()) if deepspeed else ""}
    grids, bars, samples = [], [], dict[str, Any]()
    missing = {} if deepspeed else {DEEPSPEED: f"pip install --target DIR --no-deps {PACKAGES}, and --deepspeed DIR"}
    if eager and not memory:
        missing["compiled contenders, peaks, the reference's launch"] = "python -m benchmarks.zero without --eager"
    for precision in ("fp32", "bf16"):
        case = Case(precision=precision, **common)
        if memory:
            case = replace(case, reduce_every="micro_batch", sizes=replace(case.sizes, b=1, s=case.sizes.s // 4))
            most = 4_000_000 if quick else cap * 1_000_000
            samples[precision] = zero_memory.measure(case, ranks, most, timeout, missing)
            grids.append(zero_memory.grid(case, ranks, most, samples[precision]))
            continue
        for table, more, sampled in launches(case, ranks, 2 if quick else repeats, timeout, quick or eager, missing):
            grids.append(table)
            bars += [] if quick else [bar for bar in more if not math.isnan(bar.ratio)]
            samples |= sampled
    report("zero_memory" if memory else "zero", grids, bars, missing, samples, write=not quick)


if __name__ == "__main__":
    tyro.cli(main)
