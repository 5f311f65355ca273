"""Who holds what: shards tile parameters, buckets partition them, flat ranges become boxes; thousands of layouts, no process."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapar.params import ParamSpec, Piece
from megapar.zero.layout import ALIGNMENT, Entry, Layout, boxes, make_layout, parts, shard_size, write_columns


@st.composite
def entries(draw, largest: int = 12):
    count = draw(st.integers(1, largest))
    groups = sorted(draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count)))
    sizes = draw(st.lists(st.integers(0, 400), min_size=count, max_size=count))
    units = draw(st.lists(st.sampled_from([1, 1, 3, 16, 24]), min_size=count, max_size=count))
    return [Entry(f"p{i}", size, group, unit) for i, (size, group, unit) in enumerate(zip(sizes, groups, units, strict=True))]


BUCKETS = st.sampled_from([1, 100, 1000, 10**9])


@given(entries(), st.integers(1, 9), BUCKETS, BUCKETS)
def test_shards_tile_each_parameter(found, ranks, bucket, other):
    layout = make_layout(found, ranks, bucket)
    for index, entry in enumerate(found):
        intervals = [layout.interval(index, rank) for rank in range(ranks)]
        assert intervals[0][0] == 0 and intervals[-1][1] == entry.numel
        assert all(stop == start for (_, stop), (start, _) in pairwise(intervals))
        for start, stop in intervals:
            assert start <= stop
            assert start % entry.unit == 0 or start == stop, "units stay whole"
            assert start % ALIGNMENT == 0 or start == stop
        again = make_layout(found, ranks, other)
        assert intervals == [again.interval(index, rank) for rank in range(ranks)], "a shard does not depend on the bucket"


@given(entries(), st.integers(1, 5), BUCKETS, st.integers(1, 500))
def test_columns_are_written_where_they_belong(found, ranks, bucket, width):
    """Whatever the pieces in which rows come."""
    layout = make_layout(found, ranks, bucket)
    sizes = {member.index: member.size for b in layout.buckets for member in b.members}
    values = [torch.arange(ranks * sizes[i]) + 10**6 * i for i in range(len(found))]
    wholes = [torch.full_like(value, -1) for value in values]
    for b in layout.buckets:
        rows = [torch.cat([values[m.index].view(ranks, m.size)[rank] for m in b.members]) for rank in range(ranks)]
        for start in range(0, b.width, width):
            columns = slice(start, min(start + width, b.width))
            write_columns(b, wholes.__getitem__, columns, [row[columns] for row in rows])
    assert all(map(torch.equal, wholes, values))


@given(entries(), st.integers(1, 9), BUCKETS)
def test_buckets_partition_the_parameters(found, ranks, bucket):
    layout = make_layout(found, ranks, bucket)
    assert sorted(member.index for b in layout.buckets for member in b.members) == list(range(len(found)))
    assert [b.number for b in layout.buckets] == list(range(len(layout.buckets)))
    for b in layout.buckets:
        end = 0
        for member in b.members:
            entry = found[member.index]
            assert entry.group == b.group
            assert member.offset == end, "members lie side by side"
            assert member.size == shard_size(entry.numel, ranks, entry.unit)
            end += member.size
        assert b.width == end
    for group in {entry.group for entry in found}:
        mine = [b for b in layout.buckets if b.group == group]
        order = [member.index for b in mine for member in b.members]
        assert order == sorted(order, reverse=True), "last to first"
        for b in mine[:-1]:
            assert b.width * ranks >= bucket
        for b in mine:
            assert (b.width - b.members[-1].size) * ranks < bucket, "a bucket ends as soon as it is large enough"
    groups = [b.group for b in layout.buckets]
    assert groups == sorted(groups, reverse=True), "the last group first, and no group twice"


@given(st.integers(0, 10**6), st.integers(1, 64), st.sampled_from([1, 2, 3, 16, 24, 128]))
def test_padding(numel, ranks, unit):
    size, step = shard_size(numel, ranks, unit), math.lcm(unit, ALIGNMENT)
    assert size % unit == 0 and size % ALIGNMENT == 0
    assert 0 <= size * ranks - numel < ranks * step, "the smallest multiple that holds the parameter"


@given(entries(), st.integers(1, 4), BUCKETS, st.data())
def test_digest(found, ranks, bucket, data):
    layout = make_layout(found, ranks, bucket)
    assert layout.digest == make_layout(list(found), ranks, bucket).digest
    at = data.draw(st.integers(0, len(found) - 1))
    entry = found[at]
    for other in (
        replace(entry, name="other"),
        replace(entry, numel=entry.numel + 1),
        replace(entry, group=entry.group + "z"),
        replace(entry, unit=entry.unit * 2),
    ):
        changed = [*found[:at], other, *found[at + 1 :]]
        assert make_layout(changed, ranks, bucket).digest != layout.digest
    assert make_layout(found, ranks + 1, bucket).digest != layout.digest
    assert len({make_layout(found, ranks, size).buckets for size in (1, 10**9)}) == len(
        {make_layout(found, ranks, size).digest for size in (1, 10**9)}
    )


def test_errors():
    with pytest.raises(ValueError, match="bucket_elements=0 must be 1 or more"):
        make_layout([Entry("p", 3)], 2, 0)
    with pytest.raises(ValueError, match='two parameters are named "p": give the stages of one model'):
        make_layout([Entry("p", 3), Entry("q", 1), Entry("p", 3)], 2, 1)
    assert make_layout([], 2, 1) == Layout((), 2, ())


@st.composite
def specs(draw):
    """Boxes of logical tensors of equal rank and equal trailing sizes, stacked; each may be cut in every dimension."""
    rank = draw(st.integers(0, 4))
    if rank == 0:
        return ParamSpec((Piece.whole("scalar", ()),))
    trailing = draw(st.lists(st.integers(0, 4), min_size=rank - 1, max_size=rank - 1))
    pieces = []
    for number in range(draw(st.integers(1, 3))):
        box = [draw(st.integers(0, 5)), *trailing]
        start = [draw(st.integers(0, 3)) for _ in box]
        stop = [a + n for a, n in zip(start, box, strict=True)]
        shape = [b + draw(st.integers(0, 2)) for b in stop]
        pieces.append(Piece(f"t{number}", tuple(shape), tuple(start), tuple(stop)))
    return ParamSpec(tuple(pieces))


@given(specs(), st.data())
def test_boxes_tile_a_range_in_order(spec, data):
    """Each element of the local tensor carries its place in the logical tensors; the boxes must find the same places there."""
    logical, count = {}, 0
    for piece in spec.pieces:
        size = math.prod(piece.shape)
        logical[piece.name] = torch.arange(count, count + size).view(piece.shape)
        count += size
    parts = [logical[piece.name][piece.index] for piece in spec.pieces]
    local = (torch.cat(parts) if parts[0].dim() else parts[0]).reshape(-1)
    start = data.draw(st.integers(0, local.numel()))
    stop = data.draw(st.integers(start, local.numel()))
    at = start
    for piece, begin in boxes(spec, start, stop):
        assert begin == at and piece.numel > 0
        assert piece.shape == tuple(logical[piece.name].shape)
        assert torch.equal(logical[piece.name][piece.index].reshape(-1), local[begin : begin + piece.numel])
        at += piece.numel
    assert at == stop


@given(specs(), st.integers(1, 5), st.data())
def test_boxes_of_shards_are_few(spec, ranks, data):
    """A contiguous range of a box of d dimensions needs at most 2 d - 1 boxes, and a whole one needs one."""
    for piece in spec.pieces:
        alone = ParamSpec((piece,))
        dimensions = max(len(piece.shape), 1)
        size = -(-piece.numel // ranks)
        for rank in range(ranks):
            found = list(boxes(alone, min(rank * size, piece.numel), min((rank + 1) * size, piece.numel)))
            assert len(found) <= 2 * dimensions - 1
    whole = list(boxes(spec, 0, sum(piece.numel for piece in spec.pieces)))
    assert [piece for piece, _ in whole] == [piece for piece in spec.pieces if piece.numel]


@given(specs(), st.integers(1, 40))
def test_parts_tile_a_box_in_order(spec, elements):
    """They are as few as whole rows allow, and the rows of a box lie together, so that a part is a slice of its memory."""
    for piece in (piece for piece in spec.pieces if piece.numel):
        whole = torch.arange(math.prod(piece.shape)).view(piece.shape)
        local, at = whole[piece.index].reshape(-1), 0
        found = list(parts(piece, elements))
        for part, begin in found:
            assert begin == at
            assert (part.name, part.shape) == (piece.name, piece.shape)
            assert torch.equal(whole[part.index].reshape(-1), local[begin : begin + part.numel])
            at += part.numel
        assert at == piece.numel
        row = math.prod(size for size in piece.box if size > 1) // next((size for size in piece.box if size > 1), 1)
        assert len(found) == (1 if piece.numel <= elements else -(-piece.numel // (row * max(1, elements // row))))
