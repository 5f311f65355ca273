"""Who holds what, pure: every parameter in equal flat shards over the data-parallel ranks, and parameters in buckets that travel together.

Rank r holds elements [r c, (r + 1) c) of a parameter's *local* tensor, c = numel / ranks rounded up to a multiple of its unit and of 16
elements. So a shard does not depend on the bucket that its parameter is in: whatever the bucket size, each rank adds the same squares in
the same order and updates the same elements, and weights agree to the last bit (tests/zero/test_bitwise.py). Nor do copies of one
parameter on other ranks, whose shards are summed (`ParamSpec.grad_sum`, `tie`), need buckets of their own.

A bucket travels as [ranks, width], row r the shards of rank r side by side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megapar.params import Interval, ParamSpec, Piece

ALIGNMENT = 16
"""Elements: shards of 16-bit parameters begin at multiples of 32 bytes, as vector loads want it."""


@dataclass(frozen=True)
class Entry:
    """A parameter as the layout sees it. group: parameters of different groups share no bucket (a pipeline stage, a block)."""

    name: str
    numel: int
    group: str = ""
    unit: int = 1


@dataclass(frozen=True)
class Member:
    """A parameter in a bucket: number `index` of the list, its shards of `size` elements at `offset` of each row."""

    index: int
    size: int
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together. width: elements of a row."""

    number: int
    group: str
    members: tuple[Member, ...]
    width: int


@dataclass(frozen=True)
class Layout:
    """Entries, their shards over `ranks`, and buckets in the order in which they are reduced."""

    entries: tuple[Entry, ...]
    ranks: int
    buckets: tuple[Bucket, ...]

    @property
    def digest(self) -> str:
        """Differs if names, sizes, groups or buckets do."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def interval(self, index: int, rank: int) -> Interval:
        """The elements of parameter `index` that `rank` holds, without padding: maybe none."""
        entry = self.entries[index]
        size = shard_size(entry.numel, self.ranks, entry.unit)
        return min(rank * size, entry.numel), min((rank + 1) * size, entry.numel)


def shard_size(numel: int, ranks: int, unit: int = 1) -> int:
    """Elements of each rank's shard, padding included."""
    step = math.lcm(unit, ALIGNMENT)
    return -(-numel // (ranks * step)) * step


def make_layout(entries: Sequence[Entry], ranks: int, bucket_elements: int) -> Layout:
    """Buckets of at least `bucket_elements` elements, but the last of each group; parameters last to first, as backward comes to them.

    Raises ValueError for bucket_elements < 1, and for names that occur twice.
    """
    if bucket_elements < 1:
        raise ValueError(f"bucket_elements={bucket_elements} must be 1 or more: raise it, a bucket holds a whole parameter at least")
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'two parameters are named "{twice}": give the stages of one model, whose names are those of the whole')
    groups: dict[str, list[int]] = {}
    for index, entry in enumerate(entries):
        groups.setdefault(entry.group, []).append(index)
    buckets: list[Bucket] = []
    for group, indices in reversed(groups.items()):
        members: list[Member] = []
        width = 0
        for index in reversed(indices):
            size = shard_size(entries[index].numel, ranks, entries[index].unit)
            members.append(Member(index, size, width))
            width += size
            if index == indices[0] or width * ranks >= bucket_elements:
                buckets.append(Bucket(len(buckets), group, tuple(members), width))
                members, width = [], 0
    return Layout(tuple(entries), ranks, tuple(buckets))


def write_columns(bucket: Bucket, whole: Callable[[int], Tensor], columns: slice, parts: Sequence[Tensor] | Tensor) -> None:
    """Writes some columns of every rank's row of a bucket where they belong.

    whole(i): parameter i, flat, every rank's shard after the other's. parts: each rank's row, only its `columns`; or one tensor of them.
    """
    for member in bucket.members:
        start, stop = max(columns.start, member.offset), min(columns.stop, member.offset + member.size)
        if start < stop:
            rows = whole(member.index).view(len(parts), -1)[:, start - member.offset : stop - member.offset]
            mine = slice(start - columns.start, stop - columns.start)
            if isinstance(parts, Tensor):
                rows.copy_(parts[:, mine])  # one kernel on a GPU, however many ranks
                continue
            for row, part in zip(rows, parts, strict=True):
                row.copy_(part[mine])


def boxes(spec: ParamSpec, start: int, stop: int) -> Iterator[tuple[Piece, int]]:
    """Elements [start, stop) of a parameter's local tensor as boxes of its logical tensors, each with where it begins there."""
    base = 0
    for piece in spec.pieces:
        low, high = max(start - base, 0), min(stop - base, piece.numel)
        if low < high:
            for box, at in _box_parts(piece, low, high):
                yield box, base + at
        base += piece.numel


def parts(piece: Piece, elements: int) -> Iterator[tuple[Piece, int]]:
    """A box as boxes of at most `elements`, but whole rows, each with where it begins: cut along its first dimension longer than 1."""
    dimension = next((d for d, size in enumerate(piece.box) if size > 1), None)
    if dimension is None or piece.numel <= elements:
        yield piece, 0
        return
    row = math.prod(piece.box[dimension + 1 :])
    rows = max(1, elements // row)
    for first in range(0, piece.box[dimension], rows):
        start, stop = list(piece.start), list(piece.stop)
        start[dimension] += first
        stop[dimension] = min(start[dimension] + rows, stop[dimension])
        yield replace(piece, start=tuple(start), stop=tuple(stop)), first * row


def _box_parts(piece: Piece, low: int, high: int) -> Iterator[tuple[Piece, int]]:
    """Elements [low, high) of a box, in row-major order: part of a first row, whole rows, part of a last one."""
    if not piece.shape:
        yield piece, 0
        return
    row = math.prod(piece.box[1:])
    first, last = -(-low // row), high // row
    if first > last:  # inside one row
        yield from _in_row(piece, last, low, high, row)
        return
    if low < first * row:
        yield from _in_row(piece, first - 1, low, first * row, row)
    if first < last:
        start = (piece.start[0] + first, *piece.start[1:])
        yield replace(piece, start=start, stop=(piece.start[0] + last, *piece.stop[1:])), first * row
    if last * row < high:
        yield from _in_row(piece, last, last * row, high, row)


def _in_row(piece: Piece, index: int, low: int, high: int, row: int) -> Iterator[tuple[Piece, int]]:
    """Elements [low, high) of a box, all in its row `index`."""
    inner = Piece(piece.name, piece.shape[1:], piece.start[1:], piece.stop[1:])
    at = piece.start[0] + index
    for box, offset in _box_parts(inner, low - index * row, high - index * row):
        yield Piece(piece.name, piece.shape, (at, *box.start), (at + 1, *box.stop)), index * row + offset
