"""The collectives against their definition: values, the same bits on every rank, several under way at once."""

import itertools

import pytest
import torch

from megapar import ParallelMesh
from megapar.mesh import REDUCE, Axis
from megapar.transport import start_all_gather, start_all_reduce, start_reduce_scatter


def drawn(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def ordered_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


def values(world: int) -> list[torch.Tensor]:
    """Every collective on odd shapes and dtypes; the all-reduced tensors, for the parent to compare between ranks."""
    tp, reduced = ParallelMesh(tp=world).tp, []
    for shape, dtype in itertools.product([(5, 3), (1, 7), (8,), (3, 0), (257, 129)], [torch.float32, torch.bfloat16, torch.float64]):
        parts = [drawn(r, shape, dtype) for r in range(world)]
        x = parts[tp.rank].clone()
        gathered = start_all_gather(x, tp).wait()
        assert torch.equal(gathered, torch.cat(parts))
        c = -(-shape[0] // world)
        padded = torch.nn.functional.pad(ordered_sum(parts), (0, 0) * (len(shape) - 1) + (0, c * world - shape[0]))
        assert torch.equal(start_reduce_scatter(x, tp).wait(), padded[tp.rank * c : (tp.rank + 1) * c])
        assert torch.equal(x, parts[tp.rank]), "inputs of gather and scatter are not written to"
        total = start_all_reduce(x, tp).wait()
        assert total is x
        error = (total.double() - sum(p.double() for p in parts)).abs()
        assert bool((error <= world * torch.finfo(dtype).eps * sum(p.double().abs() for p in parts)).all())
        reduced.append(total)
    return reduced


@pytest.mark.parametrize("world", [2, 3, 4])
def test_values(ranks, world):
    first, *rest = ranks.run(world, values, world)
    for other in rest:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), "ranks hold the same bits"


def under_way(world: int) -> None:
    """Started in one order, waited for in another: each message finds its own tensor."""
    tp = ParallelMesh(tp=world).tp
    tensors = [drawn(10 * i + tp.rank, (64, 64), torch.float32) for i in range(6)]
    starts = [start_all_reduce, start_all_gather, start_reduce_scatter] * 2
    pending = [start(x.clone(), tp) for start, x in zip(starts, tensors, strict=True)]
    results: list[torch.Tensor] = [p.wait() for p in reversed(pending)][::-1]
    for i, result in enumerate(results):
        parts = [drawn(10 * i + r, (64, 64), torch.float32) for r in range(world)]
        rows = slice(tp.rank * 64 // world, (tp.rank + 1) * 64 // world)
        expected = [sum(parts), torch.cat(parts), sum(parts)[rows]][i % 3]
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_several_under_way(ranks, world):
    ranks.run(world, under_way, world)


def test_non_contiguous(ranks):
    ranks.run(2, transposed)


def transposed() -> None:
    tp = ParallelMesh(tp=2).tp
    parts = [drawn(r, (4, 6), torch.float32).t() for r in range(2)]
    assert torch.equal(start_all_gather(parts[tp.rank], tp).wait(), torch.cat(parts))
    assert torch.equal(start_reduce_scatter(parts[tp.rank], tp).wait(), (parts[0] + parts[1])[3 * tp.rank : 3 * tp.rank + 3])


@pytest.mark.parametrize("start", [start_all_reduce, start_all_gather, start_reduce_scatter])
def test_layout_axis_is_refused(start):
    with pytest.raises(ValueError, match="axis tp of size 2 only describes a layout: take the axis of a ParallelMesh"):
        start(torch.ones(2), Axis.layout("tp", 0, 2))


def sums_as_asked(world: int, axis: str) -> None:
    """dtype= is that of the sum, in rank order; the terms travel as they are. native= changes nothing on CPU."""
    mesh = ParallelMesh(tp=world if axis == "tp" else 1)
    over = mesh.tp if axis == "tp" else mesh.dp
    for shape, (sent, summed) in itertools.product(
        [(5, 3), (1, 7), (8,), (3, 0), (257, 129), (world, 1_100_003)],
        [
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float64),
        ],
    ):
        parts = [drawn(r, shape, sent) for r in range(world)]
        wide = torch.promote_types(summed, torch.float32)
        total = parts[0].to(wide)
        for part in parts[1:]:
            total = total + part.to(wide)
        c = -(-shape[0] // world)
        expected = torch.nn.functional.pad(total, (0, 0) * (len(shape) - 1) + (0, c * world - shape[0])).to(summed)
        for native, tag in ((False, 0), (True, 0), (False, REDUCE)):
            x = parts[over.rank].clone()
            got = start_reduce_scatter(x, over, dtype=summed, native=native, tag=tag).wait()
            assert got.dtype == summed and torch.equal(got, expected[over.rank * c : (over.rank + 1) * c]), (shape, sent, summed)
            assert torch.equal(x, parts[over.rank])


@pytest.mark.parametrize("world,axis", [(1, "dp"), (2, "tp"), (2, "dp"), (3, "dp"), (4, "tp")])
def test_dtype_of_the_sum(ranks, world, axis):
    """Over tp and, with the tag of gradients, over dp through shared memory, what is long in pieces; else as messages."""
    ranks.run(world, sums_as_asked, world, axis)


def tags_apart() -> None:
    """Two ranks start a reduction and a gather in opposite orders: each finds its own, as each has its tag."""
    dp = ParallelMesh().dp
    x, y = drawn(dp.rank, (8, 4), torch.float32), drawn(10 + dp.rank, (4, 4), torch.float32)

    def start(number: int) -> object:
        # Of one size, so that a message in the wrong place would be taken silently.
        return start_reduce_scatter(x, dp, tag=1) if number == 0 else start_all_gather(y, dp, tag=2)

    pending = {number: start(number) for number in ((0, 1) if dp.rank == 0 else (1, 0))}
    total = drawn(0, (8, 4), torch.float32) + drawn(1, (8, 4), torch.float32)
    assert torch.equal(pending[0].wait(), total[dp.rank * 4 : dp.rank * 4 + 4])
    assert torch.equal(pending[1].wait(), torch.cat([drawn(10, (4, 4), torch.float32), drawn(11, (4, 4), torch.float32)]))


def test_tags(ranks):
    ranks.run(2, tags_apart)


def tagged_in_order() -> None:
    """Those of one tag keep their order."""
    dp = ParallelMesh().dp
    pending = [start_reduce_scatter(torch.full((2, 3), float(i)), dp, tag=5) for i in range(20)]
    assert [float(p.wait()[0, 0]) for p in reversed(pending)] == [2.0 * i for i in reversed(range(20))]


def test_one_tag_keeps_its_order(ranks):
    ranks.run(2, tagged_in_order)
