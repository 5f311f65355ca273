"""Attention, forward + backward, on two threads: megapar's CPU kernel against torch's scaled_dot_product_attention.

    python -m benchmarks.attention

q, k, v [b, heads, s, d] as the rotary positions leave them. "causal": torch knows it and skips what is masked. "documents": four in a
sequence, which a token does not look out of; "prefix": the first half of a sequence attends to itself in both directions. For these
torch is given a dense mask, made beforehand; megapar spans of keys.

ms        median of the repeats
x torch   torch's time over megapar's, median of the ratios taken within each repeat
GFLOP/s   of the products that the mask asks for, seven for each query and key that it attends to (2 d FLOPs each)
MB        largest tensors that a forward keeps for backward, beside q, k and v: torch's mask is one of them

Before timing, the gradients of both are compared with fp64's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.common import Contender, Grid, Verdict, interleaved, ratio, report, start
from megapar.batch import TokenBatch
from megapar.ops.attention import attention

OURS, TORCH = "megapar", "torch"
AGREE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative Frobenius error of a gradient against fp64."""


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    b: int
    heads: int
    kv_heads: int
    s: int
    d: int
    mask: Literal["causal", "documents", "prefix"] = "causal"

    def __str__(self) -> str:
        shape = f"{self.b} x {self.heads} x {self.s} x {self.d}"
        grouped = "" if self.heads == self.kv_heads else f", {self.kv_heads} KV heads"
        return f"{str(self.dtype).removeprefix('torch.')}, {shape}{grouped}, {self.mask}"

    @property
    def batch(self) -> TokenBatch:
        tokens, index = torch.zeros(self.b * self.s, dtype=torch.int64), torch.arange(self.s).repeat(self.b)
        segments = index * 4 // self.s if self.mask == "documents" else None
        prefix = torch.full((self.b,), self.s // 2) if self.mask == "prefix" else None
        return TokenBatch(self.b, self.s, tokens, index, segments, prefix)

    @property
    def flops(self) -> float:
        return 7 * 2 * self.d * self.heads * float(self.batch.attention_mask().sum())


def cases() -> list[Case]:
    bf16, sizes = torch.bfloat16, ((2, 8, 8, 256, 64), (1, 16, 4, 1024, 128), (1, 8, 8, 4096, 64))
    causal = [Case(dtype, *size) for dtype in (bf16, torch.float32) for size in sizes] + [Case(torch.float16, *sizes[0])]
    return causal + [Case(bf16, *sizes[1], "documents"), Case(bf16, *sizes[1], "prefix")]


def draw(case: Case, repeat: int) -> list[Tensor]:
    """Fresh q, k, v and the gradient that arrives."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    shapes = [(case.b, n, case.s, case.d) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    return [torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes]


def contender(case: Case, name: str) -> Contender:
    batch = case.batch
    causal = batch.is_causal
    spans = None if causal else batch.attention_spans()
    mask = None if causal else batch.attention_mask()

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if name == OURS:
            return attention(q, k, v, spans)
        grouped = case.heads != case.kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    def prepare(data: list[Tensor]) -> list[Tensor]:
        return [x.detach().requires_grad_(i < 3) for i, x in enumerate(data)]

    def step(data: list[Tensor]) -> tuple[Tensor, ...]:
        *qkv, dy = data
        return torch.autograd.grad(forward(*qkv), qkv, dy)

    return Contender(name, prepare, step, one_rank_threads=2, extra={"forward": forward})


def check(case: Case, found: list[Contender]) -> None:
    """Every contender's gradients against torch's in fp64."""
    data = draw(case, -1)
    exact = contender(case, TORCH)
    wanted = exact.step(exact.prepare([x.double() for x in data]))
    for one in found:
        for got, right in zip(one.step(one.prepare(data)), wanted, strict=True):
            error = float((got.double() - right).norm() / right.norm())
            assert error <= AGREE[case.dtype], f"{case}: a gradient of {one.name} is off by {error:.1e} of its norm"


def kept(case: Case, one: Contender) -> float:
    """MB that autograd keeps of a forward, without q, k and v."""
    *qkv, _ = one.prepare(draw(case, -1))
    own, found = {x.data_ptr() for x in qkv}, dict[int, int]()

    def pack(x: Tensor) -> Tensor:
        found[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        one.extra["forward"](*qkv)
    return sum(size for address, size in found.items() if address not in own) / 1e6


def measure(case: Case, repeats: int) -> tuple[list[list[float]], list[float]]:
    """In one rank: seconds [repeats, contenders], and MB kept."""
    torch.set_num_threads(2)
    found = [contender(case, name) for name in (OURS, TORCH)]
    check(case, found)
    inner = max(1, int(2e9 / case.flops))
    return interleaved(found, partial(draw, case), repeats=repeats, inner=inner)[0].tolist(), [kept(case, one) for one in found]


def main(repeats: int = 9) -> None:
    """Measures, prints, writes results/attention.json.

    Args:
        repeats: measurements of each contender, at least 7.
    """
    rows, bars, samples, names = [], [], dict[str, Any](), [OURS, TORCH]
    for case in cases():
        listed, memory = start(1, measure, case, repeats)[0]
        seconds = torch.tensor(listed, dtype=torch.float64)
        ours, theirs = seconds.median(dim=0).values.tolist()
        faster = ratio(seconds, names, TORCH, OURS)
        speed = [f"{case.flops / x / 1e9:.0f}" for x in (ours, theirs)]
        rows.append([str(case), f"{1e3 * ours:.2f}", f"{1e3 * theirs:.2f}", f"{faster:.2f}", *speed, *(f"{x:.1f}" for x in memory)])
        bars.append(Verdict(f"{case}: torch / megapar", faster, at_least=1.0))
        samples[str(case)] = {"names": names, "seconds": listed, "mb": memory}
    columns = ["forward + backward", "ms", "torch ms", "x torch", "GFLOP/s", "torch's", "MB kept", "torch's"]
    report("attention", [Grid("Attention, two threads", columns, rows)], bars, {}, samples)


if __name__ == "__main__":
    tyro.cli(main)
