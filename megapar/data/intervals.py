"""Intervals of sample numbers that are left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Interval = tuple[int, int]


def parse_intervals(text: str, what: str = "the interval") -> tuple[Interval, ...]:
    """`1200:1600 9000:9008` to [1200, 1600) and [9000, 9008). Raises ValueError for what is none."""
    found = []
    for word in text.split():
        start, colon, stop = word.partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise ValueError(f'{what} "{word}" must be two sample numbers, the first below the second: such as 1200:1600')
        found.append((int(start), int(stop)))
    return joined(found)


def joined(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same numbers in order, as few intervals as there can be."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif start < stop:
            found.append((start, stop))
    return tuple(found)


class Remaining:
    """The numbers 0, 1, 2, ... without those in `left_out`."""

    def __init__(self, left_out: Iterable[Interval] = ()) -> None:
        self.left_out = joined(left_out)

    def runs(self, first: int, count: int) -> Iterator[Interval]:
        """The remaining numbers with places first to first + count - 1, as (start, how many) of consecutive ones."""
        number, left = self.number(first), count
        for start, stop in (*self.left_out, (None, None)):
            if stop is not None and stop <= number:
                continue
            size = left if start is None else min(left, start - number)
            if size:
                yield number, size
            left -= size
            if not left:
                return
            number = stop if stop is not None else number

    def number(self, place: int) -> int:
        """The remaining number with that place."""
        number = place
        for start, stop in self.left_out:
            if number < start:
                break
            number += stop - start
        return number
