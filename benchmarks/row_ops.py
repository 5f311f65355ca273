"""The memory-bound ops around the GEMMs, forward + backward in bf16, against the way people write them, and against memory itself.

    python -m benchmarks.row_ops

One process, two threads. Each op at a realistic size and at one that fits in cache:

rms_norm       y, s = rms_norm(x + residual), both used later; the peers write s = x + residual; F.rms_norm(s, ...)
swiglu         of the fused gate and up projection; the peers write F.silu(gate) * up
rope           q, k, v of the fused projection, as [b, heads, s, d]; the peers split, transpose and write q * cos + rotate_half(q) * sin
cross_entropy  sum of the losses; the peers write F.cross_entropy(logits.float(), target, reduction="sum")

us           microseconds of forward + backward through autograd, median of the repeats
x eager, x compiled   time of the peer over megapar's, median of the ratios taken within each repeat
GB/s         the bytes of the op's formula (megapar/ops/<op>.py, forward and backward) over megapar's time
of copy      time to copy tensors of as many bytes (half read, half written, nothing allocated), over megapar's time

Autograd's own work is in every time. The allocator keeps memory instead of returning it to the system, for all contenders: otherwise
most of the time of the large sizes is page faults. Before timing, the gradients of all contenders are compared with
fp64's. A compiled peer that fails is named as missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.common import Contender, Grid, Verdict, interleaved, ratio, report, start
from benchmarks.plain_llama import rotary, rotate_half
from megapar.layers.cross_entropy import vocab_parallel_cross_entropy
from megapar.ops.rms_norm import rms_norm
from megapar.ops.rope import rope_angles, rope_qkv
from megapar.ops.swiglu import swiglu

OURS, EAGER, COMPILED, COPY = "megapar", "eager", "compiled", "copy"
EPS, D = 1e-6, 64
AGREE = 2.0**-5
"""Relative Frobenius error of a gradient against fp64: the eager peers round several times to bf16, each 2^-8 at most."""
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One op at one size: shapes of the inputs that need gradients, the formula's bytes, and ways to compute it from (inputs, t)."""

    op: str
    size: str
    t: int
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    ours: Function
    peer: Function

    def __str__(self) -> str:
        return f"{self.op}, {self.size}"


def cases() -> list[Case]:
    """Large ones, then those in cache."""
    found = []
    for t, h, f, heads, v in ((2048, 1024, 2816, (16, 4), 32768), (512, 512, 512, (4, 2), 512)):
        width = (heads[0] + 2 * heads[1]) * D
        found += [
            Case("rms_norm", f"{t} x {h}", t, ((t, h), (t, h), (h,)), 8 * t * h * 2, our_norm, plain_norm),
            Case("swiglu", f"{t} x 2 * {f}", t, ((t, 2 * f),), 8 * t * f * 2, swiglu, plain_swiglu),
            Case("rope", f"{t} x {width}", t, ((t, width),), 4 * t * width * 2, partial(our_rope, heads), partial(plain_rope, heads)),
            Case("cross_entropy", f"{t} x {v}", t, ((t, v),), 3 * t * v * 2, our_cross_entropy, plain_cross_entropy),
        ]
    return found


def our_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return rms_norm(x, weight, EPS, residual)


def plain_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.rms_norm(s, weight.shape, weight, EPS), s


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def our_rope(heads: tuple[int, int], qkv: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return rope_qkv(qkv, cos, sin, b=1, q_heads=heads[0], kv_heads=heads[1])


def plain_rope(heads: tuple[int, int], qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.view(1, len(qkv), -1, D).transpose(1, 2).split((heads[0], heads[1], heads[1]), dim=1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v


def our_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(logits, target, tp=None, vocab_size=logits.shape[1]).sum()


def plain_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target, reduction="sum")


def constants(case: Case, name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What else the op takes: the angles, each contender's in the form it wants them; the targets."""
    if case.op == "rope":
        if name == OURS:
            return rope_angles(torch.arange(case.t), D, 10000.0)
        cos, sin = rotary(case.t, D)
        return cos.to(dtype), sin.to(dtype)
    if case.op == "cross_entropy":
        return (torch.randint(0, case.shapes[0][1], (case.t,), generator=torch.Generator().manual_seed(1)),)
    return ()


def draw(case: Case, repeat: int) -> list[Tensor]:
    """Fresh inputs, and the seed of the gradients that arrive."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in case.shapes]


def outputs_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def arriving_at(outputs: list[Tensor], dtype: torch.dtype) -> list[Tensor] | None:
    """The gradients from behind the op: none for a loss."""
    if outputs[0].dim() == 0:
        return None
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(z.shape, generator=generator).bfloat16().to(dtype) for z in outputs]


def contender(name: str, case: Case, function: Function, dtype: torch.dtype = torch.bfloat16) -> Contender:
    more = constants(case, name, dtype)
    arriving: list[Any] = []

    def prepare(data: list[Tensor]) -> list[Tensor]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in data]
        if not arriving:
            arriving.append(arriving_at(outputs_of(function(*inputs, *more)), dtype))
        return inputs

    def step(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        # Not backward(): a leaf copies a gradient that it shares with another leaf, as x and the residual would.
        return torch.autograd.grad(outputs_of(function(*inputs, *more)), inputs, arriving[0])

    return Contender(name, prepare, step, one_rank_threads=2)


def contenders(case: Case) -> list[Contender]:
    """megapar, the peer eager and compiled, and a copy of the formula's bytes."""
    torch._dynamo.reset()
    source = torch.ones(case.bytes // 2, dtype=torch.uint8)
    copy = torch.empty_like(source)
    return [
        contender(OURS, case, case.ours),
        contender(EAGER, case, case.peer),
        contender(COMPILED, case, torch.compile(case.peer, dynamic=False)),
        Contender(COPY, lambda data: source, lambda x: copy.copy_(x), one_rank_threads=2),
    ]


def check(case: Case, found: Sequence[Contender]) -> None:
    """Every contender's gradients against the peer's in fp64."""
    data = draw(case, -1)
    exact = contender("exact", case, case.peer, torch.float64)
    wanted = exact.step(exact.prepare(data))
    for one in found:
        if one.name == COPY:
            continue
        for got, right in zip(one.step(one.prepare(data)), wanted, strict=True):
            error = float((got.double() - right).norm() / right.norm())
            assert error <= AGREE, f"{case}: a gradient of {one.name} is off by {error:.1e} of its norm, above {AGREE:.1e}"


def measure(case: Case, repeats: int, milliseconds: float) -> tuple[list[str], list[list[float]], dict[str, str]]:
    """In one rank: (names, seconds [repeats, contenders], what is missing and why)."""
    torch.set_num_threads(2)
    found, missing = contenders(case), {}
    try:
        check(case, found[2:3])
    except Exception as error:
        missing[f"{COMPILED}, {case}"] = f"{type(error).__name__}: {error}".splitlines()[0]
        del found[2]
    check(case, found)
    # bytes / 10 GB/s is about a step.
    inner = max(2, int(milliseconds * 1e-3 * 1e10 / case.bytes))
    seconds = interleaved(found, partial(draw, case), repeats=repeats, inner=inner)
    return [c.name for c in found], seconds[0].tolist(), missing


def row(case: Case, names: list[str], seconds: Tensor) -> list[str]:
    ours = float(seconds[:, names.index(OURS)].median())
    times = [f"{1e6 * float(seconds[:, names.index(n)].median()):.0f}" if n in names else "missing" for n in (OURS, EAGER, COMPILED)]
    ratios = [f"{ratio(seconds, names, n, OURS):.2f}" if n in names else "" for n in (EAGER, COMPILED, COPY)]
    return [str(case), *times, *ratios[:2], f"{case.bytes / ours / 1e9:.1f}", ratios[2]]


def verdicts(case: Case, names: list[str], seconds: Tensor) -> list[Verdict]:
    """The bars: three times as fast as eager, no slower than compiled."""
    bars = ((EAGER, 3.0), (COMPILED, 1.0))
    return [Verdict(f"{case}: {n} / {OURS}", ratio(seconds, names, n, OURS), at_least=bar) for n, bar in bars if n in names]


def main(repeats: int = 9, milliseconds: float = 10.0, only: str = "") -> None:
    """Measures, prints, writes results/row_ops.json.

    Args:
        repeats: measurements of each contender, at least 7.
        milliseconds: about how long one measurement takes.
        only: run the cases whose name contains this.
    """
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}
    rows, bars, missing, samples = [], [], {}, {}
    for case in cases():
        if only not in str(case):
            continue
        names, listed, absent = start(1, measure, case, repeats, milliseconds)[0]
        seconds = torch.tensor(listed, dtype=torch.float64)
        rows.append(row(case, names, seconds))
        bars += verdicts(case, names, seconds)
        missing |= absent
        samples[str(case)] = {"names": names, "seconds": listed}
    columns = ["forward + backward", f"{OURS} us", f"{EAGER} us", f"{COMPILED} us", "x eager", "x compiled", "GB/s", "of copy"]
    report("row_ops", [Grid("Row ops: bf16, two threads", columns, rows)], bars, missing, samples)


if __name__ == "__main__":
    tyro.cli(main)
