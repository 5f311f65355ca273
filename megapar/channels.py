"""How CPU ranks of one host send each other messages: through memory that all of them map, one channel for each pair and direction.

A channel is a ring of bytes that one rank writes and the other reads, in order: a header of a line (tag, bytes that follow, bytes of the
whole message), then the bytes. A message that finds room is sent without waiting for its reader; of a larger one as much as there is room
for, piece by piece. A rank that waits, for a message or for room, takes whatever has come from everyone, also what it asks for only later:
so two ranks that fill each other's channels do not wait for each other (tests/test_channels.py::test_both_full).

Who has nothing to do sleeps, as ranks often share a core, until its bell rings: a word of the memory that the kernel can wait on.

This relies on the order of stores, as `megapar.shared_memory` does.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megapar.shared_memory import LINE, MOST_BYTES, CommunicationError, map_together, trouble

LARGEST_CHANNEL = 4 << 20
"""Bytes."""
NAP = 0.02
"""Seconds of sleep after which a rank looks whether the one that it waits for is alive."""


class Message:
    """One that was asked for; `wait()` returns once it is in `out`, contiguous."""

    def __init__(self, channels: Channels, peer: int, tag: int, out: Tensor) -> None:
        self.peer, self.tag, self.channels = peer, tag, channels
        self.bytes, self.arrived = out.view(-1).view(torch.uint8), 0
        self.early: Message | None = None  # the same one, if it came before it was asked for

    @property
    def done(self) -> bool:
        return self.arrived == self.bytes.numel()

    def take(self, piece: Tensor) -> None:
        self.bytes[self.arrived : self.arrived + piece.numel()].copy_(piece)
        self.arrived += piece.numel()

    def wait(self) -> None:
        self.channels.finish(self)


class Channels:
    """One rank's ends of the channels between the ranks of an axis. Messages of a pair and tag keep their order."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, capacity: int, processes: list[int], timeout: float) -> None:
        self.rank, self.size, self.capacity, self.timeout = rank, size, capacity, timeout
        self._processes = processes
        self._bells = _Bells(memory, rank, size)
        # The bytes that have gone through the channel [from, to] so far, each on a line that one rank writes; then the rings.
        lines = np.frombuffer(memory, np.int64, count=head_bytes(size) // 8).reshape(-1, LINE // 8)
        self._left, (self._written, self._read) = lines[:size, 1], lines[size:, 0].reshape(2, size, size)
        rings = np.frombuffer(memory, np.uint8, offset=head_bytes(size)).reshape(size, size - 1, capacity)
        self._rings = {(a, b): torch.from_numpy(rings[a, b - (b > a)]) for a in range(size) for b in range(size) if a != b}
        self._headers = {pair: ring.view(torch.int64).numpy() for pair, ring in self._rings.items()}
        self._asked: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self._early: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self._coming: dict[int, Message] = {}
        self._broken: BaseException | None = None

    def send(self, x: Tensor, peer: int, tag: int) -> None:
        """Returns when all of contiguous `x` is in the channel to `peer`, or read by it."""
        with self._whole():
            left = x.view(-1).view(torch.uint8)
            total = left.numel()
            while left.numel():
                left = left[self._put(left, peer, tag, total) :]

    def receive(self, out: Tensor, peer: int, tag: int) -> Message:
        """Asks for the next message of this tag from `peer`, which must be as long as contiguous `out`."""
        message = Message(self, peer, tag, out)
        if message.done:  # of nothing, which nobody sends
            return message
        if early := self._early[peer, tag]:
            message.early = early.popleft()
        else:
            self._asked[peer, tag].append(message)
        return message

    def finish(self, message: Message) -> None:
        """Waits for it."""
        with self._whole():
            early = message.early or message
            self._until(lambda: early.done, message.peer)
            if message.early is not None:
                self._compare(message, early.bytes.numel())
                message.take(early.bytes)
                message.early = None

    def leave(self) -> None:
        """Ends every wait of the other ranks for this one, now and later, with an error."""
        self._left[self.rank] = 1
        for peer in self._others():
            self._bells.ring(peer)

    def _put(self, data: Tensor, peer: int, tag: int, total: int) -> int:
        """Writes as much of `data` as there is room for, at least a byte or the end of the ring; how much that is."""
        pair = self.rank, peer
        wanted = min(LINE + data.numel(), self.capacity // 2)
        if self._room(pair) < wanted:
            self._until(lambda: self._room(pair) >= wanted, peer)
        start = int(self._written[pair]) % self.capacity
        count = min(data.numel(), self._room(pair) - LINE, self.capacity - start - LINE)
        self._headers[pair][start // 8 : start // 8 + 3] = tag, count, total
        self._rings[pair][start + LINE : start + LINE + count].copy_(data[:count])
        self._written[pair] += LINE + _whole_lines(count)
        self._bells.ring(peer)
        return count

    def _take(self, peer: int) -> None:
        """Reads the next piece from `peer`."""
        pair = peer, self.rank
        start = int(self._read[pair]) % self.capacity
        tag, count, total = self._headers[pair][start // 8 : start // 8 + 3].tolist()
        if peer not in self._coming:
            self._coming[peer] = self._awaited(peer, tag, total)
        message = self._coming[peer]
        message.take(self._rings[pair][start + LINE : start + LINE + count])
        if message.done:
            del self._coming[peer]
        self._read[pair] += LINE + _whole_lines(count)
        # Who finds half of the channel empty does not wait for room. Should it have filled it meanwhile, it looks again after a nap.
        if self._room(pair) - LINE - _whole_lines(count) < self.capacity // 2:
            self._bells.ring(peer)

    def _awaited(self, peer: int, tag: int, total: int) -> Message:
        """Whoever asked for the message that begins."""
        if asked := self._asked[peer, tag]:
            message = asked.popleft()
            self._compare(message, total)
        else:
            message = Message(self, peer, tag, torch.empty(total, dtype=torch.uint8))
            self._early[peer, tag].append(message)
        return message

    def _until(self, ready: Callable[[], bool], peer: int) -> None:
        """Waits for something that `peer` does."""
        begin, why = time.monotonic(), None
        while True:
            heard = self._bells.heard()
            for other in self._others():
                while self._read[other, self.rank] < self._written[other, self.rank]:
                    self._take(other)
            if ready():
                return
            if why:  # it may have sent its last and ended: that was looked for once more
                raise CommunicationError(why)
            if self._left[peer] or not self._bells.sleep(heard, NAP):
                why = trouble(peer, bool(self._left[peer]), self._processes[peer], time.monotonic() - begin, self.timeout)

    def _compare(self, message: Message, total: int) -> None:
        if message.bytes.numel() != total:
            raise CommunicationError(
                f"message {message.tag} of rank {message.peer} of the axis has {total} bytes, this rank expects {message.bytes.numel()}: "
                "give all ranks the same shapes"
            )

    def _room(self, pair: tuple[int, int]) -> int:
        return self.capacity - int(self._written[pair] - self._read[pair])

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is left in the middle, also by Ctrl-C, would leave half a message in a channel."""
        if self._broken is not None:
            raise CommunicationError(f"an earlier message of this axis failed ({self._broken}): start the ranks again") from self._broken
        try:
            yield
        except BaseException as error:
            self._broken = error
            raise


class _Bells:
    """A word for each rank, on which it sleeps: futex(2) through libc, for which Python has no function of its own."""

    SYSTEM_CALL, WAIT, WAKE = 202, 0, 1
    """Of x86-64."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int) -> None:
        self._rank, self._rung = rank, 0
        self._words = np.frombuffer(memory, np.uint32, count=size * LINE // 4).reshape(size, LINE // 4)[:, 0]
        self._addresses = [ctypes.c_void_p(self._words.ctypes.data + LINE * r) for r in range(size)]
        self._call = ctypes.CDLL(None, use_errno=True).syscall

    def ring(self, rank: int) -> None:
        """Wakes a rank, or keeps it from falling asleep: writes what no other rank writes and this one has not lately."""
        self._rung = (self._rung + 1) % (1 << 24)
        self._words[rank] = (self._rank % 256 << 24) + self._rung
        self._call(self.SYSTEM_CALL, self._addresses[rank], self.WAKE, 1, None)

    def heard(self) -> int:
        """To be asked before looking at what may have changed, and given to `sleep`."""
        return int(self._words[self._rank])

    def sleep(self, heard: int, seconds: float) -> bool:
        """Until the bell rings, if it has not since `heard`; whether it did within that time."""
        limit = (ctypes.c_long * 2)(0, int(seconds * 1e9))
        return self._call(self.SYSTEM_CALL, self._addresses[self._rank], self.WAIT, ctypes.c_uint32(heard), limit) == 0 or (
            self.heard() != heard
        )


def connect_channels(rank: int, size: int, group: dist.ProcessGroup, timeout: float) -> Channels | None:
    """Channels between all ranks of the group, or None, on all of them, where they cannot share memory."""
    capacity = min(LARGEST_CHANNEL, MOST_BYTES // (size * (size - 1))) // LINE * LINE
    shared = map_together(head_bytes(size) + size * (size - 1) * capacity, rank, size, group)
    return None if shared is None else Channels(shared[0], rank, size, capacity, shared[1], timeout)


def head_bytes(size: int) -> int:
    """Of the bells and of the two counters of each channel."""
    return LINE * (size + 2 * size * size)


def _whole_lines(count: int) -> int:
    return -(-count // LINE) * LINE
