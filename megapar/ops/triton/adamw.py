"""Formula and bytes: megapar/ops/adamw.py. Rounding and noise bit for bit as in csrc/common/adamw.inl.

A program takes one chunk of one tensor, a thread eight elements at a time (megapar/ops/triton/multi_tensor.py says why). 4 warps are 1024
elements, which leave all 7 streams of 128 bits in flight and take 48 to 64 registers: half of the warps a multiprocessor can hold, and four
times the loads in flight that memory needs. The square root is good to 2^-23 and the quotient to 2 ulp: with these the bound of
tests/ops/test_adamw.py still holds, and both cost one instruction of the special function unit.

What changes from step to step is an argument by value, or read on the device: no step compiles or uploads anything. lr and weight_decay are
float64, so that what is computed from them is rounded to fp32 once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.dispatch import INTERPRETED
from megapar.ops.multi_tensor import CHUNK, adamw_tables, bump_versions, constant
from megapar.ops.specs import Spec, check_lr_scale, check_rates
from megapar.ops.triton.floats import round_to, widen
from megapar.ops.triton.hash import mix64
from megapar.ops.triton.launch import launch
from megapar.ops.triton.multi_tensor import POINTEE, load_halves, pointer, store_halves

NUM_WARPS = 4
ROWS = CHUNK // 8 if INTERPRETED else 32 * NUM_WARPS
"""Of eight elements, at a time. The interpreter's time goes by operations, so it takes a chunk at once."""


@triton.jit
def mix(x):  # type: ignore[no-untyped-def]
    """MurmurHash3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def noise(at, place, key, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """32 random bits for elements `at`, below CHUNK, of a chunk; place as `place_of` has it."""
    first, room, columns, gap = place
    # Rows of the logical tensor that end before the element. x // columns, of x and columns up to 4096, in fp32: (x + 1/2) / columns is
    # at least 1 / (2 * 4096) from an integer times the rounding's 2^11, tests/ops/test_adamw.py::test_any_sharding_rounds_alike.
    beyond = (at - room).to(tl.float32) + 0.5
    ends = tl.where(at < room, 0, 1 + (beyond * (1.0 / columns.to(tl.float32))).to(tl.int32))
    index = first + at + ends * gap
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    return mix(mix(low ^ key.to(tl.uint32)) + (high ^ (key >> 32).to(tl.uint32)))


@triton.jit
def nothing(x):  # type: ignore[no-untyped-def]
    """0 for each element of fp32 x, laid out as x is. Without it the compiler lays the noise out as it likes, and converts it through
    shared memory where it meets the moments. That this is 0 is found, and the instructions taken away, after layouts have been chosen."""
    return ((x.to(tl.uint32, bitcast=True) >> 16) >> 16).to(tl.int32)


@triton.jit
def place_of(entry, start, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the chunk that begins at element `start`: its first index in the logical tensor, how many elements are left in that row of it,
    how long a row is (both at most CHUNK), and how far the end of one row is from the start of the next."""
    base, columns, stride = tl.load(entry + 8), tl.load(entry + 9), tl.load(entry + 10)
    row = start // columns
    column = start - row * columns
    room = tl.minimum(columns - column, CHUNK).to(tl.int32)
    return base + row * stride + column, room, tl.minimum(columns, CHUNK).to(tl.int32), stride - columns


@triton.jit
def update(g, w, m, v, coefficients):  # type: ignore[no-untyped-def]
    """adamw_update of csrc/common/adamw.inl: the new weight and moments."""
    grad_scale, rate1, rate2, step_size, root_scale, eps, decay, l2 = coefficients
    g = g * grad_scale + w * l2
    m = m + (g - m) * rate1
    v = v + (g * g - v) * rate2
    return w - w * decay - m * step_size / (tl.sqrt(v) * root_scale + eps), m, v


@triton.jit
def join_remainder(high, low):  # type: ignore[no-untyped-def]
    """fp32 of its two halves of 16 bits."""
    high, low = high.to(tl.uint32), low.to(tl.uint32)
    return (((high << 16) | low) - ((low & 0x8000) << 1)).to(tl.float32, bitcast=True)


@triton.jit
def upper(x):  # type: ignore[no-untyped-def]
    """Rounded half away from zero; a NaN does not round, 0x7FFFFFFF would become -0."""
    u = x.to(tl.uint32, bitcast=True)
    return (tl.where(x != x, u, u + 0x8000) >> 16).to(tl.uint16)


@triton.jit
def lower(x):  # type: ignore[no-untyped-def]
    """The remainder of an fp32 weight."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF).to(tl.uint16)


@triton.jit
def rounded(x, random, dtype: tl.constexpr, DRAWN: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 x in `dtype`; DRAWN, to bf16 up with the probability that 16 bits realise. Infinities and NaNs stay."""
    if DRAWN and dtype == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        high = tl.where((u & 0x7F800000) == 0x7F800000, u, u + random) >> 16
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return round_to(x, dtype)


@triton.jit
def store_state(p, a, b, random_a, random_b, row, left, WHOLE: tl.constexpr, DRAWN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is kept in the pointer's dtype alone."""
    dtype: tl.constexpr = p.dtype.element_ty
    store_halves(p, rounded(a, random_a, dtype, DRAWN), rounded(b, random_b, dtype, DRAWN), row, left, WHOLE)


@triton.jit
def step_rows(  # type: ignore[no-untyped-def]
    weight, grad, master, exp_avg, exp_avg_sq, row, left, coefficients, place, key, master_dtype: tl.constexpr, DRAWN: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The step of the elements of `row`, eight a row."""
    g0, g1 = load_halves(grad, row, left, WHOLE)
    m0, m1 = load_halves(exp_avg, row, left, WHOLE)
    v0, v1 = load_halves(exp_avg_sq, row, left, WHOLE)
    if master_dtype == tl.uint16:
        high0, high1 = load_halves(weight, row, left, WHOLE)
        low0, low1 = load_halves(master, row, left, WHOLE)
        w0, w1 = join_remainder(high0, low0), join_remainder(high1, low1)
    elif master_dtype == tl.float32:
        w0, w1 = load_halves(master, row, left, WHOLE)
    else:
        w0, w1 = load_halves(weight, row, left, WHOLE)
    w0, m0, v0 = update(widen(g0), widen(w0), widen(m0), widen(v0), coefficients)
    w1, m1, v1 = update(widen(g1), widen(w1), widen(m1), widen(v1), coefficients)
    random0, random1 = 0, 0
    if DRAWN:
        at = row[:, None] * 8 + tl.arange(0, 4)[None, :]
        random0, random1 = noise(at + nothing(m0), place, key, CHUNK), noise(at + 4 + nothing(m1), place, key, CHUNK)
        store_state(exp_avg, m0, m1, random0 >> 16, random1 >> 16, row, left, WHOLE, True)
        store_state(exp_avg_sq, v0, v1, mix(random0) & 0xFFFF, mix(random1) & 0xFFFF, row, left, WHOLE, True)
    else:
        store_state(exp_avg, m0, m1, 0, 0, row, left, WHOLE, False)
        store_state(exp_avg_sq, v0, v1, 0, 0, row, left, WHOLE, False)
    if master_dtype == tl.uint16:
        store_halves(weight, upper(w0), upper(w1), row, left, WHOLE)
        store_halves(master, lower(w0), lower(w1), row, left, WHOLE)
    elif master_dtype == tl.float32:
        store_halves(master, w0, w1, row, left, WHOLE)
        store_state(weight, w0, w1, 0, 0, row, left, WHOLE, False)
    else:
        store_state(weight, w0, w1, random0 & 0xFFFF, random1 & 0xFFFF, row, left, WHOLE, DRAWN)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["scalars", "counters", "lr_scale"])
def adamw_kernel(  # type: ignore[no-untyped-def]
    table, chunks, scalars, counters, lr_scale, lr: tl.float64, weight_decay: tl.float64, rate1, rate2, eps, l2, seed: tl.int64,
    weight_dtype: tl.constexpr, grad_dtype: tl.constexpr, master_dtype: tl.constexpr, moment_dtype: tl.constexpr,
    ALIGNED: tl.constexpr, DRAWN: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A chunk of one tensor, or nothing where the step is skipped."""
    if tl.load(scalars + 2) != 0:
        return
    program = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(chunks + 2 * program).to(tl.int64) * 11
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    left = tl.minimum(tl.load(entry + 5) - start, CHUNK).to(tl.int32)
    counter = counters + tl.load(entry + 6) * 3
    lr = lr * tl.load(lr_scale)
    coefficients = (
        tl.load(scalars).to(tl.float32), rate1, rate2, (lr * tl.load(counter + 1)).to(tl.float32), tl.load(counter + 2).to(tl.float32),
        eps, (lr * weight_decay).to(tl.float32), l2,
    )  # fmt: skip
    place, key = 0, 0
    if DRAWN:
        place = place_of(entry, start, CHUNK)
        key = mix64(seed.to(tl.uint64) + 0x9E3779B97F4A7C15) + tl.load(counter).to(tl.int64).to(tl.uint64)
        key = mix64(mix64(key) + tl.load(entry + 7).to(tl.uint64))
    weight = pointer(entry, weight_dtype, ALIGNED) + start
    grad = pointer(entry + 1, grad_dtype, ALIGNED) + start
    master = weight
    if master_dtype is not None:
        master = pointer(entry + 2, master_dtype, ALIGNED) + start
    exp_avg = pointer(entry + 3, moment_dtype, ALIGNED) + start
    exp_avg_sq = pointer(entry + 4, moment_dtype, ALIGNED) + start
    for i in range(0, CHUNK // 8, ROWS):
        row = i + tl.arange(0, ROWS)
        step_rows(weight, grad, master, exp_avg, exp_avg_sq, row, left, coefficients, place, key, master_dtype, DRAWN, CHUNK, ALIGNED)
    if ALIGNED and left % 8 != 0:
        row = left // 8 + tl.arange(0, 1)
        step_rows(weight, grad, master, exp_avg, exp_avg_sq, row, left, coefficients, place, key, master_dtype, DRAWN, CHUNK, False)


def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: Tensor,
    counters: Tensor,
    rows: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    seed: int | None = None,
    ids: Sequence[int] = (),
    places: Sequence[int] = (),
    lr_scale: Tensor | None = None,
) -> None:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/adamw.py."""
    check_rates(lr, beta1, beta2, eps, weight_decay)
    if lr_scale is None:
        lr_scale = constant(1.0, scalars.device).on_this_stream()
    else:
        check_lr_scale(Spec.of(lr_scale), scalars.device)
    tables = adamw_tables(weights, grads, masters, exp_avgs, exp_avg_sqs, scalars, counters, rows, seed=seed, ids=ids, places=places)
    bump_versions(weights)
    numbers = (float(lr), weight_decay if decoupled else 0.0, 1 - beta1, 1 - beta2, eps, 0.0 if decoupled else weight_decay, seed or 0)
    for group in tables.groups:
        weight, grad, master, moment = (None if dtype is None else POINTEE[dtype] for dtype in group.dtypes)
        chunks = group.chunks.on_this_stream()
        launch(
            adamw_kernel, (len(chunks),), tables.table.on_this_stream(), chunks, scalars, counters, lr_scale, *numbers,
            weight_dtype=tl.uint16 if master is tl.uint16 else weight, grad_dtype=grad, master_dtype=master, moment_dtype=moment,
            ALIGNED=group.aligned,
            DRAWN=seed is not None and torch.bfloat16 in (group.dtypes[3], None if master else group.dtypes[0]),
            CHUNK=CHUNK, ROWS=ROWS, num_warps=NUM_WARPS,
        )  # fmt: skip
