"""A rank that fails or dies in the middle of a step: every rank ends, soon, with its reason."""

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megapar import ParallelMesh
from megapar.failures import RemoteError
from megapar.zero.buckets import GradBuckets
from megapar.zero.weights import Weights
from tests.zero.common import TOKENS, backward, decoder, loss_sum, micro_batch, wrapped

PLACES = {"a reduction": (GradBuckets, "_start"), "a gather": (Weights, "start_gather"), "the step": (GradBuckets, "finish")}


class _Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> None:
        raise RuntimeError("boom")


def fails(place: str, stage: int) -> None:
    """Rank 1 does, in its second step; a later call of any rank says that it is over."""
    mesh = ParallelMesh()
    optimizer = wrapped(decoder(mesh), mesh, stage=stage, bucket_bytes=1)
    backward(optimizer, 0)
    optimizer.step(2 * TOKENS)
    try:
        if place == "backward" and mesh.dp.rank == 1:
            optimizer.chunks[0].blocks["1"].register_forward_hook(lambda _, __, x: _Raise.apply(x))
        backward(optimizer, 1)
        if place == "step" and mesh.dp.rank == 1:
            optimizer.grads.finish = lambda: [][0]
        optimizer.step(2 * TOKENS)
    except (RuntimeError, IndexError) as error:
        with pytest.raises(RuntimeError, match="an earlier step of this optimizer failed"):
            optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(0, 0, 0)) if stage < 3 else torch.zeros((), requires_grad=True))
        raise error


WORDS = {"backward": "a backward: RuntimeError: boom", "step": "a step: IndexError: list index out of range"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("place,words", WORDS.items())
def test_a_rank_fails(ranks, place, words, stage):
    begin = time.monotonic()
    told = ranks.errors(3, fails, place, stage, timeout=14)
    assert time.monotonic() - begin < 12
    assert told[1] == words.partition("Error: ")[2]
    assert told[0] == told[2] == f"rank 1 failed in {words}"


def survivor(pipe: Connection, rank: int, world: int, port: int, gone: int, place: str, stage: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    mesh = ParallelMesh(timeout=timedelta(seconds=20))
    optimizer = wrapped(decoder(mesh), mesh, stage=stage, bucket_bytes=1)
    backward(optimizer, 0)
    optimizer.step(2 * TOKENS)
    kind, name = PLACES[place]
    real, calls = getattr(kind, name), [0]

    def dying(*args: Any) -> Any:
        calls[0] += 1
        if rank == gone and calls[0] == (1 if place == "the step" else 4):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(kind, name, dying)
    begin = time.monotonic()
    try:
        backward(optimizer, 1)
        optimizer.step(2 * TOKENS)
        pipe.send(("nothing", 0.0))
    except RemoteError as error:
        pipe.send((str(error), time.monotonic() - begin))
    pipe.poll(30)  # rank 0 holds the store: it must outlive the others' questions


@pytest.mark.parametrize("place,stage", [("a reduction", 2), ("a gather", 1), ("the step", 1)])
def test_a_rank_is_killed(place, stage):
    """The rest end within the group timeout and name it."""
    world, gone = 3, 1
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest"])
    pipes = [context.Pipe() for _ in range(world)]
    args = [(pipes[rank][1], rank, world, port, gone, place, stage) for rank in range(world)]
    processes = [context.Process(target=survivor, args=a, daemon=True) for a in args]
    try:
        for process in processes:
            process.start()
        for rank, (ours, _) in enumerate(pipes):
            if rank != gone:
                assert ours.poll(60), f"rank {rank} does not end"
                told, seconds = ours.recv()
                assert f"rank {gone} stopped answering" in told, f"rank {rank}: {told}"
                assert seconds < 20
        assert processes[gone].exitcode == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.join()
