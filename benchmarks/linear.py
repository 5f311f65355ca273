"""The three GEMMs of a linear layer against torch's (oneDNN), in GFLOP/s.

    python -m benchmarks.linear

For a weight [out, in] and t tokens: forward x w^T, input gradient dy w, weight gradient dy^T x, each 2 t in out FLOPs; and the weight
gradient added to an fp32 main_grad, which torch does as `main_grad.add_(dy.t() @ x)`: through a bf16 gradient that is written, read, and
rounded once. Then a SwiGLU MLP's first half, x w^T and silu(gate) * up in one kernel or two.

a / b            GFLOP/s of the median of the repeats, ours / torch
x                median of the ratios taken within each repeat: how often ours runs while torch's runs once
peak             ours / the rate of products from registers (benchmarks/peak.cpp), measured in the same run before and after, the better

All threads; contenders interleaved on fresh random inputs. Before timing, both results are compared with each other.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.common import Contender, Grid, Verdict, interleaved, ratio, report, start
from benchmarks.peak import Peak, measure_peak
from megapar.ops.linear import linear_activation, linear_forward, linear_input_grad, linear_weight_grad
from megapar.ops.swiglu import swiglu

TOKENS = (512, 1024, 2048, 4096)
SHAPES = ((768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (4096, 4096))
OTHERS = ((512, 768, 768), (1024, 768, 3072))
SWIGLU = ((512, 768, 3072), (2048, 768, 2048), (2048, 1024, 4096))
KINDS = ("forward", "input gradient", "weight gradient", "into fp32")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FUSED, TWO, EAGER, COMPILED = "one kernel", "two kernels", "torch eager", "torch compiled"
# Of the largest number: what bf16, or fp32 sums in another order, may differ by.
AGREE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    t: int
    n: int
    out: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        return 2 * self.t * self.n * self.out

    def __str__(self) -> str:
        return f"{self.t} x {self.n} -> {self.out}"


def draw(case: Case, repeat: int) -> dict[str, Tensor]:
    """Fresh x, weight, dy, and an fp32 main_grad."""
    generator = torch.Generator().manual_seed(repeat + 100)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(case.dtype)

    tensors = {"x": normal(case.t, case.n), "weight": normal(case.out, case.n), "dy": normal(case.t, case.out)}
    return tensors | {"main_grad": torch.randn(case.out, case.n, generator=generator)}


STEPS: dict[str, tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]] = {
    "forward": (lambda d: linear_forward(d["x"], d["weight"]), lambda d: F.linear(d["x"], d["weight"])),
    "input gradient": (lambda d: linear_input_grad(d["dy"], d["weight"]), lambda d: d["dy"] @ d["weight"]),
    "weight gradient": (lambda d: linear_weight_grad(d["dy"], d["x"]), lambda d: d["dy"].t() @ d["x"]),
    "into fp32": (
        lambda d: linear_weight_grad(d["dy"], d["x"], d["main_grad"], 1.0),
        lambda d: d["main_grad"].add_(d["dy"].t() @ d["x"]),
    ),
}


def own_main_grad(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return data | {"main_grad": data["main_grad"].clone()}


def contenders(threads: int, kinds: tuple[str, ...] = KINDS) -> list[Contender]:
    """Ours and torch's of each kind, in turn."""
    made = []
    for kind in kinds:
        prepare = own_main_grad if kind == "into fp32" else lambda data: data
        made += [Contender(f"{kind} {who}", prepare, step, threads) for who, step in zip(("ours", "torch"), STEPS[kind], strict=True)]
    return made


def swiglu_contenders(threads: int, compiled: bool) -> list[Contender]:
    """x w^T and SwiGLU; each leaves the pre-activation for backward."""

    def eager(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        z = F.linear(data["x"], data["weight"])
        gate, up = z.chunk(2, -1)
        return F.silu(gate) * up, z

    def two(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        z = linear_forward(data["x"], data["weight"])
        return swiglu(z), z

    steps: dict[str, Callable[[Any], Any]] = {
        FUSED: lambda data: linear_activation(data["x"], data["weight"], None, "swiglu"),
        TWO: two,
        EAGER: eager,
    }
    if compiled:
        torch._dynamo.reset()
        steps[COMPILED] = torch.compile(eager, dynamic=False)
    return [Contender(name, lambda data: data, step, threads) for name, step in steps.items()]


def check(found: list[Contender], data: dict[str, Tensor]) -> None:
    """Contenders that do the same work agree: all of them with the first, or ours with torch's of each kind."""
    halves = found[0].name == FUSED
    for a, b in [(0, i) for i in range(1, len(found))] if halves else [(i, i + 1) for i in range(0, len(found), 2)]:
        ours, theirs = (found[i].step(found[i].prepare(data)) for i in (a, b))
        ours, theirs = (y[0] if isinstance(y, tuple) else y for y in (ours, theirs))
        error = float((ours - theirs).abs().max()) / float(theirs.abs().max())
        assert error <= AGREE[data["x"].dtype], f"{found[a].name} and {found[b].name} differ by {error:.1e} of the largest number"


def measure(case: Case, threads: int, repeats: int, swiglu_half: bool, compiled: bool) -> tuple[list[str], list[list[float]]]:
    """In one rank: names, and wall seconds [repeats, contenders]."""
    found = swiglu_contenders(threads, compiled) if swiglu_half else contenders(threads)
    check(found, draw(case, -1))
    # At least about 10 ms at 400 GFLOP/s: shorter ones see the clock and each other.
    inner = min(max(round(4e9 / case.flops), 1), 8)
    seconds = interleaved(found, partial(draw, case), repeats=repeats, inner=inner, warmup=1)[0]
    return [c.name for c in found], seconds.tolist()


def can_compile() -> bool:
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:  # no C++ compiler, or one that Inductor does not know: the peer is named missing
        print(f"torch.compile: {error}")
        return False
    return True


def measure_all(cases: list[tuple[Case, bool]], threads: int, repeats: int, compiled: bool) -> list[tuple[list[str], list[list[float]]]]:
    """Of each (case, whether it is the SwiGLU half); `compiled`: with torch.compile, where it works."""
    compiled = compiled and can_compile()
    # Each measurement collects garbage first; what exists by now is never garbage, and looking through it takes as long as a GEMM.
    gc.freeze()
    return [measure(case, threads, repeats, half, compiled) for case, half in cases]


Found = dict[str, tuple[Case, list[str], Tensor]]
"""By title of the case: the case, names, seconds [repeats, contenders]."""


def speedup(found: Found, kind: str) -> dict[str, float]:
    """How often ours runs while torch's runs once, by case."""
    return {title: ratio(seconds, names, f"{kind} torch", f"{kind} ours") for title, (_, names, seconds) in found.items()}


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def gflops(case: Case, names: list[str], seconds: Tensor, name: str) -> float:
    return case.flops / float(seconds[:, names.index(name)].median()) / 1e9


def grid(found: Found, peak: float | None, title: str) -> Grid:
    rows = []
    for name, (case, names, seconds) in found.items():
        cells = []
        for kind in KINDS:
            ours, torchs = (gflops(case, names, seconds, f"{kind} {who}") for who in ("ours", "torch"))
            cells += [f"{ours:.0f} / {torchs:.0f}", f"{ratio(seconds, names, f'{kind} torch', f'{kind} ours'):.2f}"]
            cells += [f"{ours / peak:.2f}" if peak else "-"]
        rows.append([name, *cells])
    return Grid(title, ["tokens x in -> out", *(label for kind in KINDS for label in (kind, "x", "peak"))], rows)


def swiglu_grid(found: Found) -> Grid:
    rows, shown = [], next(iter(found.values()))[1]
    for name, (_, names, seconds) in found.items():
        times = [f"{1e3 * float(seconds[:, i].median()):.2f}" for i in range(len(names))]
        rows.append([name, *times, *(f"{ratio(seconds, names, other, FUSED):.2f}" for other in names[1:])])
    return Grid("SwiGLU in the GEMM's epilogue, ms, bf16", ["tokens x hidden -> 2 ffn", *shown, *(f"x {n}" for n in shown[1:])], rows)


def possible(found: Found, peak: float | None, kinds: tuple[str, ...]) -> str:
    """What a kernel at the peak would reach."""
    if peak is None:
        return ""
    rates = [gflops(case, names, seconds, f"{kind} torch") for case, names, seconds in found.values() for kind in kinds]
    return f" (at the measured peak it would be {peak / mean(rates):.2f})"


def verdicts(found: Found, peak: float | None) -> list[Verdict]:
    """The bars, on the bf16 cases."""
    three = KINDS[:3]
    ratios = {(title, kind): x for kind in three for title, x in speedup(found, kind).items()}
    slowest = min(ratios, key=lambda key: ratios[key])
    total = f"bf16 forward, input and weight gradient / torch, geometric mean{possible(found, peak, three)}"
    into = f"bf16 weight gradient into fp32 / torch, geometric mean{possible(found, peak, KINDS[3:])}"
    return [
        Verdict(total, mean(list(ratios.values())), at_least=1.4),
        Verdict(f"the slowest of these, {slowest[1]} of {slowest[0]}", ratios[slowest], at_least=0.9),
        Verdict(into, mean(list(speedup(found, KINDS[3]).values())), at_least=1.8),
    ]


def main(repeats: int = 7, threads: int = 0) -> None:
    """Measures, prints, writes results/linear.json.

    Args:
        repeats: measurements of each contender, at least 7.
        threads: of each contender; 0 means one for each core that this process may use.
    """
    threads = threads or len(os.sched_getaffinity(0))
    missing, peaks = {}, list[Peak]()

    def look() -> None:
        try:
            peaks.append(measure_peak(threads))
        except RuntimeError as why:
            missing["measured peak"] = str(why)

    look()
    main_cases = [Case(t, n, out, torch.bfloat16) for n, out in SHAPES for t in TOKENS]
    others = {dtype: [Case(*sizes, dtype) for sizes in OTHERS] for dtype in (torch.float32, torch.float16)}
    halves = [Case(t, n, 2 * ffn, torch.bfloat16) for t, n, ffn in SWIGLU]
    plan = [(case, False) for case in [*main_cases, *others[torch.float32], *others[torch.float16]]] + [(case, True) for case in halves]
    results = start(1, measure_all, plan, threads, repeats, True)[0]
    look()
    by_case = {}
    for (case, _), (names, listed) in zip(plan, results, strict=True):
        by_case[case] = (case, names, torch.tensor(listed, dtype=torch.float64))
    bf16, fp32 = (max(getattr(p, name) for p in peaks) if peaks else None for name in ("bf16", "fp32"))
    found: Found = {str(case): by_case[case] for case in main_cases}
    grids = [grid(found, bf16, f"bf16, {threads} threads, GFLOP/s" + (f"; peak {bf16:.0f}" if bf16 else ""))]
    for dtype, cases in others.items():
        title = f"{NAMES[dtype]}, GFLOP/s" + (f"; peak of fp32 {fp32:.0f}" if fp32 else "")
        grids.append(grid({str(case): by_case[case] for case in cases}, fp32, title))
    halves_found: Found = {str(case): by_case[case] for case in halves}
    grids.append(swiglu_grid(halves_found))
    if COMPILED not in by_case[halves[0]][1]:
        missing[COMPILED] = "torch.compile finds no working C++ compiler"
    samples: dict[str, Any] = {"threads": threads, "peaks": [[p.fp32, p.bf16] for p in peaks]}
    for case, names, seconds in by_case.values():
        samples[f"{NAMES[case.dtype]} {case}"] = {"names": names, "seconds": seconds.tolist()}
    report("linear", grids, verdicts(found, bf16), missing, samples)


if __name__ == "__main__":
    tyro.cli(main)
