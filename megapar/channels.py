"""How CPU ranks of one host send each other messages: through memory that all of them map, one channel for each pair and direction.

A channel is a ring of bytes that one rank writes and the other reads, in order: a header of a line (tag, bytes of the message, where it
is), then the bytes. A message for which there is no room just then travels through the process group, and its header alone through the
channel. So a send does not wait for its reader, who may be in a collective with a rank that waits to send to a neighbour of this one
(tests/pipeline/test_wire.py::test_room), until it is further ahead than a schedule lets two ranks be of each other.

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

from megapar.shared_memory import LINE, MOST_BYTES, CommunicationError, OneOrder, map_together, trouble

LARGEST_CHANNEL = 4 << 20
"""Bytes."""
PARTS = 8
"""A message takes at most one part in so many of a channel, and one part is kept for headers alone."""
MOST_WITHOUT_ROOM = 64
"""Messages to a rank that travel through the process group and that it has not come to: what they take is bounded."""
WITHOUT_ROOM = 1 << 30
"""Added to the tag of a message that found no room: one too large for the channel, of the same tag, may be under way in the group too."""
NAP = 0.02
"""Seconds after which a rank looks whether the one that it waits for is alive."""
RING, GROUP, SKIP = 0, 1, 2
"""Where a message is; or: nowhere, the next header is at the start of the ring."""


class Message:
    """One that was asked for; `wait()` returns once it is in `out`, contiguous."""

    def __init__(self, channels: Channels, peer: int, tag: int, out: Tensor) -> None:
        self.channels, self.peer, self.tag, self.out = channels, peer, tag, out
        self.bytes = out.view(-1).view(torch.uint8)
        self.done = self.bytes.numel() == 0  # nobody sends nothing
        self.work: dist.Work | None = None  # while it travels through the process group
        self.early: Message | None = None  # the same, if it was read before it was asked for

    def wait(self) -> None:
        self.channels.finish(self)


class Channels(OneOrder):
    """One rank's ends of the channels between the ranks of an axis. Messages of a pair and tag keep their order."""

    def __init__(
        self, memory: mmap.mmap, rank: int, size: int, capacity: int, processes: list[int], timeout: float, group: dist.ProcessGroup
    ) -> None:
        self.rank, self.size, self.capacity, self.timeout, self.group = rank, size, capacity, timeout, group
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
        # By reader: what travels through the process group, and where in the channel its header ends.
        self._without_room: dict[int, deque[tuple[int, Tensor, dist.Work]]] = defaultdict(deque)

    def take(self, x: Tensor) -> bool:
        """Whether messages of this size, the same on both ranks, are for the channel."""
        return x.numel() * x.element_size() <= self.capacity // PARTS

    def send(self, x: Tensor, peer: int, tag: int) -> None:
        """Sends contiguous `x`, which the caller may forget or write to from then on."""
        data = x.view(-1).view(torch.uint8)
        size, pair = data.numel(), (self.rank, peer)
        if size == 0:
            return
        with self._whole("message"):
            start = int(self._written[pair]) % self.capacity
            skipped = self.capacity - start if start + LINE + size > self.capacity else 0
            if self._room(pair) - skipped - LINE - _whole_lines(size) < self.capacity // PARTS:
                self._forget_read(peer, MOST_WITHOUT_ROOM - 1)
                self._write(pair, start, (tag, size, GROUP), LINE)
                kept = x.clone()
                with _group_errors():
                    work = self.group.send([kept], peer, tag + WITHOUT_ROOM)
                self._without_room[peer].append((int(self._written[pair]), kept, work))
                return
            if skipped:
                self._write(pair, start, (0, 0, SKIP), skipped)
                start = 0
            self._rings[pair][start + LINE : start + LINE + size].copy_(data)
            self._write(pair, start, (tag, size, RING), LINE + _whole_lines(size))

    def flush(self) -> None:
        """Waits until all that was sent has been read. Else the next wait for a rank far behind would be a long one, and time out."""
        with self._whole("message"):
            for peer in range(self.size):
                self._forget_read(peer, 0)
                pair = self.rank, peer
                self._until(lambda pair=pair: self._read[pair] == self._written[pair], peer)  # type: ignore[misc]

    def receive(self, out: Tensor, peer: int, tag: int) -> Message:
        """Asks for the next message of this tag from `peer`, which must be as long as contiguous `out`."""
        message = Message(self, peer, tag, out)
        if message.done:
            return message
        with self._whole("message"):
            if early := self._early[peer, tag]:
                message.early = early.popleft()
            else:
                self._asked[peer, tag].append(message)
                self._look_for(message)
        return message

    def finish(self, message: Message) -> None:
        """Waits for it."""
        with self._whole("message"):
            if message.early is not None:
                self._arrive(message.early)
                self._deliver(message, message.early.bytes.numel(), message.early.bytes)
                message.early = None
            self._arrive(message)

    def leave(self) -> None:
        """Ends every wait of the other ranks for this one, now and later, with an error."""
        self._left[self.rank] = 1
        for peer in range(self.size):
            self._bells.ring(peer)

    def _write(self, pair: tuple[int, int], start: int, header: tuple[int, int, int], size: int) -> None:
        """Writes a header and lets the reader have it and what is behind it, `size` bytes in all."""
        self._headers[pair][start // 8 : start // 8 + 3] = header
        self._written[pair] += size
        self._bells.ring(pair[1])

    def _arrive(self, message: Message) -> None:
        self._until(lambda: self._look_for(message), message.peer)
        if message.work is not None:
            with _group_errors():
                message.work.wait()
            message.work, message.done = None, True

    def _forget_read(self, peer: int, most: int) -> None:
        """Waits until at most so many messages that found no room are left which the reader has not come to, and drops the others."""
        waiting, pair = self._without_room[peer], (self.rank, peer)
        while waiting and (len(waiting) > most or self._read[pair] >= waiting[0][0]):
            end, _, work = waiting[0]
            self._until(lambda end=end: self._read[pair] >= end, peer)  # type: ignore[misc]
            with _group_errors():
                work.wait()
            waiting.popleft()

    def _look_for(self, message: Message) -> bool:
        """Reads the channel as far as this message; whether it has come that far."""
        pair = message.peer, self.rank
        while not message.done and message.work is None and self._read[pair] < self._written[pair]:
            start = int(self._read[pair]) % self.capacity
            tag, size, place = self._headers[pair][start // 8 : start // 8 + 3].tolist()
            if place == SKIP:
                self._read[pair] += self.capacity - start
                continue
            data = self._rings[pair][start + LINE : start + LINE + size] if place == RING else None
            if asked := self._asked[message.peer, tag]:
                self._deliver(asked.popleft(), size, data)
            else:
                early = Message(self, message.peer, tag, torch.empty(size, dtype=torch.uint8))
                self._deliver(early, size, data)
                self._early[message.peer, tag].append(early)
            self._read[pair] += LINE + (0 if data is None else _whole_lines(size))
            if self._read[pair] == self._written[pair]:
                self._bells.ring(message.peer)  # which may be in `flush`
        return message.done or message.work is not None

    def _deliver(self, message: Message, size: int, data: Tensor | None) -> None:
        """Gives the message its bytes, or starts receiving them through the process group."""
        if message.bytes.numel() != size:
            raise CommunicationError(
                f"message {message.tag} of rank {message.peer} of the axis has {size} bytes, this rank expects {message.bytes.numel()}: "
                "give all ranks the same shapes"
            )
        if data is not None:
            message.bytes.copy_(data)
            message.done = True
        else:
            with _group_errors():
                message.work = self.group.recv([message.out], message.peer, message.tag + WITHOUT_ROOM)

    def _until(self, ready: Callable[[], bool], peer: int) -> None:
        """Waits for something that `peer` does."""
        begin = looked = time.monotonic()
        why, read = None, int(self._read[self.rank, peer])
        while True:
            heard = self._bells.heard()
            if ready():
                return
            if why:  # it may have sent its last and ended: that was looked for once more
                raise CommunicationError(why)
            if not self._left[peer]:
                self._bells.sleep(heard, NAP)
            now = time.monotonic()
            if self._left[peer] or now - looked >= NAP:
                looked = now
                if read != self._read[self.rank, peer]:
                    begin, read = now, int(self._read[self.rank, peer])  # it is slow, and comes on
                why = trouble(peer, bool(self._left[peer]), self._processes[peer], now - begin, self.timeout)

    def _room(self, pair: tuple[int, int]) -> int:
        return self.capacity - int(self._written[pair] - self._read[pair])


@contextmanager
def _group_errors() -> Iterator[None]:
    """What the process group raises, as the error of a rank that is gone or does not come."""
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(str(error)) from error


class _Bells:
    """A word for each rank, on which it sleeps: futex(2) through libc, for which Python has no function of its own."""

    SYSTEM_CALL, WAIT, WAKE = 202, 0, 1
    """Of x86-64."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int) -> None:
        self._rank, self._rung = rank, 0
        self._words = np.frombuffer(memory, np.uint32, count=size * LINE // 4).reshape(size, LINE // 4)[:, 0]
        self._addresses = [ctypes.c_void_p(self._words.ctypes.data + LINE * r) for r in range(size)]
        self._call = ctypes.CDLL(None).syscall

    def ring(self, rank: int) -> None:
        """Wakes a rank, or keeps it from falling asleep: writes what no other rank writes and this one has not lately."""
        self._rung = (self._rung + 1) % (1 << 24)
        self._words[rank] = (self._rank % 256 << 24) + self._rung
        self._call(self.SYSTEM_CALL, self._addresses[rank], self.WAKE, 1, None)

    def heard(self) -> int:
        """To be asked before looking at what may have changed, and given to `sleep`."""
        return int(self._words[self._rank])

    def sleep(self, heard: int, seconds: float) -> None:
        """Until the bell rings, unless it has since `heard`, or so many seconds."""
        limit = (ctypes.c_long * 2)(0, int(seconds * 1e9))
        self._call(self.SYSTEM_CALL, self._addresses[self._rank], self.WAIT, ctypes.c_uint32(heard), limit)


def connect_channels(rank: int, size: int, group: dist.ProcessGroup, timeout: float) -> Channels | None:
    """Channels between all ranks of the group, or None, on all of them, where they cannot share memory."""
    capacity = min(LARGEST_CHANNEL, MOST_BYTES // (size * (size - 1))) // LINE * LINE
    if capacity < PARTS * MOST_WITHOUT_ROOM * LINE:
        return None
    shared = map_together(head_bytes(size) + size * (size - 1) * capacity, rank, size, group)
    return None if shared is None else Channels(shared[0], rank, size, capacity, shared[1], timeout, group)


def head_bytes(size: int) -> int:
    """Of the bells and of the two counters of each channel."""
    return LINE * (size + 2 * size * size)


def _whole_lines(count: int) -> int:
    return -(-count // LINE) * LINE
