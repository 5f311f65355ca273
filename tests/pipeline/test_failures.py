"""A rank that fails or dies in the middle of a step: all ranks end, soon, with its error."""

import multiprocessing
import os
import re
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megapar import ParallelMesh
from megapar.failures import RemoteError
from megapar.grads import MainGrads
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.stage import Stage
from tests.pipeline.decoders import Chunk, loss_of, micro_batches, stages_of
from tests.pipeline.test_parity import config_of
from tests.pipeline.test_runtime import data, layers, loss_fn

PLACES = {"forward": "F", "backward": "I", "weights": "W", "loss": "F", "evaluate": "F"}


def boom(*_: object) -> None:
    raise RuntimeError("boom")  # as torch's own errors are, and those of a connection


class _Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> None:
        boom()


def words_of(rank: int) -> str:
    return f"rank {rank} failed in "


def fails(place: str, rank: int, pp: int, tp: int) -> None:
    """Global rank `rank` fails there, in its second micro-batch."""
    mesh = ParallelMesh(pp=pp, tp=tp)
    stages = stages_of(config_of(pp, False, False, 2), mesh, 1)
    MainGrads(p for stage in stages for p in stage.parameters())
    chunk, loss = Chunk(stages[0]), loss_of(stages[0])
    runner = PipelineRunner([chunk], mesh, make_schedule("zero_bubble", pp, 1, 3))
    calls = [0]

    def second_time(*_: object) -> bool:
        calls[0] += mesh.world.rank == rank
        return calls[0] == 2

    def step() -> None:
        for _ in range(2):  # those that were done with the first step when it failed hear of it in the second one
            runner.evaluate(micro_batches(3), loss) if place == "evaluate" else runner.step(micro_batches(3), loss)

    if place in ("forward", "evaluate"):
        chunk.register_forward_hook(lambda *_: boom() if second_time() else None)
    elif place == "backward":
        chunk.register_forward_hook(lambda _, __, x: _Raise.apply(x) if second_time() else x)
    elif place == "loss":
        loss = lambda x, m, real=loss: boom() if second_time() else real(x, m)  # noqa: E731
    real_weights = Stage.weight_gradients

    def weight_gradients(self: Stage, m: int) -> None:
        if place == "weights" and second_time():
            time.sleep(0.5)  # until the others are done with this step
            boom()
        real_weights(self, m)

    with mock.patch.object(Stage, "weight_gradients", weight_gradients):
        try:
            step()
        except RuntimeError as error:
            # One that was done with its step has learnt it in the exchange that opens the next one.
            with pytest.raises(RuntimeError, match="an earlier step of this runner failed" if runner._broken else words_of(rank)):
                step()
            raise error


@pytest.mark.parametrize("pp,tp,rank", [(3, 1, 0), (3, 1, 1), (3, 1, 2), (2, 2, 0), (2, 2, 3), (1, 2, 1)])
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_fails(ranks, place, rank, pp, tp):
    """With tp, its neighbour waits in shared memory and not for messages."""
    if place == "loss" and rank // tp != pp - 1:
        rank = pp * tp - 1
    begin = time.monotonic()
    errors = ranks.errors(pp * tp, fails, place, rank, pp, tp, timeout=12)
    assert time.monotonic() - begin < 10
    assert errors[rank] == "boom"
    words = rf"rank {rank} failed in {rank // tp}{PLACES[place]}\d: RuntimeError: boom"
    for other, error in enumerate(errors):
        assert other == rank or re.fullmatch(words, error), f"rank {other}: {error}"


class Dying(nn.Module):
    """Dies in its third forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = layers(1)[0], 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(x)


def survivor(pipe: Connection, rank: int, world: int, port: int, gone: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    mesh = ParallelMesh(pp=world, timeout=timedelta(seconds=20))
    chunk = Dying() if rank == gone else layers(1)[0]
    runner = PipelineRunner([chunk], mesh, make_schedule("1f1b", world, 1, 6), inputs=lambda micro_batch: micro_batch[0])
    begin = time.monotonic()
    try:
        runner.step(data(6), loss_fn)
    except RemoteError as error:
        pipe.send((str(error), time.monotonic() - begin))
    pipe.poll(30)  # rank 0 holds the store: it must outlive the others' questions


@pytest.mark.parametrize("gone", [1, 3])
def test_a_rank_is_killed(gone):
    """The rest end within the group timeout and name it."""
    world = 4
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest"])
    pipes = [context.Pipe() for _ in range(world)]
    processes = [context.Process(target=survivor, args=(pipes[r][1], r, world, port, gone), daemon=True) for r in range(world)]
    try:
        for process in processes:
            process.start()
        for rank, (ours, _) in enumerate(pipes):
            if rank != gone:
                assert ours.poll(40), f"rank {rank} does not end"
                told, seconds = ours.recv()
                assert f"rank {gone} stopped answering" in told, f"rank {rank}: {told}"
                assert seconds < 20
        assert processes[gone].exitcode == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.join()
