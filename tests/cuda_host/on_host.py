"""What tests/ops does not ask of csrc/cuda: vectors at any address, many chunks, offsets past 2^31. Run by test_kernels.py."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops import multi_tensor
from megapar.ops.adamw import Noise, adamw_, split
from megapar.ops.grad_norm import grad_norm_
from megapar.ops.specs import Spec
from tests.ops import test_adamw as adamw

F32, BF16, FP16, INT16 = torch.float32, torch.bfloat16, torch.float16, torch.int16
GUARD = 40
SIZES = [1, 7, 8, 9, 2047, 2048, 2049, 4096, 4097, 8195]
COMBINATIONS = [
    (kind, grad, moment, drawn)
    for kind, grad, moment, drawn in product(adamw.KINDS, (F32, BF16, FP16), (F32, BF16), (False, True))
    if not (drawn and kind == (FP16, None))
]


def inside(x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A copy of x, `offset` elements past a multiple of 64 bytes, and its buffer, which has GUARD elements of 1 on both sides."""
    width = x.element_size()
    buffer = torch.ones(len(x) + 2 * GUARD + 64, dtype=x.dtype)
    start = GUARD + -(buffer.data_ptr() // width + GUARD) % (64 // width) + offset
    view = buffer[start : start + len(x)]
    view.copy_(x)
    return view, buffer


def around(x: Tensor, buffer: Tensor) -> bool:
    """Whether what surrounds x in its buffer is still 1."""
    start = (x.data_ptr() - buffer.data_ptr()) // x.element_size()
    return bool((buffer[:start] == 1).all() and (buffer[start + len(x) :] == 1).all())


@pytest.mark.parametrize("combination", COMBINATIONS)
@settings(max_examples=3, deadline=None)
@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3), st.lists(st.integers(0, 7), min_size=5, max_size=5), st.integers(0, 99))
def test_any_address_has_the_same_bits(combination, sizes, offsets, seed):
    (weight, master), grad, moment, drawn = combination
    at = adamw.lists(sizes, weight, master, grad, moment, seed)
    aligned, shifted, buffers = {}, {}, []
    for (name, tensors), offset in zip(vars(at).items(), offsets, strict=True):
        both = [(inside(x, 0), inside(x, offset)) for x in tensors]
        aligned[name], shifted[name] = [a for (a, _), _ in both], [b for _, (b, _) in both]
        buffers += [pair for pairs in both for pair in pairs]
    noise = Noise(seed, [3 + i for i in range(len(sizes))]) if drawn else None
    for x in (aligned, shifted):
        adamw.step(adamw.Lists(**x), adamw.state_at(3), noise=noise)
    for name in aligned:
        assert all(torch.equal(a, b) for a, b in zip(aligned[name], shifted[name], strict=True)), name
    assert all(around(*pair) for pair in buffers), "written past an end"
    if not drawn:
        adamw.assert_right(at, adamw.Lists(**shifted), adamw.state_at(3), adamw.OPTIONS)


@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
@settings(max_examples=10, deadline=None)
@given(st.sampled_from([*SIZES, 16384, 16385, 40_000]), st.integers(0, 7), st.integers(0, 99))
def test_a_gradient_at_any_address_has_the_same_sum(dtype, n, offset, seed):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0] = 0
    totals = [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
    for total, place in zip(totals, (0, offset), strict=True):
        grad_norm_(total, [inside(x, place)[0]], count_zeros=True)
    assert torch.equal(*totals)
    assert totals[0][0].item() == pytest.approx(float(x.double().square().sum()), rel=2.2e-6)
    assert totals[0][1:].tolist() == [0, int((x == 0).sum())]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_more_chunks_than_threads(dtype):
    """A thread adds several partial sums of a tensor: chunks of 64 elements."""
    grads = [torch.randn(64 * chunks + 5, generator=torch.Generator().manual_seed(chunks)).to(dtype) for chunks in (300, 0, 255, 256)]
    grads[2][17_000 % len(grads[2])] = math.nan
    numels, first = [len(g) for g in grads], 0
    rows = []
    for grad in grads:
        rows.append([grad.data_ptr(), len(grad), first])
        first += -(-len(grad) // 64)
    table, chunks = torch.tensor(rows), multi_tensor.chunks_of(range(4), numels, 64)
    partials, sums = torch.full((first, 3), math.nan, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    total = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    torch.ops.megapar_cuda.grad_norm_chunks_(partials, table, chunks, 64, dtype, False)
    torch.ops.megapar_cuda.grad_norm_total_(total, sums, partials, table, 64)
    for i in (0, 1, 3):
        assert sums[i].tolist() == pytest.approx([float(grads[i].double().square().sum()), 0, 0], rel=2.2e-6)
    assert total[1] == 1 and total[0].isnan()


def zero_pages(n: int, dtype: torch.dtype) -> Tensor:
    """Addresses without memory."""
    return torch.from_numpy(np.zeros(n * dtype.itemsize // 2, dtype=np.int16)).view(dtype)


def test_offsets_past_32_bits():
    """The last chunk of a tensor alone: on all of them a GPU takes no time and this processor minutes."""
    n = 2**31 + 70_000
    last = torch.tensor([[0, n // 4096]], dtype=torch.int32)
    begin, state = n // 4096 * 4096, adamw.state_at(2)
    full = [zero_pages(n, dtype) for dtype in (BF16, BF16, INT16, F32, F32)]
    ends = adamw.lists([n - begin], BF16, INT16, BF16)
    for x, end in zip(full, ends.tensors(), strict=True):
        x[begin:] = end
    table = multi_tensor.adamw_rows(tuple((Spec.of(x),) for x in full), [0], (7,), (5, n, n))
    options = (1e-2, 0.9, 0.99, 1e-8, 0.1, True, None)
    torch.ops.megapar_cuda.adamw_(table, last, 4096, BF16, BF16, INT16, F32, state.scalars, state.counters, None, *options)
    adamw.step(ends, state)
    assert all(torch.equal(x[begin:], end) for x, end in zip(full, ends.tensors(), strict=True))
    assert not full[0][begin - 4096 : begin].any() and not full[0][:4096].any()
    partials = torch.zeros(1, 3, dtype=torch.float64)
    full[1][-1] = 3.0
    row = torch.tensor([[full[1].data_ptr(), n, -(n // 4096)]])
    torch.ops.megapar_cuda.grad_norm_chunks_(partials, row, last, 4096, BF16, False)
    assert partials[0, 0].item() == pytest.approx(float(full[1][begin:].double().square().sum()), rel=2.2e-6)


def test_a_number_on_the_device_moves_the_rate():
    lists = [adamw.lists([300], BF16, INT16) for _ in range(2)]
    scale = torch.tensor(0.25, dtype=torch.float64)
    for x, lr in zip(lists, (0.5, 0.125), strict=True):
        numbers = {"lr": lr, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "lr_scale": scale if lr == 0.5 else None}
        state = adamw.state_at(1)
        torch.ops.megapar.adamw_(*vars(x).values(), state.scalars, state.counters, [0], **numbers)
    assert all(torch.equal(a, b) for a, b in zip(lists[0].tensors(), lists[1].tensors(), strict=True))


def test_launchers_refuse_what_no_kernel_knows():
    state, table, chunks = adamw.state_at(1), torch.zeros(1, 11, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int32)
    rest = (state.scalars, state.counters, None, 0.1, 0.9, 0.99, 1e-8, 0.1, True, None)
    op = torch.ops.megapar_cuda.adamw_
    with pytest.raises(RuntimeError, match="the launch of adamw failed: invalid argument"):
        op(table, chunks, 4096, FP16, F32, INT16, F32, *rest)
    with pytest.raises(ValueError, match="the kernels know no Double"):
        op(table, chunks, 4096, torch.float64, F32, None, F32, *rest)
    with pytest.raises(ValueError, match="chunk_size=4100 must be a multiple of 16"):
        op(table, chunks, 4100, F32, F32, None, F32, *rest)
    with pytest.raises(ValueError, match=r"tensors is Int of shape \[1, 2\] and must be contiguous Long \[n, 11\]"):
        op(chunks, chunks, 4096, F32, F32, None, F32, *rest)


def test_a_split_master_is_the_number():
    """The pair that the kernel leaves is the one that `split` makes of the same fp32 number."""
    wide, pair = adamw.lists([4099], BF16, F32), adamw.lists([4099], BF16, INT16)
    for x in (wide, pair):
        adamw_(*vars(x).values(), adamw.state_at(1), [0], **adamw.OPTIONS)
    high, low = split(wide.masters[0])
    assert torch.equal(high, pair.weights[0]) and torch.equal(low, pair.masters[0])
