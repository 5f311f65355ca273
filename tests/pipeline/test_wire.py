"""What crosses between pipeline ranks: how many bytes, how long it is kept, and nothing where nothing has to."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from megapar import ParallelMesh, shared_memory
from megapar.channels import Channels
from megapar.grads import MainGrads
from megapar.pipeline import wire
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.orders import gpipe
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.schedule import Action
from megapar.pipeline.wire import HEADER_BYTES, UNDER_WAY, Form, Payload, Wire, signature
from tests.pipeline.decoders import Chunk, loss_of, micro_batches, stages_of
from tests.pipeline.test_parity import config_of


def sent(kind: str, pp: int, chunks: int, tp: int, sequence_parallel: bool, m: int) -> list[tuple[int, int, int]]:
    """After each of three steps what this rank has sent so far: bytes, header bytes, messages. The last one has another length."""
    mesh = ParallelMesh(pp=pp, tp=tp)
    stages = stages_of(config_of(pp * chunks, False, False, 2), mesh, chunks, sequence_parallel=sequence_parallel)
    MainGrads(p for stage in stages for p in stage.parameters())
    runner = PipelineRunner([Chunk(stage) for stage in stages], mesh, make_schedule(kind, pp, chunks, m))
    told = []
    with mock.patch.object(wire, "start_send", side_effect=wire.start_send) as sends:
        for data in (micro_batches(m), micro_batches(m, seed=1), micro_batches(3 * m, varying=True)[2::3]):
            runner.step(data, loss_of(stages[-1]))
            told.append((runner.wire.bytes_sent, runner.wire.header_bytes_sent, sends.call_count))
    return told


@pytest.mark.parametrize("kind,pp,chunks", [("1f1b", 3, 1), ("interleaved_1f1b", 2, 3), ("zero_bubble", 2, 2)])
@pytest.mark.parametrize("tp,sequence_parallel", [(1, False), (2, False), (2, True)])
def test_bytes(ranks, kind, pp, chunks, tp, sequence_parallel):
    """Each way boundaries x m x t h e, with sequence parallelism ceil(t / tp) h; a header for each boundary and new length."""
    m, h, e = 3, 32, 4
    told = ranks.run(pp * tp, sent, kind, pp, chunks, tp, sequence_parallel, m)
    boundaries = (pp * chunks - 1) * tp
    expected = 0
    for step, s in enumerate((7, 7, 9)):
        rows = -(-2 * s // tp) if sequence_parallel else 2 * s
        expected += 2 * boundaries * m * rows * h * e
        headers = boundaries * (2 if step == 2 else 1)
        assert sum(rank[step][0] for rank in told) == expected
        assert sum(rank[step][1] for rank in told) == headers * HEADER_BYTES
        assert sum(rank[step][2] for rank in told) == 2 * boundaries * m * (step + 1) + headers


def test_one_rank_sends_nothing():
    stages = stages_of(config_of(3, False, False, 2), ParallelMesh.alone(), 3)
    runner = PipelineRunner([Chunk(stage) for stage in stages], ParallelMesh.alone(), make_schedule(None, 1, 3, 2))
    with mock.patch.object(wire, "start_send") as sends, mock.patch.object(wire, "start_receive") as receives:
        runner.step(micro_batches(2), loss_of(stages[-1]))
        runner.evaluate(micro_batches(3), loss_of(stages[-1]))
    assert not sends.called and not receives.called and runner.wire.bytes_sent == 0


class _Doubled(torch.autograd.Function):
    """Twice x, in memory that can be watched; saves nothing."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, made: list) -> torch.Tensor:
        memory = x.detach().numpy() * np.float32(2)
        made.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy * 2, None


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.made: list[weakref.ref] = []
        self.alive: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.alive.append(sum(made() is not None for made in self.made))
        return _Doubled.apply(x * self.weight, self.made)


def without_channels(pp: int) -> ParallelMesh:
    """Whose messages go through the process group, as between hosts."""
    with mock.patch("megapar.mesh.connect_channels", lambda *_: None):
        return ParallelMesh(pp=pp)


def dropped(shared: bool) -> None:
    mesh, chunk, m = ParallelMesh(pp=2) if shared else without_channels(2), Doubling(), 8
    data = [torch.full((2, 4), float(i)) for i in range(m)]
    runner = PipelineRunner([chunk], mesh, gpipe(2, 1, m), inputs=lambda x: x)
    runner.step(data, lambda y, _: (y.sum(), 1))
    if mesh.pp.rank == 0:
        assert max(chunk.alive) == (UNDER_WAY if mesh.pp.channels is None else 0), chunk.alive
    assert not any(made() is not None for made in chunk.made)
    total = float(sum(x.sum() for x in data)) / 4  # of one of four columns; y = 4 w0 w1 x
    assert chunk.weight.grad is not None and torch.equal(chunk.weight.grad, torch.full((4,), 4 * total))


@pytest.mark.parametrize("shared", [False, True])
def test_sent_outputs_are_dropped(ranks, shared):
    """While it computes on, the first rank keeps the memory of two outputs at most, or none that is sent through memory; the graph needs
    none of them."""
    assert UNDER_WAY == 2
    ranks.run(2, dropped, shared)


@contextmanager
def channels_of(capacity: int, parts: int) -> Iterator[list[bool]]:
    """Meshes have channels of this size, or for 0 none; whether each message, one of whose size may take one of so many parts, found
    room."""
    found = []

    def forget_read(channels: Channels, peer: int, most: int) -> None:
        found.append(most == 0)  # as `flush` calls it
        real(channels, peer, most)

    real = Channels._forget_read
    patches = {"LARGEST_CHANNEL": capacity, "PARTS": parts, "MOST_WITHOUT_ROOM": 8}
    with mock.patch.multiple("megapar.channels", **patches), mock.patch.object(Channels, "_forget_read", forget_read):
        yield found


def gradients(kind: str, pp: int, chunks: int, capacity: int, tp: int = 1, parts: int = 8) -> tuple[list[torch.Tensor], bool]:
    """This rank's, of two steps of micro-batches of several lengths; whether all of its messages found room."""
    with channels_of(capacity, parts) as found_room:
        return _gradients(kind, ParallelMesh(pp=pp, tp=tp), chunks), all(found_room)


def _gradients(kind: str, mesh: ParallelMesh, chunks: int) -> list[torch.Tensor]:
    pp, tp = mesh.pp.size, mesh.tp.size
    stages = stages_of(config_of(pp * chunks, False, False, 2), mesh, chunks, sequence_parallel=tp > 1)
    grads = MainGrads(p for stage in stages for p in stage.parameters())
    runner = PipelineRunner([Chunk(stage) for stage in stages], mesh, make_schedule(kind, pp, chunks, 5))
    for seed in range(2):
        runner.step(micro_batches(5, seed=seed, varying=True), loss_of(stages[-1]))
    grads.finish()
    return [p.main_grad for stage in stages for p in stage.parameters()]


@pytest.mark.parametrize("kind,pp,chunks", [("gpipe", 3, 1), ("1f1b", 2, 1), ("interleaved_1f1b", 2, 2), ("zero_bubble", 4, 1)])
def test_through_the_process_group(ranks, kind, pp, chunks):
    """Bitwise the gradients of messages through shared memory."""
    for (one, _), (other, _) in zip(*(ranks.run(pp, gradients, kind, pp, chunks, capacity) for capacity in (1 << 20, 0)), strict=True):
        assert len(one) > 0 and all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(one, other, strict=True))


@pytest.mark.skipif(shared_memory._host() == 0, reason="this processor or system shares no memory between ranks")
@pytest.mark.parametrize("kind", ["gpipe", "interleaved_1f1b", "zero_bubble"])
@pytest.mark.parametrize("capacity,parts", [(4 << 10, 2), (8 << 10, 8)])
def test_room(ranks, kind, capacity, parts):
    """Channels that hold one message, and some that most are too large for, while ranks of tp wait for each other between them."""
    plenty = ranks.run(4, gradients, kind, 2, 2, 1 << 20, 2)
    little = ranks.run(4, gradients, kind, 2, 2, capacity, 2, parts)
    assert all(room for _, room in plenty)
    assert parts > 2 or not all(room for _, room in little)
    for (one, _), (other, _) in zip(plenty, little, strict=True):
        assert len(one) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_tags_differ():
    """Of all messages of a step; both ends of one have the same."""
    stages, m = 6, 5
    ends = Wire(ParallelMesh.alone().pp, [stage % 2 for stage in range(stages)], torch.device("cpu"))
    sends = {ends._tag(Action("SEND_F", stage, i)): ("F", stage, i) for stage in range(stages - 1) for i in range(m)}
    sends |= {ends._tag(Action("SEND_B", stage, i)): ("B", stage, i) for stage in range(1, stages) for i in range(m)}
    assert len(sends) == 2 * (stages - 1) * m and max(sends) < 2 * stages * m
    for tag, (letter, stage, i) in sends.items():
        assert ends._tag(Action("RECV_" + letter, stage + (1 if letter == "F" else -1), i)) == tag


def test_header():
    """What is decoded is what was encoded; shapes that do not fit are refused."""
    payload = Payload((torch.zeros(2, 3), torch.zeros((), dtype=torch.int64), torch.zeros(0, 5, dtype=torch.bfloat16)), True)
    form = Form.of(payload)
    header = form.encoded()
    assert header.shape == (HEADER_BYTES,) and header.dtype == torch.uint8 and Form.decoded(header) == form
    assert Form.of(form.empty(torch.device("cpu"))) == form
    assert form.gradient == Form((form.parts[0], form.parts[2]), True)
    assert str(form) == "a tuple of torch.float32 [2, 3], torch.int64 [], torch.bfloat16 [0, 5]"
    with pytest.raises(ValueError, match=r"the shapes of 16 tensors take .* of 1024 bytes: hand over fewer"):
        Form.of(Payload((torch.zeros([1] * 60),) * 16, True)).encoded()


def test_signature():
    """Shapes, dtypes and whatever is no tensor decide it, values of tensors do not."""
    batch, targets = micro_batches(1)[0]
    same, others = micro_batches(1, seed=1)[0], micro_batches(3, varying=True)[1]
    assert signature((batch, targets)) == signature(same) != signature(others)
    assert signature({"x": targets}) != signature({"y": targets}) != signature({"y": targets.int()})
    assert len({signature(value) for value in (None, True, 1, 2, 1.5, "a", [1, 2], [])}) == 8
    with pytest.raises(ValueError, match="a micro-batch holds a set: use tensors, numbers"):
        signature([{1}])
