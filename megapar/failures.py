"""What ranks tell each other when one of them fails, so that none waits in vain and every one ends with the reason."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megapar.mesh import ParallelMesh
from megapar.shared_memory import CommunicationError, process_is_gone
from megapar.transport import close_connections

FAILED = "megapar/failed"


class RemoteError(RuntimeError):
    """Another rank failed first, or is gone; the message names it, and says what it said."""


def leave(mesh: ParallelMesh, error: BaseException, where: str) -> None:
    """Lets no rank wait for this one, which is about to raise `error`: leaves word of it and ends all waits along the mesh's axes.

    A rank that ends because another did leaves no word. Of several ranks that fail by themselves the first one's word stays.
    """
    if not isinstance(error, CommunicationError):
        tell_failure(mesh, error, where)
    for axis in (mesh.pp, mesh.tp, mesh.dp, mesh.pp_ends, mesh.world):
        close_connections(axis)


def tell_failure(mesh: ParallelMesh, error: BaseException, where: str) -> None:
    """Leaves word for the ranks that wait for this one, which is about to raise `error`. Of several ranks the first one's word stays."""
    if mesh.store is not None:
        told = {"rank": mesh.world.rank, "text": f"{where}: {type(error).__name__}: {error}"}
        try:
            mesh.store.compare_set(FAILED, "", json.dumps(told))
        except dist.DistError:
            return  # with the store gone, its rank's death is what the others see


def told_failure(mesh: ParallelMesh) -> tuple[int, str] | None:
    """The rank that failed first, and the word that it left."""
    try:
        if mesh.store is None or not mesh.store.check([FAILED]):
            return None
        told = json.loads(mesh.store.get(FAILED))
    except dist.DistError:
        return None
    return int(told["rank"]), str(told["text"])


def missing_ranks(mesh: ParallelMesh, wait: timedelta = timedelta(seconds=5)) -> list[int]:
    """After a collective failed: the global ranks that died, or else those that do not answer through the store within `wait`.

    With gloo only a dead rank's neighbours see the failure at once; others still wait in the collective and answer no more than a dead
    one. On this host their processes tell them apart. Empty if it cannot be told: the store is gone.
    """
    if mesh.store is None:
        return []
    silent: list[int] = []
    try:
        mesh.store.set(f"megapar/alive/{mesh.world.rank}", "1")
        for rank in mesh.world.ranks:
            try:
                mesh.store.wait([f"megapar/alive/{rank}"], timedelta(seconds=0.1) if silent else wait)
            except dist.DistStoreError:
                silent.append(rank)
        places = {rank: mesh.store.get(f"megapar/process/{rank}").decode().split() for rank in silent}
        dead = [rank for rank, (host, process) in places.items() if host == socket.gethostname() and process_is_gone(int(process))]
    except dist.DistNetworkError:
        return []
    return dead or silent


@contextmanager
def named_failures(mesh: ParallelMesh) -> Iterator[None]:
    """Turns the failure of a collective into the name of the rank that is gone, or what another rank said before it failed.

    Nobody waits for this rank any more then: one that did not need the lost rank itself, but this one, would wait until its timeout
    (tests/test_failures.py::test_nobody_waits_for_one_that_gave_up).
    """
    try:
        yield
    except RemoteError:
        raise
    except RuntimeError as error:
        if isinstance(error, CommunicationError):
            leave(mesh, error, "")
        told = told_failure(mesh)
        missing = missing_ranks(mesh) if told is None and mesh.world.size > 1 else []
        told = told or told_failure(mesh)  # a rank may have left word while this one asked who is missing
        if told is not None and told[0] != mesh.world.rank:
            raise RemoteError(f"rank {told[0]} failed in {told[1]}") from error
        if not missing or told is not None:
            raise
        names = ", ".join(map(str, missing))
        raise RemoteError(f"rank {names} stopped answering: it died or hangs, see its output, and start the ranks again") from error


@contextmanager
def together(mesh: ParallelMesh, where: str) -> Iterator[None]:
    """Lets no rank wait for one that fails inside, and every rank end with its reason."""
    with named_failures(mesh):
        try:
            yield
        except RemoteError:
            raise
        except BaseException as error:
            leave(mesh, error, where)
            raise
