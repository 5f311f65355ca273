"""Messages through shared memory: what arrives is what was sent, whoever is slow, and no rank waits for a dead one."""

import os
import random
import signal
import time
from datetime import timedelta

import pytest
import torch

from megapar import ParallelMesh, channels, shared_memory
from megapar.channels import Channels
from megapar.mesh import Axis
from megapar.shared_memory import FOLDER
from megapar.transport import start_receive, start_send, wait
from tests.ranks import RankError

SHARED = pytest.mark.skipif(shared_memory._host() == 0, reason="this processor or system shares no memory between ranks")


def channels_of(axis: Axis) -> Channels:
    assert axis.channels is not None
    return axis.channels


def numbers(size: int, sender: int, receiver: int, number: int) -> torch.Tensor:
    """Of a message, and of no other."""
    return torch.arange(size, dtype=torch.int32) + (sender * 8 + receiver) * 1_000_000 + number * 100


def stress(world: int, capacity: int, rounds: int) -> None:
    """Of every pair some messages of random sizes and tags, asked for early, late and in another order, by ranks that fall behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels, "LARGEST_CHANNEL", capacity)
        pp = ParallelMesh(pp=world).pp
    assert channels_of(pp).capacity == capacity
    plan, delays = random.Random(0), random.Random(pp.rank)
    for number in range(rounds):
        sent = [(a, b, tag) for a in range(world) for b in range(world) for tag in range(plan.randint(0, 3)) if a != b]
        sizes = {key: plan.choice([0, 1, 16, 17, 1000, capacity // 4, capacity]) for key in sent}
        plan.shuffle(sent)
        mine = [key for key in sent if key[1] == pp.rank]
        outs = {key: torch.full((sizes[key],), -1, dtype=torch.int32) for key in mine}
        soon = [key for key in mine if delays.random() < 0.5]
        works = {key: start_receive(outs[key], pp, key[0], key[2]) for key in soon}
        for a, b, tag in sent:
            if a == pp.rank:
                start_send(numbers(sizes[a, b, tag], a, b, number), pp, b, tag)
                if delays.random() < 0.1:
                    time.sleep(0.002)
        delays.shuffle(mine)
        for key in mine:
            wait(works.get(key) or start_receive(outs[key], pp, key[0], key[2]))
            assert torch.equal(outs[key], numbers(sizes[key], key[0], key[1], number)), key


@SHARED
@pytest.mark.parametrize("world,capacity", [(2, 256), (3, 4096), (4, 64 << 10)])
def test_stress(ranks, world, capacity):
    ranks.run(world, stress, world, capacity, 40)


def both_full() -> None:
    """Each rank sends three times what a channel holds before it asks for anything."""
    pp = ParallelMesh(pp=2).pp
    size = 3 * channels_of(pp).capacity // 4
    for tag in range(2):
        start_send(numbers(size, pp.rank, 1 - pp.rank, tag), pp, 1 - pp.rank, tag)
    for tag in (1, 0):
        out = torch.empty(size, dtype=torch.int32)
        wait(start_receive(out, pp, 1 - pp.rank, tag))
        assert torch.equal(out, numbers(size, 1 - pp.rank, pp.rank, tag))


@SHARED
def test_both_full(ranks):
    ranks.run(2, both_full)


def one_tag() -> None:
    """Messages of one tag keep their order, with those of nothing between them, some here before they are asked for."""
    pp = ParallelMesh(pp=2).pp
    sizes = [3, 0, 5, 0, 70, 1]
    if pp.rank == 0:
        for number, size in enumerate(sizes):
            start_send(numbers(size, 0, 1, number), pp, 1, 7)
        start_send(torch.ones(1), pp, 1, 8)
    else:
        outs = [torch.full((size,), -1, dtype=torch.int32) for size in sizes]
        works = [start_receive(out, pp, 0, 7) for out in outs[:2]]
        wait(start_receive(torch.empty(1), pp, 0, 8))  # and with it come all of tag 7
        works += [start_receive(out, pp, 0, 7) for out in outs[2:]]
        for number, (work, out) in enumerate(zip(works, outs, strict=True)):
            wait(work)
            assert torch.equal(out, numbers(len(out), 0, 1, number))


@SHARED
def test_one_tag(ranks):
    ranks.run(2, one_tag)


def strided() -> None:
    """Any dtype, scalars, several dimensions."""
    pp = ParallelMesh(pp=2).pp
    for tag, x in enumerate([torch.tensor(3.5, dtype=torch.float64), torch.ones(3, 5).bfloat16(), torch.tensor([True, False])]):
        out = torch.zeros_like(x)
        asked = start_receive(out, pp, 1 - pp.rank, tag)
        start_send(x, pp, 1 - pp.rank, tag)
        wait(asked)
        assert torch.equal(out, x)


@SHARED
def test_dtypes(ranks):
    ranks.run(2, strided)


def made(broken: str) -> bool:
    """Whether the ranks share channels when one of them cannot: they must agree, and messages arrive either way."""
    with pytest.MonkeyPatch.context() as patch:
        if broken and int(os.environ["RANK"]) == 1:
            patch.setattr(shared_memory, "_map", lambda path, total: None)
        pp = ParallelMesh(pp=2).pp
    out = torch.empty(3)
    asked = start_receive(out, pp, 1 - pp.rank, 1)
    sent = start_send(torch.full((3,), float(pp.rank)), pp, 1 - pp.rank, 1)
    wait(asked)
    wait(sent)
    assert out.tolist() == [1.0 - pp.rank] * 3
    return pp.channels is not None


@SHARED
def test_ranks_agree_to_share(ranks):
    assert ranks.run(2, made, "") == [True, True]
    assert ranks.run(2, made, "map") == [False, False]


def waits_for(what: str, room: bool) -> str:
    """Rank 1 dies or dawdles; what rank 0, which waits for it or for room in its channel, is told, and how long that takes."""
    pp = ParallelMesh(pp=2, timeout=timedelta(seconds=1)).pp
    wait(start_send(torch.ones(1), pp, 1 - pp.rank, 1))
    wait(start_receive(torch.ones(1), pp, 1 - pp.rank, 1))
    begin = time.monotonic()
    if pp.rank == 1:
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)
        return ""
    with pytest.raises(RuntimeError) as error:
        if room:
            start_send(torch.ones(channels_of(pp).capacity), pp, 1, 2)
        else:
            wait(start_receive(torch.ones(1), pp, 1, 2))
    assert time.monotonic() - begin < 2.5
    with pytest.raises(RuntimeError, match="an earlier message of this axis failed"):
        start_send(torch.ones(1), pp, 1, 3)
    return str(error.value)


@SHARED
@pytest.mark.parametrize("room", [False, True])
def test_hanging_peer(ranks, room):
    told, _ = ranks.run(2, waits_for, "dawdles", room)
    assert told.startswith("rank 1 of the axis did not come within 1 s: it hangs")


@SHARED
@pytest.mark.parametrize("room", [False, True])
def test_dead_peer(ranks, room):
    with pytest.raises(RankError) as error:
        ranks.run(2, waits_for, "dies", room)
    assert set(error.value.errors) == {1}, "rank 0 came back by itself"


def parting(rank: int) -> list[str]:
    """Rank 1 sends two and leaves; rank 0 gets both, and for a third is told."""
    pp = ParallelMesh(pp=2).pp
    if pp.rank == 1:
        for tag in range(2):
            start_send(torch.full((2,), float(tag)), pp, 0, tag)
        channels_of(pp).leave()
        return []
    time.sleep(0.1)
    for tag in range(2):
        out = torch.empty(2)
        wait(start_receive(out, pp, 1, tag))
        assert out.tolist() == [float(tag)] * 2
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        wait(start_receive(torch.empty(2), pp, 1, 2))
    assert time.monotonic() - begin < 1
    return [str(error.value)]


@SHARED
def test_who_leaves_has_sent(ranks):
    told, _ = ranks.run(2, parting, 1)
    assert told[0].startswith("rank 1 of the axis failed and left")


def disagree(early: bool) -> str:
    pp = ParallelMesh(pp=2).pp
    if pp.rank == 1:
        start_send(torch.ones(3), pp, 0, 5)
        start_send(torch.ones(3), pp, 0, 6)
        return ""
    if early:
        wait(start_receive(torch.empty(3), pp, 1, 6))
    with pytest.raises(RuntimeError) as error:
        wait(start_receive(torch.empty(2), pp, 1, 5))
    return str(error.value)


@SHARED
@pytest.mark.parametrize("early", [False, True])
def test_disagreement_is_an_error(ranks, early):
    told, _ = ranks.run(2, disagree, early)
    assert told == "message 5 of rank 1 of the axis has 12 bytes, this rank expects 8: give all ranks the same shapes"


@SHARED
def test_nothing_is_left(ranks):
    before = set(FOLDER.glob("megapar-*"))
    ranks.run(2, one_tag)
    left, deadline = set(FOLDER.glob("megapar-*")) - before, time.monotonic() + 5
    while any(file.exists() for file in left) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [file for file in left if file.exists()]
