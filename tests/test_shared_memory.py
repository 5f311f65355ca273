"""Memory between the ranks of a host: what is read is what was posted, whoever is slow, and no rank waits for a dead one."""

import os
import random
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megapar import ParallelMesh, shared_memory
from megapar.mesh import REDUCE, Axis
from megapar.shared_memory import FOLDER, RING, SharedMemory, process_is_gone
from megapar.transport import start_all_gather, start_all_reduce, start_gather, start_reduce_scatter
from tests.ranks import RankError

SHARED = pytest.mark.skipif(shared_memory._host() == 0, reason="this processor or system shares no memory between ranks")


def memory_of(axis: Axis) -> SharedMemory:
    return axis.memory[0]


def stress(world: int, rounds: int) -> None:
    """Random sizes, several under way, waits out of order, and ranks that fall behind at random: a slot reused early would show."""
    tp = ParallelMesh(tp=world).tp
    plan, delays = random.Random(0), random.Random(tp.rank)
    number = 0
    for _ in range(rounds):
        sizes = [plan.choice([1, 3, 1000, 50_000]) for _ in range(plan.randint(1, 2 * RING))]
        order = plan.sample(range(len(sizes)), len(sizes))
        pending = []
        for size in sizes:
            number += 1
            pending.append((start_all_gather(torch.full((size,), float(number * world + tp.rank)), tp), size, number))
            if delays.random() < 0.1:
                time.sleep(0.002)
        for i in order:
            result, (_, size, told) = pending[i][0].wait(), pending[i]
            assert torch.equal(result, torch.arange(told * world, (told + 1) * world).float().repeat_interleave(size))


@SHARED
@pytest.mark.parametrize("world", [2, 4])
def test_stress(ranks, world):
    ranks.run(world, stress, world, 60)


def limits() -> None:
    """Just what fits goes through the memory, one element more does not; the sums are the same bits."""
    tp = ParallelMesh(tp=2).tp
    fits = memory_of(tp).slot // 4
    for size, through in ((fits, 1), (fits + 1, 0)):
        before = memory_of(tp)._started
        x = torch.randn(size, generator=torch.Generator().manual_seed(tp.rank))
        expected = sum(torch.randn(size, generator=torch.Generator().manual_seed(r)) for r in range(2))
        assert torch.equal(start_all_reduce(x, tp).wait(), expected)
        assert memory_of(tp)._started - before == through


@SHARED
def test_limits(ranks):
    ranks.run(2, limits)


def made(broken: str) -> bool:
    """Whether the axis shares memory, when something about it fails on one rank; it must work either way."""
    stand_ins = {"host": (1, "_host", lambda: 12345), "room": (0, "_create", lambda total: 0), "map": (1, "_map", lambda path, total: None)}
    rank, name, stand_in = stand_ins.get(broken, (None, "_host", None))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(shared_memory, name, stand_in)
        tp = ParallelMesh(tp=2).tp
    assert start_all_reduce(torch.ones(3), tp).wait().tolist() == [2.0] * 3
    return 0 in tp.memory


@SHARED
def test_ranks_agree_to_share(ranks):
    before = set(FOLDER.glob("megapar-*"))
    assert ranks.run(2, made, "") == [True, True]
    for broken in ("host", "room", "map"):
        assert ranks.run(2, made, broken) == [False, False]
    left, deadline = set(FOLDER.glob("megapar-*")) - before, time.monotonic() + 5
    while any(file.exists() for file in left) and time.monotonic() < deadline:  # other tests' files come and go too
        time.sleep(0.01)
    assert not [file for file in left if file.exists()], "the file lives only until it is mapped"


def write(rows: torch.Tensor, columns: slice, parts: list[torch.Tensor]) -> None:
    for row, part in zip(rows, parts, strict=True):
        assert (row[columns] == -1).all(), "once"
        row[columns] = part


def in_pieces(world: int) -> None:
    """Larger than a slot, along dp, two of each under way: reductions and gathers of one value a column, of a dtype that the sum widens."""
    dp = ParallelMesh().dp
    memory, slot = dp.memory[REDUCE], dp.memory[REDUCE].slot
    for size in (slot // 2 + 3, 3 * slot + 1):
        before = memory._started
        mine = [torch.arange(world * size).bfloat16() * (dp.rank + 1) + k for k in range(2)]
        reductions = [start_reduce_scatter(x, dp, dtype=torch.float32, tag=REDUCE) for x in mine]
        found = [torch.full((world, size), -1) for _ in range(2)]
        gathers = [start_gather(torch.arange(size) * (dp.rank + 1) + k, dp, partial(write, found[k]), subject=k + 1) for k in range(2)]
        for k in range(2):
            columns = torch.arange(dp.rank * size, (dp.rank + 1) * size)
            terms = [(torch.arange(world * size).bfloat16() * (r + 1) + k)[columns].float() for r in range(world)]
            assert torch.equal(reductions[k].wait(), sum(terms[1:], terms[0]))
            gathers[k].wait()
            assert torch.equal(found[k], torch.stack([torch.arange(size) * (r + 1) + k for r in range(world)]))
        assert memory._started - before >= 2 * (2 * (world - 1) * size // slot)


@SHARED
@pytest.mark.parametrize("world", [2, 3])
def test_large_ones_go_in_pieces(ranks, world):
    ranks.run(world, in_pieces, world)


def waits_for(what: str) -> str:
    """Rank 1 dies or dawdles; what rank 0, which waits for it, is told, and how long that takes."""
    tp = ParallelMesh(tp=2, timeout=timedelta(seconds=1)).tp
    start_all_reduce(torch.ones(1), tp).wait()
    begin = time.monotonic()
    if tp.rank == 1:
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)
        return ""
    try:
        start_all_reduce(torch.ones(1), tp).wait()
    except RuntimeError as error:
        assert time.monotonic() - begin < 2.5
        return str(error)
    return "the collective succeeded"


@SHARED
def test_hanging_peer(ranks):
    told, _ = ranks.run(2, waits_for, "dawdles")
    assert told.startswith("rank 1 of the axis did not come within 1 s: it hangs")


@SHARED
def test_dead_peer(ranks):
    with pytest.raises(RankError) as error:
        ranks.run(2, waits_for, "dies")
    assert set(error.value.errors) == {1}, "rank 0 came back by itself"


def test_process_is_gone():
    assert not process_is_gone(os.getpid())
    child = os.fork()
    if child == 0:
        os._exit(0)
    deadline = time.monotonic() + 5
    while not process_is_gone(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process_is_gone(child), "ended, not yet waited for"
    os.waitpid(child, 0)
    assert process_is_gone(child)
    assert not Path(f"/proc/{child}").exists()


def disagree(what: str) -> str:
    """What each rank is told when their calls differ, and what a later call on the same axis says."""
    tp = ParallelMesh(tp=2).tp if what != "subject" else ParallelMesh().dp
    size = 4 if what == "size" and tp.rank == 1 else 2
    start = start_all_reduce if what == "kind" and tp.rank == 1 else start_all_gather
    if what == "subject":
        start = partial(start_gather, write=print, subject=7 + tp.rank)
    with pytest.raises(RuntimeError) as first:
        start(torch.ones(size), tp).wait()
    with pytest.raises(RuntimeError, match="an earlier collective of this axis failed"):
        start(torch.ones(1), tp)
    return str(first.value)


@SHARED
def test_disagreement_is_an_error(ranks):
    told = ranks.run(2, disagree, "size")
    assert told[0].startswith("rank 1 of the axis is in ALL_GATHER of 4 x 4 bytes, this one in ALL_GATHER of 2 x 4 bytes")
    told = ranks.run(2, disagree, "subject")
    assert told[0].startswith("rank 1 of the axis is in ALL_GATHER number 8 of 2 x 4 bytes, this one in ALL_GATHER number 7 of 2 x 4 bytes")
    assert ranks.run(2, disagree, "kind")[1].startswith("rank 0 of the axis is in ALL_GATHER of 2 x 4 bytes, this one in ALL_REDUCE")
