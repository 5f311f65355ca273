"""Sums of squares: right to the stated bounds, the same bits for every thread count and every cut of the list."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops import dispatch
from megapar.ops.grad_norm import grad_norm_
from tests.row_ops import cpu_only, drawn, examples

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half of the relative error of the sum: fp64 for fp32; 35 roundings of 2^-24 in the fp32 lanes of 16-bit gradients.
BOUND = {torch.float32: 1e-14, torch.bfloat16: 1.1e-6, torch.float16: 1.1e-6}
EDGES = [0, 1, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 16383, 16384, 16385, 65535, 65536, 65537]


def total_of(grads: list[Tensor], threads: int = 2, count_zeros: bool = False) -> list[float]:
    total = torch.zeros(3, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        grad_norm_(total, grads, count_zeros=count_zeros)
    finally:
        torch.set_num_threads(before)
    return total.tolist()


def exact(grads: list[Tensor]) -> float:
    return math.fsum(float(g.double().square().sum()) for g in grads)


tensors = st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(EDGES), st.sampled_from([1.0, 1e-3, 30.0])), max_size=6)


@settings(max_examples=examples(40), deadline=None)
@given(tensors, st.integers(0, 2**31), st.data())
def test_right_and_the_same_however_it_is_cut(specs, seed, data):
    generator = torch.Generator().manual_seed(seed)
    grads = [(drawn(n, generator=generator) * scale).to(dtype) for dtype, n, scale in specs]
    squares, nonfinite, zeros = total_of(grads)
    worst = max((BOUND[dtype] for dtype, *_ in specs), default=0)
    assert math.sqrt(squares) == pytest.approx(math.sqrt(exact(grads)), rel=worst, abs=0)
    assert (nonfinite, zeros) == (0, 0)
    for threads in (1,) if dispatch.INTERPRETED else (1, 2, 3):
        assert total_of(grads, threads)[0] == squares
    cut = data.draw(st.integers(0, len(grads)))
    total = torch.zeros(3, dtype=torch.float64)
    grad_norm_(total, grads[:cut])
    grad_norm_(total, grads[cut:])
    assert total[0] == squares


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 17, 4096, 16385, *([] if dispatch.INTERPRETED else [65537])])
def test_what_is_not_finite_is_counted(dtype, n):
    x = torch.ones(n, dtype=dtype)
    for bad in (math.inf, -math.inf, math.nan):
        for place in {0, n // 2, n - 1}:
            y = x.clone()
            y[place] = bad
            squares, nonfinite, _ = total_of([x, y, x])
            assert nonfinite == 1 and not math.isfinite(squares)
    many = x.clone()
    many[::3] = math.nan
    assert total_of([many])[1] == len(x[::3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_counted_on_request(dtype):
    x = torch.ones(70_001, dtype=dtype)
    x[::7] = 0.0
    x[1] = -0.0
    assert total_of([x, x[:10]], count_zeros=True) == [float((x != 0).sum() + (x[:10] != 0).sum()), 0, len(x[::7]) + 1 + 3]
    assert total_of([x])[2] == 0
    x[2] = math.inf
    assert total_of([x], count_zeros=True)[1:] == [1, len(x[::7]) + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-25, 1e-19, 3e-14, 1e17, 1e20, 3e38])
def test_extremes(dtype, value):
    """Squares that under- or overflow in fp32, alone and beside ordinary ones."""
    x = torch.full((20_000,), value, dtype=dtype)
    assert total_of([x])[0] == pytest.approx(exact([x]), rel=3e-6, abs=0)
    x[::4096] = 2.0
    assert total_of([x])[0] == pytest.approx(exact([x]), rel=3e-6, abs=0)
    x[4096:8192] = 0.0
    squares, nonfinite, _ = total_of([x])
    assert squares == pytest.approx(exact([x]), rel=3e-6, abs=0) and nonfinite == 0


def test_float16_to_its_ends():
    x = torch.tensor([65504.0, 2.0**-24] * 5000, dtype=torch.float16)
    assert total_of([x])[0] == pytest.approx(exact([x]), rel=3e-6)


def test_layouts():
    """Views that are not contiguous, single numbers, nothing at all."""
    x = torch.randn(300, 500)
    assert total_of([x.t(), x[:, ::3], x[0, 0], x[:, :0]])[0] == pytest.approx(exact([x, x[:, ::3], x[0, 0]]), rel=1e-12)
    assert total_of([]) == [0, 0, 0]
    assert total_of([x.double()])[0] == pytest.approx(exact([x]), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 1])
def test_nothing_beyond_the_end_is_read(dtype, start):
    """Nor before the start: ones among NaNs."""
    for n in (1, 4, 5, 7, 12, 16387):
        x = torch.full((n + 32,), math.nan, dtype=dtype)
        x[8 + start : 8 + start + n] = 1.0
        assert total_of([x[8 + start : 8 + start + n]], count_zeros=True) == [n, 0, 0]


@cpu_only
def test_more_elements_than_fit_in_32_bits():
    """Untouched zero pages: 4 GiB of addresses, no memory."""
    x = torch.from_numpy(np.zeros(2**31 + 70_000, dtype=np.int16)).view(torch.bfloat16)
    x[-1], x[2**31 - 1] = 3.0, 2.0
    assert total_of([x])[0] == 13.0


def test_refusals():
    total = torch.zeros(3, dtype=torch.float64)
    for bad, message in (
        (torch.ones(2, dtype=torch.int32), "a gradient has dtype Int"),
        (torch.ones(2, dtype=torch.complex64), "dtype Complex"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.megapar.grad_norm_(total, [torch.ones(2), bad])
    for bad in (torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"total is .* and must be contiguous float64 \[3\]"):
            torch.ops.megapar.grad_norm_(bad, [torch.ones(2)])
    assert total.tolist() == [0, 0, 0]


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="about a Triton kernel that is given a large tensor's partial sums without it")
def test_more_partial_sums_than_lanes():
    from megapar.ops.triton.grad_norm import LANES, NORM_CHUNK, tensors_kernel

    count = 2 * LANES + 5
    table = torch.tensor([[0, 3 * NORM_CHUNK, 0], [0, count * NORM_CHUNK - 1, 3]])
    partials = torch.arange(3 * (count + 3), dtype=torch.float64).view(-1, 3)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    tensors_kernel[(2,)](table, partials, sums, CHUNK=NORM_CHUNK, LANES=LANES)
    assert torch.equal(sums, torch.stack([partials[:3].sum(0), partials[3:].sum(0)]))


def test_opcheck():
    grads = [torch.randn(33), torch.randn(5, 7).bfloat16()]
    torch.library.opcheck(torch.ops.megapar.grad_norm_.default, (torch.zeros(3, dtype=torch.float64), grads))


@cpu_only
@pytest.mark.skipif("MEGAPAR_CPU_ISA" in os.environ, reason="runs under one instruction set")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    """This file and that of adamw_ again, with a lower instruction set than this processor's."""
    files = [__file__, str(Path(__file__).with_name("test_adamw.py"))]
    environment = {**os.environ, "MEGAPAR_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", *files, "-k", "not steps and not opcheck and not fit_in_32_bits"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout[-3000:]
