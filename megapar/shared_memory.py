"""How CPU ranks of one host hand each other tensors: through memory that all of them map, without a system call.

Every operation on an axis has a number, the same on all ranks. Rank r posts its tensor of operation k in slot k % RING of its own part
of the memory and then sets posted[r] = k; whoever waits for k spins until every rank has posted it, reads, and sets finished[r] = k. A
slot is written again only when all ranks have finished with what was in it.

This relies on a processor that lets no store overtake an earlier one, which x86 promises and others do not: elsewhere, and between
hosts, `megapar.transport` goes through the process group.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import platform
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

FOLDER = Path("/dev/shm")
RING = 4
"""Operations that may be under way at once."""
MOST_BYTES = 48 << 20
"""Of one axis; containers often grant 64 MiB of shared memory in all."""
LARGEST_SLOT = 4 << 20
LINE = 64
"""Bytes of a cache line: counters that different ranks write lie on different ones."""
SPINS, PATIENCE, NAP = 200, 0.02, 1e-4
"""Looks at a counter before yielding the core each time; seconds until naps replace that; seconds of a nap."""


class SharedMemory:
    """One rank's view of the memory of an axis. `start` posts a tensor, `Posted.wait` gives everyone's."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, slot: int, processes: list[int], timeout: float) -> None:
        self.rank, self.size, self.slot, self.timeout = rank, size, slot, timeout
        counters = np.frombuffer(memory, np.int64, count=2 * size * LINE // 8).reshape(2, size, LINE // 8)
        self._posted, self._finished = counters[0, :, 0], counters[1, :, 0]
        data = torch.frombuffer(memory, dtype=torch.uint8, offset=2 * size * LINE)
        self._slots = data.view(size, RING, slot).unbind()
        self._processes = processes
        self._started = 0
        self._under_way: deque[Posted] = deque()

    def start(self, x: Tensor, read: Callable[[list[Tensor]], Tensor]) -> Posted:
        """Posts contiguous `x`, at most `slot` bytes; `read` makes the result of every rank's tensor, by rank, when it is waited for."""
        self._started += 1
        if len(self._under_way) == RING:
            self._under_way[0].wait()
        self._spin(self._finished, self._started - RING)
        posted = Posted(self, self._started, x, read)
        self._view(self.rank, posted).copy_(x)
        self._posted[self.rank] = self._started
        self._under_way.append(posted)
        return posted

    def finish(self, posted: Posted) -> Tensor:
        """Reads an operation once all ranks have posted it, and gives back the slots of those that are finished in a row."""
        self._spin(self._posted, posted.number)
        result = posted.read([self._view(r, posted) for r in range(self.size)])
        posted.done = True
        while self._under_way and self._under_way[0].done:
            self._finished[self.rank] = self._under_way.popleft().number
        return result

    def _view(self, rank: int, posted: Posted) -> Tensor:
        return self._slots[rank][posted.number % RING][: posted.bytes].view(posted.dtype).view(posted.shape)

    def _spin(self, counters: np.ndarray, number: int) -> None:
        for rank in range(self.size):
            spins, begin = 0, 0.0
            while counters[rank] < number:
                spins += 1
                if spins > SPINS:
                    begin = begin or time.monotonic()
                    self._pause(rank, time.monotonic() - begin)

    def _pause(self, rank: int, waited: float) -> None:
        """Lets others run while this rank waits for `rank`. Raises RuntimeError when that one has died or the timeout has passed."""
        if waited < PATIENCE:
            os.sched_yield()
            return
        time.sleep(NAP)
        if process_is_gone(self._processes[rank]):
            raise RuntimeError(f"rank {rank} of the axis died (process {self._processes[rank]}): see its output")
        if waited > self.timeout:
            raise RuntimeError(f"rank {rank} of the axis did not come within {self.timeout:.0f} s: it hangs, or calls other collectives")


class Posted:
    """An operation under way."""

    def __init__(self, memory: SharedMemory, number: int, x: Tensor, read: Callable[[list[Tensor]], Tensor]) -> None:
        self.memory, self.number, self.read, self.done = memory, number, read, False
        self.shape, self.dtype, self.bytes = x.shape, x.dtype, x.numel() * x.element_size()
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        if self._result is None:
            self._result = self.memory.finish(self)
        return self._result


def connect(rank: int, size: int, group: dist.ProcessGroup, timeout: float) -> SharedMemory | None:
    """Memory shared by all ranks of the group, or None, on all of them, where they cannot share any.

    Three small collectives, and a file that exists only until every rank has mapped it.
    """
    if len(set(_everyone(_host(), size, group))) > 1 or _host() == 0:
        return None
    slot = min(LARGEST_SLOT, MOST_BYTES // (size * RING)) // LINE * LINE
    total = 2 * size * LINE + size * RING * slot
    name = _everyone(_create(total) if rank == 0 else 0, size, group)[0]
    path = FOLDER / f"megapar-{name:016x}"
    memory = _map(path, total) if name else None
    processes = _everyone(0 if memory is None else os.getpid(), size, group)
    if name and rank == 0:
        path.unlink()
    if memory is None or 0 in processes:
        return None
    return SharedMemory(memory, rank, size, slot, processes, timeout)


def process_is_gone(process: int) -> bool:
    """Whether a process of this host has ended, reaped or not."""
    status = Path(f"/proc/{process}/stat")
    # The field after the name in parentheses is the state; Z is a process that ended and was not waited for.
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def _host() -> int:
    """Equal where processes see the same shared memory; 0 where there is none, or the processor keeps no order of stores."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if platform.machine() not in ("x86_64", "AMD64") or not FOLDER.is_dir() or not boot.exists():
        return 0
    digest = hashlib.sha256(f"{boot.read_text()} {FOLDER.stat().st_dev} {socket.gethostname()}".encode()).digest()
    return int.from_bytes(digest[:7], "little") + 1


def _everyone(value: int, size: int, group: dist.ProcessGroup) -> list[int]:
    values = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(values, torch.tensor([value]), group=group)
    return [int(v) for v in values]


def _create(total: int) -> int:
    """The name of a new file of zeros with its pages reserved; 0 if there is no room, where touching them would kill the process."""
    name = secrets.randbits(62) + 1
    try:
        descriptor = os.open(FOLDER / f"megapar-{name:016x}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return 0
    try:
        os.posix_fallocate(descriptor, 0, total)
    except OSError:
        os.unlink(FOLDER / f"megapar-{name:016x}")
        return 0
    finally:
        os.close(descriptor)
    return name


def _map(path: Path, total: int) -> mmap.mmap | None:
    try:
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), total)
    except OSError:
        return None
