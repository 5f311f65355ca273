"""How CPU ranks of one host hand each other tensors: through memory that all of them map, without a system call.

Every operation on an axis has a number, the same on all ranks. Rank r posts its tensor of operation k in slot k % RING of its own part
of the memory, with a signature of what it is, and then sets posted[r] = k; whoever waits for k spins until every rank has posted it,
compares the signatures, reads, and sets finished[r] = k. A slot is written again only when all ranks have finished with what was in it.
After an error the ranks may no longer agree on the numbers, so the memory refuses all further use.

This relies on a processor that lets no store overtake an earlier one, which x86 promises and others do not: elsewhere, and between
hosts, `megapar.transport` goes through the process group.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import platform
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

FOLDER = Path("/dev/shm")
RING = 4
"""Operations that may be under way at once."""
MOST_BYTES = 48 << 20
"""Of all tags of an axis; containers often grant 64 MiB of shared memory in all."""
LARGEST_SLOT = 4 << 20
LINE = 64
"""Bytes of a cache line: what different ranks write lies on different ones. A rank's holds its counter, then RING signatures."""
SPINS, PATIENCE, NAP = 200, 0.02, 1e-4
"""Looks at a counter before yielding the core each time; seconds until naps replace that; seconds of a nap."""


class CommunicationError(RuntimeError):
    """A rank that this one needs died, did not come in time, or was in another collective. The axis cannot be used any more."""


class Kind(IntEnum):
    """Which collective a tensor was posted for."""

    ALL_REDUCE = 1
    ALL_GATHER = 2
    REDUCE_SCATTER = 3


class OneOrder:
    """What ranks use in one order. After a failure in the middle, also by Ctrl-C, they may no longer agree on it: no more use then."""

    _broken: BaseException | None = None

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """what: of which one is inside."""
        if self._broken is not None:
            raise CommunicationError(f"an earlier {what} of this axis failed ({self._broken}): start the ranks again") from self._broken
        try:
            yield
        except BaseException as error:
            self._broken = error
            raise


class SharedMemory(OneOrder):
    """One rank's view of the memory of an axis. `start` posts a tensor, `Posted.wait` gives everyone's."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, slot: int, processes: list[int], timeout: float) -> None:
        self.rank, self.size, self.slot, self.timeout = rank, size, slot, timeout
        lines = np.frombuffer(memory, np.int64, count=2 * size * LINE // 8).reshape(2, size, LINE // 8)
        self._posted, self._signatures = lines[0, :, 0], lines[0, :, 1 : 1 + RING]
        self._finished, self._left = lines[1, :, 0], lines[1, :, 1]
        data = torch.frombuffer(memory, dtype=torch.uint8, offset=2 * size * LINE)
        self._slots = data.view(size, RING, slot).unbind()
        self._processes = processes
        self._started = 0
        self._under_way: deque[Posted] = deque()

    def start(self, kind: Kind, x: Tensor, read: Callable[[list[Tensor]], Tensor], subject: int = 0) -> Posted:
        """Posts contiguous `x`, at most `slot` bytes; `read` makes the result of every rank's tensor, by rank.

        It does so when it is waited for, or in a later `start` that needs its slot, and must start nothing on this memory itself.

        subject: what it is about, below 2^31, which has to be the same on all ranks.
        """
        with self._whole("collective"):
            self._started += 1
            if len(self._under_way) == RING:
                self._under_way[0].wait()
            self._spin(self._finished, self._started - RING)
            posted = Posted(self, self._started, kind, x, read, subject)
            self._view(self.rank, posted).copy_(x)
            self._signatures[self.rank, posted.number % RING] = posted.signature
            self._posted[self.rank] = self._started
            self._under_way.append(posted)
            return posted

    def finish(self, posted: Posted) -> Tensor:
        """Reads an operation once all ranks have posted it, and gives back the slots of those that are finished in a row."""
        with self._whole("collective"):
            self._spin(self._posted, posted.number)
            for rank in range(self.size):
                self._compare(rank, posted)
            result = posted.read([self._view(r, posted) for r in range(self.size)])
            posted.done = True
            while self._under_way and self._under_way[0].done:
                self._finished[self.rank] = self._under_way.popleft().number
            return result

    def leave(self) -> None:
        """Ends every wait of the other ranks for this one, now and later, with an error."""
        self._left[self.rank] = 1

    def _compare(self, rank: int, posted: Posted) -> None:
        theirs = int(self._signatures[rank, posted.number % RING])
        if theirs != posted.signature:
            mine, other = (_described(signature) for signature in (posted.signature, theirs))
            raise CommunicationError(f"rank {rank} of the axis is in {other}, this one in {mine}: give all ranks the same calls and shapes")

    def _view(self, rank: int, posted: Posted) -> Tensor:
        return self._slots[rank][posted.number % RING][: posted.bytes].view(posted.dtype).view(posted.shape)

    def _spin(self, counters: np.ndarray, number: int) -> None:
        for rank in range(self.size):
            spins, begin = 0, 0.0
            while counters[rank] < number:
                spins += 1
                if spins > SPINS:
                    begin = begin or time.monotonic()
                    why = self._pause(rank, time.monotonic() - begin)
                    # It may have posted its last and ended while this rank slept: only a counter that is still behind counts.
                    if why and counters[rank] < number:
                        raise CommunicationError(why)

    def _pause(self, rank: int, waited: float) -> str | None:
        """Lets others run while this rank waits for `rank`; why there is no more use in waiting, if so."""
        if waited < PATIENCE:
            os.sched_yield()
            return None
        time.sleep(NAP)
        return trouble(rank, bool(self._left[rank]), self._processes[rank], waited, self.timeout)


class Posted:
    """An operation under way."""

    def __init__(
        self, memory: SharedMemory, number: int, kind: Kind, x: Tensor, read: Callable[[list[Tensor]], Tensor], subject: int
    ) -> None:
        self.memory, self.number, self.read, self.done = memory, number, read, False
        self.shape, self.dtype, self.bytes = x.shape, x.dtype, x.numel() * x.element_size()
        self.signature = (subject << 32) + x.numel() * 64 + (x.element_size() - 1) * 8 + kind
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        if self._result is None:
            self._result = self.memory.finish(self)
        return self._result


def _described(signature: int) -> str:
    subject, rest = divmod(signature, 1 << 32)
    return f"{Kind(rest % 8).name} {f'number {subject} ' if subject else ''}of {rest // 64} x {rest // 8 % 8 + 1} bytes"


def connect(rank: int, size: int, group: dist.ProcessGroup, timeout: float, tags: int = 1) -> SharedMemory | None:
    """Memory for collectives of all ranks of the group, or None, on all of them, where they cannot share any. tags: how many such they
    make."""
    slot = min(LARGEST_SLOT, MOST_BYTES // (tags * size * RING)) // LINE * LINE
    shared = map_together(2 * size * LINE + size * RING * slot, rank, size, group)
    return None if shared is None else SharedMemory(shared[0], rank, size, slot, shared[1], timeout)


def map_together(total: int, rank: int, size: int, group: dist.ProcessGroup) -> tuple[mmap.mmap, list[int]] | None:
    """`total` bytes of zeros that all ranks of the group map, and the process of each; None, on all of them, where they cannot.

    Three small collectives, and a file that exists only until every rank has mapped it.
    """
    if len(set(_everyone(_host(), size, group))) > 1 or _host() == 0:
        return None
    created = _create(total) if rank == 0 else 0
    try:
        name = _everyone(created, size, group)[0]
        memory = _map(_path(name), total) if name else None
        processes = _everyone(0 if memory is None else os.getpid(), size, group)
    finally:
        if created:
            _path(created).unlink()
    return None if memory is None or 0 in processes else (memory, processes)


def trouble(rank: int, left: bool, process: int, waited: float, timeout: float) -> str | None:
    """Why there is no more use in waiting for a rank of the axis, if so."""
    if left:
        return f"rank {rank} of the axis failed and left: see its output, and start the ranks again"
    if process_is_gone(process):
        return f"rank {rank} of the axis died (process {process}): see its output, and start the ranks again"
    if waited > timeout:
        return f"rank {rank} of the axis did not come within {timeout:.0f} s: it hangs or is slower, raise the timeout if so"
    return None


def process_is_gone(process: int) -> bool:
    """Whether a process of this host has ended, reaped or not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    # The field after the name in parentheses is the state; Z is a process that ended and was not waited for.
    return status.rpartition(")")[2].split()[0] == "Z"


def _host() -> int:
    """Equal where processes see the same memory and process numbers; 0 where none is shared, or the processor keeps no order of stores."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if platform.machine() not in ("x86_64", "AMD64") or not FOLDER.is_dir() or not boot.exists():
        return 0
    place = f"{boot.read_text()} {FOLDER.stat().st_dev} {os.readlink('/proc/self/ns/pid')}"
    digest = hashlib.sha256(place.encode()).digest()
    return int.from_bytes(digest[:7], "little") + 1


def _everyone(value: int, size: int, group: dist.ProcessGroup) -> list[int]:
    values = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(values, torch.tensor([value]), group=group)
    return [int(v) for v in values]


def _path(name: int) -> Path:
    return FOLDER / f"megapar-{name:016x}"


def _create(total: int) -> int:
    """The name of a new file of zeros with its pages reserved; 0 if there is no room, where touching them would kill the process."""
    name = secrets.randbits(62) + 1
    try:
        descriptor = os.open(_path(name), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return 0
    try:
        os.posix_fallocate(descriptor, 0, total)
    except OSError:
        _path(name).unlink()
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
