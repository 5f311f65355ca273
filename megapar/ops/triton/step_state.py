"""Formula: megapar/ops/step_state.py. One program of one warp; all in fp64.

1 - beta^step is not taken from the power, which near 1 leaves few of its digits, but kept as it is, q(n) = 1 - beta^n, by

    q(2 n) = q(n) (2 - q(n))        q(n + 1) over the bits of the step:  q(a + b) = q(a) + (1 - q(a)) q(b)

Nothing cancels, and no error grows: each of the at most 53 levels adds 4 roundings of 2^-53, so that q is within 2.4e-14 of its value for
any step and within 1e-14 for the first four million. No library function is called, which the interpreter would not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.multi_tensor import step_state_table
from megapar.ops.triton.launch import launch

LANES = 32


@triton.jit
def finite(x):  # type: ignore[no-untyped-def]
    """Neither inf nor NaN."""
    return (x - x) == 0


@triton.jit
def complement_of_power(beta, step):  # type: ignore[no-untyped-def]
    """1 - beta^step, elementwise, for integers below 2^53."""
    q, found, left = 1.0 - beta, tl.zeros_like(beta), step
    while tl.max(left) > 0:
        found = tl.where(left & 1 == 1, found + (1.0 - found) * q, found)
        q = q * (2.0 - q)
        left = left >> 1
    return found


@triton.jit(
    do_not_specialize=["n", "growth_interval", "hysteresis"],
    do_not_specialize_on_alignment=["scalars", "counters", "total", "count"],
)
def step_state_kernel(  # type: ignore[no-untyped-def]
    table, scalars, counters, total, count, n, max_norm: tl.float64, growth_factor: tl.float64, backoff_factor: tl.float64,
    growth_interval: tl.int64, hysteresis: tl.int64, min_scale: tl.float64, LANES: tl.constexpr,
):  # fmt: skip
    """The whole step: the six scalars, then LANES rows at a time."""
    squares, loss_scale = tl.load(total), tl.load(scalars + 3)
    skip = (tl.load(total + 1) > 0) | (not finite(squares))
    scale = 1.0 / (loss_scale * tl.load(count))
    norm = tl.sqrt(squares) * scale
    clip = tl.where(max_norm < 0, 1.0, tl.minimum(1.0, max_norm / (norm + 1e-6)))
    tl.store(scalars, (clip * scale).to(tl.float32).to(tl.float64))
    tl.store(scalars + 1, norm)
    tl.store(scalars + 2, skip.to(tl.float64))
    if growth_interval > 0:
        left = tl.where(skip, tl.load(scalars + 5) - 1, hysteresis.to(tl.float64))
        growth = tl.where(skip, 0.0, tl.load(scalars + 4) + 1)
        grows = growth >= growth_interval.to(tl.float64)
        grown = (loss_scale * growth_factor).to(tl.float32).to(tl.float64)
        # The interpreter would compare with min_scale as fp32: tests/ops/test_step_state.py::test_both_bodies_agree.
        least = tl.full((), min_scale, tl.float64)
        lowered = tl.maximum((loss_scale * backoff_factor).to(tl.float32).to(tl.float64), least)
        raised = tl.where(grows & finite(grown), grown, loss_scale)
        tl.store(scalars + 3, tl.where(skip, tl.where(left <= 0, lowered, loss_scale), raised))
        tl.store(scalars + 4, tl.where(grows, 0.0, growth))
        tl.store(scalars + 5, left)
    if skip:
        return
    for first in range(0, n, LANES):
        entry = first + tl.arange(0, LANES)
        mask = entry < n
        row = tl.load(table + entry * 3, mask=mask, other=0.0).to(tl.int64)
        beta1, beta2 = tl.load(table + entry * 3 + 1, mask=mask, other=0.0), tl.load(table + entry * 3 + 2, mask=mask, other=0.0)
        step = tl.load(counters + row * 3, mask=mask, other=0.0) + 1
        whole = step.to(tl.int64)
        tl.store(counters + row * 3, step, mask=mask)
        tl.store(counters + row * 3 + 1, 1.0 / complement_of_power(beta1, whole), mask=mask)
        tl.store(counters + row * 3 + 2, 1.0 / tl.sqrt(complement_of_power(beta2, whole)), mask=mask)


def step_state_(
    scalars: Tensor,
    counters: Tensor,
    total: Tensor,
    count: Tensor,
    rows: Sequence[int],
    beta1: Sequence[float],
    beta2: Sequence[float],
    max_norm: float | None,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    hysteresis: int,
    min_scale: float,
) -> None:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/step_state.py."""
    table = step_state_table(scalars, counters, total, count, rows, beta1, beta2).on_this_stream()
    launch(
        step_state_kernel, (1,), table, scalars, counters, total, count, len(rows), -1.0 if max_norm is None else float(max_norm),
        float(growth_factor), float(backoff_factor), growth_interval, hysteresis, float(min_scale), LANES=LANES, num_warps=1,
    )  # fmt: skip
