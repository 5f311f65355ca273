"""The optimizer phase on 100 M parameters in a transformer's shapes: global norm, clipping, AdamW, the 16-bit weight.

    python -m benchmarks.optimizer
    python -m benchmarks.optimizer --exhaustive     also: remainder split and join on all 2^32 patterns, some minutes

One process with all cores; fresh gradients in each repeat. A layout is what a parameter consists of, and its bytes are what one step
must move of it if it moves each once (twice where it is read and written, and the gradient once more for the norm).

x triad      bytes a second, over those of torch.add(a, b, out=a) counted 12 bytes an element, both taken within a repeat: the median
GB/s         bytes a step must move, per second, also for those that move more
largest      the largest block that a step allocates

Peers: torch foreach (gradients to fp32 where they are not, clip_grad_norm_, torch.optim.AdamW(fused=True) on the fp32 masters, copies to
bf16); torch.compile of the whole phase on flat tensors. After one step their masters are compared with ours.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Contender, Grid, Verdict, interleaved, ratio, report, start
from megapar.ops.adamw import adamw_, join, split
from megapar.ops.grad_norm import grad_norm_
from megapar.ops.step_state import StepState, step_state_

OURS, EAGER, COMPILED = "megapar", "torch foreach + fused", "torch.compile, flat"
TRIAD, READ, COPY = "limit: add(a, b, out=a)", "limit: sum(a)", "limit: b.copy_(a)"
LIMIT_ELEMENTS = 100_000_000
LR, BETAS, EPS, DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
F32, BF16, INT16 = torch.float32, torch.bfloat16, torch.int16


@dataclass(frozen=True)
class Layout:
    """A parameter's tensors; bytes that the norm and the update of one must move."""

    name: str
    weight: torch.dtype
    grad: torch.dtype
    master: torch.dtype | None
    norm: int
    update: int

    @property
    def bytes(self) -> int:
        return self.norm + self.update


LAYOUTS = [
    Layout("bf16 weight, fp32 master, fp32 gradient", BF16, F32, F32, 4, 30),
    Layout("bf16 weight, fp32 master, bf16 gradient", BF16, BF16, F32, 2, 28),
    Layout("bf16 weight, 16-bit remainder, bf16 gradient", BF16, BF16, INT16, 2, 26),
]
ALONE = Layout("fp32 weight and gradient, AdamW alone", F32, F32, None, 0, 28)


def shapes(layers: int, hidden: int = 1024, vocab: int = 32000) -> list[tuple[int, ...]]:
    """A Llama-style decoder's: 3 layers of width 1024 with an embedding of 32000 and its head are 101 M parameters."""
    block: list[tuple[int, ...]] = [(3 * hidden, hidden), (hidden, hidden), (5632, hidden), (hidden, 2816), (hidden,), (hidden,)]
    return [(vocab, hidden), *block * layers, (hidden,), (vocab, hidden)]


class Parameters:
    """Weights, gradients, masters and moments of one contender, as views of flat tensors."""

    def __init__(self, layout: Layout, sizes: list[tuple[int, ...]]) -> None:
        self.layout = layout
        n = sum(torch.Size(s).numel() for s in sizes)
        start_values = torch.randn(n, generator=torch.Generator().manual_seed(0)).bfloat16()

        def flat(dtype: torch.dtype) -> Tensor:
            return torch.zeros(n, dtype=dtype)

        self.flat = {"weight": start_values.to(layout.weight), "grad": flat(layout.grad), "exp_avg": flat(F32), "exp_avg_sq": flat(F32)}
        if layout.master is not None:
            self.flat["master"] = start_values.float() if layout.master == F32 else flat(layout.master)
        self.lists = {
            kind: [x.view(s) for x, s in zip(tensor.split([torch.Size(s).numel() for s in sizes]), sizes, strict=True)]
            for kind, tensor in self.flat.items()
        }

    def set_gradients(self, data: Tensor) -> Parameters:
        """Fills them from random numbers that are drawn once a repeat and laid end to end."""
        for part in self.flat["grad"].split(len(data)):
            part.copy_(data[: len(part)])
        return self

    def wide(self) -> Tensor:
        master = self.flat.get("master", self.flat["weight"])
        return join(self.flat["weight"], master) if master.dtype == INT16 else master


def megapar_step(p: Parameters) -> Callable[[Any], None]:
    """The whole phase; without the norm where the layout has none."""
    lists, state, total, one = p.lists, StepState.create(1), torch.zeros(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    rows = [0] * len(lists["weight"])

    def step(_: Any) -> None:
        total.zero_()
        if p.layout.norm:
            grad_norm_(total, lists["grad"])
        step_state_(state, total, one, rows=[0], betas=[BETAS], max_norm=MAX_NORM if p.layout.norm else None)
        kinds = [lists[kind] for kind in ("weight", "grad", "master", "exp_avg", "exp_avg_sq") if kind in lists]
        if "master" not in lists:
            kinds.insert(2, [])
        adamw_(*kinds, state, rows, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)

    return step


def eager_step(p: Parameters) -> Callable[[Any], None]:
    params = [nn.Parameter(x) for x in p.lists.get("master", p.lists["weight"])]
    converts = p.layout.grad != F32
    for param, grad in zip(params, p.lists["grad"], strict=True):
        param.grad = torch.zeros_like(param) if converts else grad
    optimizer = torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

    def step(_: Any) -> None:
        if converts:
            torch._foreach_copy_([param.grad for param in params], p.lists["grad"])
        if p.layout.norm:
            nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        if "master" in p.lists:
            with torch.no_grad():
                torch._foreach_copy_(p.lists["weight"], params)

    return step


def _phase(w: Tensor, grad: Tensor, master: Tensor, m: Tensor, v: Tensor, scales: Tensor, clips: bool) -> None:
    g = grad.float()
    if clips:
        g = g * (MAX_NORM / (g.square().sum().sqrt() + 1e-6)).clamp(max=1.0)
    m.lerp_(g, 1 - BETAS[0])
    v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    master.mul_(1 - LR * DECAY).sub_(LR * scales[0] * m / (v.sqrt() * scales[1] + EPS))
    if w is not master:
        w.copy_(master)


def compiled_step(p: Parameters) -> Callable[[Any], None]:
    flat, scales, taken = p.flat, torch.zeros(2), [0]
    master, compiled = flat.get("master", flat["weight"]), torch.compile(_phase)

    def step(_: Any) -> None:
        taken[0] += 1
        scales.copy_(torch.tensor([1 / (1 - BETAS[0] ** taken[0]), (1 - BETAS[1] ** taken[0]) ** -0.5]))
        with torch.no_grad():
            compiled(flat["weight"], flat["grad"], master, flat["exp_avg"], flat["exp_avg_sq"], scales, p.layout.norm > 0)

    return step


def contenders(layout: Layout, sizes: list[tuple[int, ...]], threads: int) -> list[Contender]:
    wide = Layout(layout.name, layout.weight, layout.grad, layout.master and F32, layout.norm, layout.update)
    made: list[tuple[str, Layout, Any]] = [(OURS, layout, megapar_step), (EAGER, wide, eager_step), (COMPILED, wide, compiled_step)]
    found = []
    for name, own, make in made:
        p = Parameters(own, sizes)
        found.append(Contender(name, p.set_gradients, make(p), threads, {"parameters": p}))
    return found


def limits(elements: int, threads: int) -> list[Contender]:
    a, b = torch.randn(elements), torch.randn(elements)
    work: dict[str, Callable[[Any], Any]] = {
        TRIAD: lambda _: torch.add(a, b, out=a), READ: lambda _: a.sum(), COPY: lambda _: b.copy_(a)
    }  # fmt: skip
    return [Contender(name, lambda data: None, step, threads) for name, step in work.items()]


def draw(repeat: int) -> Tensor:
    return torch.randn(1 << 22, generator=torch.Generator().manual_seed(1000 + repeat))


def check(found: list[Contender]) -> dict[str, float]:
    """One step of each from the same gradients: the largest difference of its masters from ours. Raises AssertionError above 1e-6."""
    masters = {}
    for contender in found:
        contender.step(contender.prepare(draw(-1000)))
        masters[contender.name] = contender.extra["parameters"].wide().clone()
    errors = {name: float((x - masters[OURS]).abs().max()) for name, x in masters.items()}
    for name, error in errors.items():
        assert error <= 1e-6, f"{name}: a master is {error:.1e} from ours after one step"
    return errors


def largest_allocation(contender: Contender) -> int:
    inputs = contender.prepare(draw(-1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        contender.step(inputs)
    results: Any = profiled.profiler
    return max((e.nbytes() for e in results.kineto_results.events() if e.name() == "[memory]"), default=0)


def measure(layout: Layout, layers: int, vocab: int, repeats: int, threads: int) -> dict[str, Any]:
    """Runs in a process of its own: names, seconds [repeats, contenders], allocations, errors, parameters."""
    torch.set_num_threads(threads)
    sizes = shapes(layers, vocab=vocab)
    n = sum(torch.Size(s).numel() for s in sizes)
    found = contenders(layout, sizes, threads)
    errors = check(found)
    allocations = {c.name: largest_allocation(c) for c in found}
    found += limits(min(LIMIT_ELEMENTS, n), threads)
    seconds = interleaved(found, draw, repeats=repeats, inner=1)[0]
    return {"names": [c.name for c in found], "seconds": seconds.tolist(), "allocations": allocations, "errors": errors, "parameters": n}


def measure_norm(layers: int, vocab: int, repeats: int, threads: int) -> dict[str, Any]:
    """The global norm of bf16 gradients alone."""
    torch.set_num_threads(threads)
    p = Parameters(Layout("", BF16, BF16, None, 2, 0), shapes(layers, vocab=vocab))
    total = torch.zeros(3, dtype=torch.float64)
    found = [
        Contender(OURS, p.set_gradients, lambda _: grad_norm_(total, p.lists["grad"]), threads),
        Contender("torch get_total_norm", p.set_gradients, lambda _: nn.utils.get_total_norm(p.lists["grad"]), threads),
    ]
    seconds = interleaved(found, draw, repeats=repeats, inner=1)[0]
    return {"names": [c.name for c in found], "seconds": seconds.tolist(), "parameters": len(p.flat["grad"])}


def grid(layout: Layout, told: dict[str, Any]) -> Grid:
    names, seconds, n = told["names"], torch.tensor(told["seconds"], dtype=torch.float64), told["parameters"]
    element = {TRIAD: 12, READ: 4, COPY: 8}
    rows = []
    for i, name in enumerate(names):
        moved = n * layout.bytes if name not in element else min(LIMIT_ELEMENTS, n) * element[name]
        median = float(seconds[:, i].median())
        rows.append([name, f"{median * 1e3:.1f}", f"{moved / median / 1e9:.1f}", "", ""])
        if name not in element:
            rows[-1][3:] = [f"{to_triad(layout, told, name):.2f}", f"{told['allocations'][name] / 2**20:.1f} MiB"]
    return Grid(f"{layout.name}: {layout.bytes} bytes a parameter, {n / 1e6:.0f} M", ["", "ms", "GB/s", "x triad", "largest"], rows)


def to_triad(layout: Layout, told: dict[str, Any], name: str) -> float:
    """Bytes a second over triad's."""
    n, seconds = told["parameters"], torch.tensor(told["seconds"], dtype=torch.float64)
    return ratio(seconds, told["names"], TRIAD, name) * n * layout.bytes / (12 * min(LIMIT_ELEMENTS, n))


def verdicts(layouts: list[tuple[Layout, dict[str, Any]]], alone: dict[str, Any], norm: dict[str, Any]) -> list[Verdict]:
    found = [Verdict(f"{layout.name}: bytes a second, of triad's", to_triad(layout, told, OURS), at_least=0.85) for layout, told in layouts]
    largest = max(told["allocations"][OURS] for _, told in layouts)
    found.append(Verdict("largest allocation of the phase, MiB", largest / 2**20, at_most=0.5))
    seconds = torch.tensor(alone["seconds"], dtype=torch.float64)
    found.append(Verdict("fp32 AdamW alone: torch's time, fused, over ours", ratio(seconds, alone["names"], EAGER, OURS), at_least=1.0))
    seconds = torch.tensor(norm["seconds"], dtype=torch.float64)
    faster = ratio(seconds, norm["names"], norm["names"][1], OURS)
    return [*found, Verdict("norm of bf16 gradients: torch's time over ours", faster, at_least=15.0)]


def exhaustive() -> None:
    """Raises AssertionError unless split and join are inverses on all 2^32 patterns, and the kernel's on all but denormals and NaNs."""
    step, state = 1 << 20, StepState.create(1)
    state.counters.fill_(1.0)
    zeros = [torch.zeros(step) for _ in range(3)]
    for first in range(-(1 << 31), 1 << 31, step):
        u = torch.arange(first, first + step).to(torch.int32)
        weight, remainder = split(u.view(F32))
        assert torch.equal(join(weight, remainder).view(torch.int32), u), f"patterns from {first & 0xFFFFFFFF:#x}"
        x, before = u.view(F32), (weight.view(INT16).clone(), remainder.clone())
        options = {"lr": 0.0, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
        adamw_([weight], [zeros[0]], [remainder], [zeros[1]], [zeros[2]], state, [0], **options)  # type: ignore[arg-type]
        kept = x.isfinite() & (x.abs() >= 2.0**-126)
        assert torch.equal(weight.view(INT16)[kept], before[0][kept]) and torch.equal(remainder[kept], before[1][kept])
        assert weight[x.isnan()].isnan().all()
        print(f"\r{(first + (1 << 31)) / 2**32:.0%} of 2^32 patterns", end="", flush=True)
    print("\rremainder: split and join are inverses on all 2^32 patterns")


def main(repeats: int = 9, layers: int = 3, vocab: int = 32000, exhaustive_: bool = False) -> None:
    """Measures, prints, writes results/optimizer.json.

    Args:
        repeats: measurements of each contender, at least 7.
        layers: decoder layers of width 1024.
        vocab: rows of the embedding and of the head.
        exhaustive_: run the remainder through all 2^32 patterns first.
    """
    if exhaustive_:
        exhaustive()
    threads = os.cpu_count() or 1
    told = [(layout, start(1, measure, layout, layers, vocab, repeats, threads)[0]) for layout in [*LAYOUTS, ALONE]]
    norm = start(1, measure_norm, layers, vocab, repeats, threads)[0]
    medians = torch.tensor(norm["seconds"]).median(0).values.tolist()
    rows = [[name, f"{s * 1e3:.1f}", f"{2 * norm['parameters'] / s / 1e9:.1f}"] for name, s in zip(norm["names"], medians, strict=True)]
    grids = [grid(layout, one) for layout, one in told] + [Grid("Norm of bf16 gradients alone", ["", "ms", "GB/s"], rows)]
    missing = {} if importlib.util.find_spec("deepspeed") else {"DeepSpeedCPUAdam": "deepspeed is not installed"}
    samples = {"layouts": {layout.name: one for layout, one in told}, "norm": norm}
    report("optimizer", grids, verdicts(told[:-1], told[-1][1], norm), missing, samples)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
