"""Collectives: values against the dense formula, gradients checked numerically, refusals that every rank agrees on."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megapar import Axis, ParallelMesh
from megapar.collectives import (
    all_gather_last,
    check_same,
    copy_to,
    gather_json,
    gather_last,
    gather_tokens,
    raise_together,
    reduce_from,
    scatter_tokens,
    split_last,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megapar.params import split
from tests.counting import counted

PARTS = {1: [(0, 7)], 2: [(0, 4), (4, 7)], 3: [(0, 3), (3, 5), (5, 7)], 4: [(0, 2), (2, 4), (4, 6), (6, 7)]}


def of_rank(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Integers, so that sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def values(tp: int, t: int) -> None:
    axis = ParallelMesh(tp=tp).tp
    everyone = [of_rank(r, t, 7) for r in range(tp)]
    mine, total = everyone[axis.rank], sum(everyone)
    assert torch.equal(start_all_reduce(mine.clone(), axis).wait(), total)
    assert torch.equal(start_all_gather(mine, axis).wait(), torch.cat(everyone))
    assert torch.equal(start_all_gather(mine.t(), axis).wait(), torch.cat([x.t() for x in everyone])), "not contiguous"
    c = -(-t // tp)
    padded = torch.cat([total, total.new_zeros(c * tp - t, 7)])
    expected = padded[axis.rank * c : (axis.rank + 1) * c]
    assert torch.equal(start_reduce_scatter(mine, axis).wait(), expected)
    assert torch.equal(start_reduce_scatter(mine.t().contiguous().t(), axis).wait(), expected), "not contiguous"
    start, stop = PARTS[tp][axis.rank]
    whole = everyone[0]
    for leading in (whole[:, start:stop], *whole[:1, start:stop], whole[None, :, start:stop].transpose(0, 1)):
        joined = all_gather_last(leading, axis, PARTS[tp])
        assert torch.equal(joined.reshape(-1, 7), whole[: leading.numel() // (stop - start)])
    assert torch.equal(mine, of_rank(axis.rank, t, 7)), "an input was written to"


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_values(ranks, tp):
    for t in (0, 1, 4, 7):
        ranks.run(tp, values, tp, t)


def sum_in_16_bits() -> None:
    axis = ParallelMesh(tp=3).tp
    x = torch.full((3, 2), 256.0 if axis.rank == 0 else 1.0, dtype=torch.bfloat16)
    # 256 + 1 is 256 in bf16: only a sum kept in fp32 reaches 258.
    assert torch.equal(start_reduce_scatter(x, axis).wait(), torch.full((1, 2), 258.0, dtype=torch.bfloat16))


def test_reduce_scatter_sums_in_fp32(ranks):
    ranks.run(3, sum_in_16_bits)


def rank_order() -> Tensor:
    axis = ParallelMesh(tp=4).tp
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(axis.rank))
    return start_reduce_scatter(x, axis).wait()


def test_reduce_scatter_order(ranks):
    """The sum is taken in rank order on every rank: ((0 + 1) + 2) + 3, bit for bit."""
    whole = [torch.randn(4, 1000, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    assert torch.equal(torch.cat(ranks.run(4, rank_order)), ((whole[0] + whole[1]) + whole[2]) + whole[3])


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    """The same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def gradchecks() -> None:
    """Each function of x and w is replicated: weights pass copy_to and are cut inside, results are whole on every rank."""
    axis = ParallelMesh(tp=2).tp
    features = split(3, 2)
    a, b = features[axis.rank]
    rows = slice(2 * axis.rank, 2 * axis.rank + 2)

    def copy_and_reduce(x: Tensor, w: Tensor) -> Tensor:
        return reduce_from(copy_to(x, axis).sin()[:, a:b] @ copy_to(w, axis)[a:b], axis)

    def gather(x: Tensor, w: Tensor) -> Tensor:
        return gather_last(gather_tokens(copy_to(x, axis)[rows], axis).exp() @ copy_to(w, axis)[:, a:b], axis, features)

    def scatter(x: Tensor, w: Tensor) -> Tensor:
        shard = scatter_tokens(copy_to(x, axis)[:, a:b] @ copy_to(w, axis)[a:b], axis)
        return gather_last(shard.t(), axis, [(0, 3), (3, 6)]).t()[:5]

    def cut(x: Tensor, w: Tensor) -> Tensor:
        return reduce_from(split_last(x, axis, features).sin() @ copy_to(w, axis)[a:b], axis)

    for function, t in ((copy_and_reduce, 5), (gather, 4), (scatter, 5), (cut, 5)):
        assert torch.autograd.gradcheck(function, leaves((t, 3), (3, 3))), function.__name__


def test_gradcheck(ranks):
    ranks.run(2, gradchecks)


def shared_dy() -> None:
    axis = ParallelMesh(tp=2).tp
    x, other = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    doubled = 2 * other  # made first: its backward runs last, after the all-reduce
    dy = torch.full((2, 3), 1.0 + axis.rank)
    (copy_to(x, axis) + doubled).backward(dy)
    assert torch.equal(dy, torch.full((2, 3), 1.0 + axis.rank))
    assert torch.equal(other.grad, 2 * dy)
    assert torch.equal(x.grad, torch.full((2, 3), 3.0))


def test_grad_not_modified(ranks):
    ranks.run(2, shared_dy)


def kept_input() -> None:
    axis = ParallelMesh(tp=2).tp
    x = torch.ones(2, 3)
    assert torch.equal(reduce_from(x, axis), torch.full((2, 3), 2.0))
    assert torch.equal(x, torch.ones(2, 3))
    with torch.no_grad(), counted() as calls:
        assert torch.equal(copy_to(x, axis), x)
        split_last(x, axis, [(0, 2), (2, 3)])
    assert not calls, calls


def test_input_not_modified(ranks):
    ranks.run(2, kept_input)


def strided_dy() -> None:
    """Backwards get whatever strides the next op made."""
    axis = ParallelMesh(tp=2).tp
    for function in (copy_to, gather_tokens, scatter_tokens, reduce_from):
        x = torch.zeros(4, 6, requires_grad=True)
        y = function(x, axis)
        dy = of_rank(0, *reversed(y.shape), dtype=torch.float32).t()
        y.backward(dy)
        strided, x.grad = x.grad, None
        function(x, axis).backward(dy.contiguous())
        assert torch.equal(strided, x.grad), function.__name__


def test_strided_gradients(ranks):
    ranks.run(2, strided_dy)


def test_size_one_is_identity():
    axis, x = Axis.single("tp"), torch.ones(2, 3)
    for function in (copy_to, reduce_from, gather_tokens, scatter_tokens):
        assert function(x, axis) is x
    assert gather_last(x, axis, [(0, 3)]) is x
    assert split_last(x, axis, [(0, 3)]) is x
    assert gather_json({"a": 1}, axis) == [{"a": 1}]


def layout_only() -> None:
    start_all_reduce(torch.ones(2), Axis.layout("tp", dist.get_rank(), 2))


def test_layout_axis_cannot_communicate(ranks):
    """Without the refusal the sum would silently be taken over the world, which may hold more ranks than the axis."""
    for told in ranks.errors(4, layout_only):
        assert "axis tp of size 2 only describes a layout" in told


def json_values() -> list[Any]:
    mesh = ParallelMesh(tp=3)
    return gather_json([None, {"größe": mesh.tp.rank}, "x" * 300 * mesh.tp.rank][mesh.tp.rank], mesh.tp)


def test_gather_json(ranks):
    assert ranks.run(3, json_values) == [[None, {"größe": 1}, "x" * 600]] * 3


def differing() -> None:
    mesh = ParallelMesh(tp=2)
    check_same([1, 2], mesh.tp, "the same thing")
    check_same(mesh.dp.rank, mesh.tp, "the replica")  # may differ over dp
    check_same(7 + mesh.tp.rank, mesh.tp, "the thing")


def test_check_same(ranks):
    messages = ranks.errors(4, differing)
    assert messages[2] == "the thing must be the same on all ranks of tp and differs (rank 2: 7, rank 3: 8): give each rank the same"
    assert messages[0] == messages[1] != messages[2] == messages[3]


def one_fails(kind: str) -> None:
    mesh = ParallelMesh(tp=3)
    raise_together(None, mesh.tp)
    raise_together({"1": ValueError, "2": KeyError}.get(str(mesh.tp.rank), lambda told: None)(f"rank {mesh.tp.rank} says {kind}"), mesh.tp)


def test_raise_together(ranks):
    first, second, _ = ranks.errors(3, one_fails, "no")
    assert first == second == "rank 1 says no"
