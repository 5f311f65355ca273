"""What the ranks that are left say when one is gone."""

import multiprocessing
import os
import time
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from megapar import ParallelMesh
from megapar.failures import leave, missing_ranks, named_failures
from megapar.transport import start_all_gather, start_all_reduce, start_receive, wait


def survivor(pipe: Connection, rank: int, port: int, gone: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    mesh = ParallelMesh(tp=3, timeout=timedelta(seconds=30))
    start_all_reduce(torch.ones(1), mesh.tp).wait()
    if rank == gone:
        os._exit(1)
    try:
        start_all_reduce(torch.ones(1), mesh.tp).wait()
    except RuntimeError:
        pipe.send(missing_ranks(mesh, timedelta(seconds=0.5)))
    else:
        pipe.send("the collective succeeded")
    pipe.poll(30)  # rank 0 holds the store: it must outlive the question


@pytest.mark.parametrize("gone,expected", [(2, ([2],)), (0, ([],))])
def test_missing_ranks(gone, expected):
    """The first to notice names the rank that exited, not one that still waits; with rank 0 gone, which held the store, no rank."""
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest"])
    pipes, processes = [], []
    for rank in range(3):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=survivor, args=(theirs, rank, port, gone), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        first = connection.wait(pipes[:gone] + pipes[gone + 1 :], 30)[0]
        assert first.recv() in expected
    finally:
        for process in processes:
            process.kill()
            process.join()


def one_after_another() -> None:
    mesh = ParallelMesh(pp=3)
    start_all_gather(torch.ones(1), mesh.pp).wait()
    begin = time.monotonic()
    try:
        if mesh.pp.rank == 1:
            leave(mesh, KeyError("boom"), "a test")
            raise KeyError("boom")
        with named_failures(mesh):
            wait(start_receive(torch.empty(1), mesh.pp, 1 if mesh.pp.rank == 0 else 0, 1))
    finally:
        assert time.monotonic() - begin < 10


def test_nobody_waits_for_one_that_gave_up(ranks):
    """Rank 2 waits for rank 0, which waited for rank 1, which failed: both end at once with its word."""
    told = "rank 1 failed in a test: KeyError: 'boom'"
    assert ranks.errors(3, one_after_another) == [told, "'boom'", told]
