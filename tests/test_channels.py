"""Messages through shared memory: what arrives is what was sent, whoever is slow, and no rank waits for a dead one."""

import os
import random
import signal
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megapar import ParallelMesh, channels, shared_memory
from megapar.channels import Channels, Message
from megapar.mesh import Axis
from megapar.shared_memory import FOLDER
from megapar.transport import flush, start_receive, start_send, wait
from tests.ranks import RankError

SHARED = pytest.mark.skipif(shared_memory._host() == 0, reason="this processor or system shares no memory between ranks")


def channels_of(axis: Axis) -> Channels:
    assert axis.channels is not None
    return axis.channels


def numbers(size: int, sender: int, receiver: int, number: int) -> torch.Tensor:
    """Of a message, and of no other."""
    return torch.arange(size, dtype=torch.int32) + (sender * 8 + receiver) * 1_000_000 + number * 100


def with_capacity(world: int, capacity: int) -> Axis:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels, "LARGEST_CHANNEL", capacity)
        pp = ParallelMesh(pp=world).pp
    assert channels_of(pp).capacity == capacity
    return pp


def waiting(axis: Axis) -> int:
    """Messages that found no room."""
    return sum(map(len, channels_of(axis)._without_room.values()))


def stress(world: int, capacity: int, rounds: int) -> int:
    """Of every pair some messages of random sizes and tags, asked for early, late and in another order, by ranks that fall behind. How
    many found no room."""
    pp = with_capacity(world, capacity)
    plan, delays, without_room = random.Random(0), random.Random(pp.rank), 0
    for number in range(rounds):
        sent = [(a, b, tag) for a in range(world) for b in range(world) for tag in range(plan.randint(0, 24)) if a != b]
        sizes = {key: plan.choice([0, 1, 17, capacity // 48, *[capacity // 32] * 3, capacity // 32 + 1]) for key in sent}
        plan.shuffle(sent)
        mine = [key for key in sent if key[1] == pp.rank]
        outs = {key: torch.full((sizes[key],), -1, dtype=torch.int32) for key in mine}
        soon = [key for key in mine if delays.random() < 0.5]
        works = {key: start_receive(outs[key], pp, key[0], key[2]) for key in soon}
        sends = []
        for a, b, tag in sent:
            if a == pp.rank:
                x = numbers(sizes[a, b, tag], a, b, number)
                sends.append(start_send(x, pp, b, tag))
                if sends[-1] is None:
                    x.fill_(-2)
                if delays.random() < 0.1:
                    time.sleep(0.002)
        delays.shuffle(mine)
        for key in mine:
            wait(works.get(key) or start_receive(outs[key], pp, key[0], key[2]))
            assert torch.equal(outs[key], numbers(sizes[key], key[0], key[1], number)), key
        for send in sends:
            wait(send)
        without_room += waiting(pp)
        flush(pp)
        assert waiting(pp) == 0
    return without_room


@SHARED
@pytest.mark.parametrize("world,capacity", [(2, 32 << 10), (3, 64 << 10), (4, 32 << 10)])
def test_stress(ranks, world, capacity):
    assert all(without_room > 0 for without_room in ranks.run(world, stress, world, capacity, 40))


def no_room() -> None:
    """Each rank sends three times what a channel holds before it asks for anything; then there is room again."""
    pp = with_capacity(2, 32 << 10)
    for number in range(5):
        for tag in range(24):
            start_send(numbers(1024, pp.rank, 1 - pp.rank, tag), pp, 1 - pp.rank, 7 if tag < 12 else tag)
        assert waiting(pp) >= 16, number
        dist.barrier()
        for tag in (*range(20, 24), *range(12), *range(12, 20)):
            out = torch.empty(1024, dtype=torch.int32)
            wait(start_receive(out, pp, 1 - pp.rank, 7 if tag < 12 else tag))
            assert torch.equal(out, numbers(1024, 1 - pp.rank, pp.rank, tag))
        flush(pp)
        dist.barrier()


@SHARED
def test_no_room(ranks):
    ranks.run(2, no_room)


def far_ahead() -> None:
    """However many are sent to a slow reader, those without room are few, and it is no failure that all of them take long."""
    with mock.patch.object(channels, "MOST_WITHOUT_ROOM", 3), mock.patch.object(channels, "LARGEST_CHANNEL", 16 << 10):
        pp = ParallelMesh(pp=2, timeout=timedelta(seconds=0.5)).pp
        for tag in range(60):
            if pp.rank == 0:
                start_send(numbers(512, 0, 1, tag), pp, 1, tag)
                assert waiting(pp) <= 3
            else:
                time.sleep(0.03)
                out = torch.empty(512, dtype=torch.int32)
                wait(start_receive(out, pp, 0, tag))
                assert torch.equal(out, numbers(512, 0, 1, tag))
        flush(pp)
        assert waiting(pp) == 0 and (channels_of(pp)._read == channels_of(pp)._written).all()


@SHARED
def test_far_ahead(ranks):
    ranks.run(2, far_ahead)


def read_as_far_as_asked() -> None:
    """What comes after a message that is waited for stays in the channel, however much there is."""
    pp = ParallelMesh(pp=2).pp
    for tag in range(50):
        if pp.rank == 0:
            start_send(torch.full((10,), float(tag)), pp, 1, tag)
        else:
            out = torch.empty(10)
            time.sleep(0.001)
            wait(start_receive(out, pp, 0, tag))
            assert out[0] == tag and not any(channels_of(pp)._early.values())


@SHARED
def test_read_as_far_as_asked(ranks):
    ranks.run(2, read_as_far_as_asked)


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


def any_dtype() -> None:
    """And scalars, and several dimensions."""
    pp = ParallelMesh(pp=2).pp
    values = [torch.tensor(3.5, dtype=torch.float64), torch.ones(3, 5).bfloat16(), torch.tensor([True, False]), torch.ones(2) * 1j]
    for tag, x in enumerate(values):
        out = torch.zeros_like(x)
        asked = start_receive(out, pp, 1 - pp.rank, tag)
        start_send(x, pp, 1 - pp.rank, tag)
        wait(asked)
        assert torch.equal(out, x)


@SHARED
def test_dtypes(ranks):
    ranks.run(2, any_dtype)


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


def waits_for(what: str, words: str) -> None:
    """Rank 1 dies or dawdles; what rank 0, which waits for it, is told, and how long that takes."""
    pp = ParallelMesh(pp=2, timeout=timedelta(seconds=1 if what == "dawdles" else 30)).pp
    wait(start_send(torch.ones(1), pp, 1 - pp.rank, 1))
    wait(start_receive(torch.ones(1), pp, 1 - pp.rank, 1))
    begin = time.monotonic()
    if pp.rank == 1:
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)
        return
    with pytest.raises(RuntimeError, match=words):
        wait(start_receive(torch.ones(1), pp, 1, 2))
    assert time.monotonic() - begin < 2.5
    with pytest.raises(RuntimeError, match="an earlier message of this axis failed"):
        start_send(torch.ones(1), pp, 1, 3)


@SHARED
def test_hanging_peer(ranks):
    ranks.run(2, waits_for, "dawdles", "rank 1 of the axis did not come within 1 s: it hangs")


@SHARED
def test_dead_peer(ranks):
    with pytest.raises(RankError) as error:
        ranks.run(2, waits_for, "dies", "rank 1 of the axis died")
    assert set(error.value.errors) == {1}, "rank 0 came back by itself, and was told why"


def parting() -> list[str]:
    """Rank 1 sends one and leaves, while rank 0 sleeps until it has left; that gets the message, and for another is told."""
    pp = ParallelMesh(pp=2).pp
    found = channels_of(pp)
    if pp.rank == 1:
        start_send(torch.ones(2), pp, 0, 1)
        found.leave()
        return []
    out = torch.empty(2)
    asked = Message(found, 1, 1, out)
    found._asked[1, 1].append(asked)  # not looked for yet
    looks = [False]

    def look_for(message: Message) -> bool:
        if looks[0]:
            return Channels._look_for(found, message)
        looks[0] = True
        while not found._left[1]:
            time.sleep(0.001)
        return False

    with mock.patch.object(found, "_look_for", look_for):
        wait(asked)
    assert out.tolist() == [1.0, 1.0]
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        wait(start_receive(torch.empty(2), pp, 1, 2))
    assert time.monotonic() - begin < 1
    return [str(error.value)]


@SHARED
def test_who_leaves_has_sent(ranks):
    told, _ = ranks.run(2, parting)
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
