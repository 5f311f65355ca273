"""What a rank updates: of every parameter a shard of weight, moments and master, and where that lies in the logical tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megapar.ops.adamw import join, split
from megapar.optim.precision import Precision
from megapar.params import Interval, ParamSpec, Piece
from megapar.zero.layout import boxes, parts

MOMENTS = ("exp_avg", "exp_avg_sq")
PART = 1 << 24
"""Elements: 64 MiB in fp32. Boxes are cut to it, so that nobody who copies one needs more room than that, however large a tensor is."""

AT_ONCE = 1 << 20
"""Elements that are joined or split at once."""


class Write(Protocol):
    """What `StateBox.write` is."""

    def __call__(self, value: Tensor, at: tuple[slice, ...] = ()) -> None:
        """Takes values for the part of the box that `at` indexes; all of it by default."""


@dataclass(frozen=True)
class StateBox:
    """A box of a logical tensor of one kind ("weight", "exp_avg", "exp_avg_sq") that this rank holds.

    owned: whether it is this rank's to save. dtype: of its values, fp32 where training has them in fp32. read: these values. write: takes
    such values, from any device and of any dtype.
    """

    kind: str
    piece: Piece
    owned: bool
    dtype: torch.dtype
    read: Callable[[], Tensor]
    write: Write

    @property
    def bytes(self) -> int:
        return self.piece.numel * self.dtype.itemsize


class ShardedState:
    """Moments and masters of the elements `intervals` of `params`; the masters have the parameters' values as they are now."""

    def __init__(
        self, params: Sequence[nn.Parameter], specs: Sequence[ParamSpec], intervals: Sequence[Interval], how: Precision
    ) -> None:
        self.params, self.specs, self.how, self.intervals = list(params), list(specs), how, list(intervals)
        self.moments: list[tuple[Tensor, Tensor]] = []
        self.masters: list[Tensor] = []
        for param, (start, stop) in zip(self.params, self.intervals, strict=True):
            mine = param.detach().reshape(-1)[start:stop]
            self.moments.append((mine.new_zeros(stop - start, dtype=how.moments), mine.new_zeros(stop - start, dtype=how.moments)))
            if how.master == "fp32":
                self.masters.append(mine.to(torch.float32, copy=True))
            elif how.master == "remainder":
                self.masters.append(split(mine.float())[1])

    def tensors(self) -> list[Tensor]:
        """Moments and masters."""
        return [*(moment for pair in self.moments for moment in pair), *self.masters]

    def boxes(self, weights: Sequence[Tensor], saves: bool) -> Iterator[StateBox]:
        """Everything that this rank holds, in boxes of at most PART elements. weights: its shards of them. saves: whether they are its to
        save, of equal copies."""
        for index, (spec, (start, stop)) in enumerate(zip(self.specs, self.intervals, strict=True)):
            cut = ((piece, at + offset) for box, at in boxes(spec, start, stop) for piece, offset in parts(box, PART))
            for piece, at in cut:
                part = slice(at - start, at - start + piece.numel)
                owned = saves and spec.owner
                yield self._weight_box(index, piece, part, owned, weights[index])
                for kind, moment in zip(MOMENTS, self.moments[index], strict=True):
                    yield _box(kind, piece, owned, moment[part])

    def _weight_box(self, index: int, piece: Piece, part: slice, owned: bool, shard: Tensor) -> StateBox:
        """The weight as its master has it: any precision can go on from it, and each finds its own bits again."""
        weight = shard[part]
        if self.how.master is None:
            return _box("weight", piece, owned, weight)
        master = self.masters[index][part]

        def read() -> Tensor:
            return (_joined(weight, master) if self.how.master == "remainder" else master.detach()).view(piece.box)

        def write(value: Tensor, at: tuple[slice, ...] = ()) -> None:
            high, low = (shard.detach().view(piece.box)[at] for shard in (weight, master))
            if self.how.master == "remainder":
                for part, values in zip((high, low), _split(value.to(high.device, torch.float32).reshape(-1)), strict=True):
                    part.copy_(values.view(part.shape))
            else:
                low.copy_(value)
                high.copy_(low)

        return StateBox("weight", piece, owned, torch.float32, read, write)


def _joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """`join`, of little at a time: it computes with several 64-bit integers for each element."""
    values = torch.empty_like(weight, dtype=torch.float32)
    for value, high, low in zip(values.split(AT_ONCE), weight.detach().split(AT_ONCE), remainder.split(AT_ONCE), strict=True):
        value.copy_(join(high, low))
    return values


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """`split`, of little at a time."""
    halves = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    for value, *both in zip(values.split(AT_ONCE), *(half.split(AT_ONCE) for half in halves), strict=True):
        for half, told in zip(both, split(value), strict=True):
            half.copy_(told)
    return halves


def _box(kind: str, piece: Piece, owned: bool, flat: Tensor) -> StateBox:
    def write(value: Tensor, at: tuple[slice, ...] = ()) -> None:
        flat.detach().view(piece.box)[at].copy_(value)

    return StateBox(kind, piece, owned, flat.dtype, lambda: flat.detach().view(piece.box), write)


def as_saved(found: Iterable[StateBox]) -> list[dict[str, Any]]:
    """The boxes that are this rank's to save, as plain data and tensors of their own."""
    saved = [
        {"kind": b.kind, "name": b.piece.name, "shape": list(b.piece.shape), "start": list(b.piece.start), "values": b.read().clone()}
        for b in found
        if b.owned
    ]
    places = [(box["kind"], box["name"], *box["start"]) for box in saved]
    if len(set(places)) < len(places):
        name = next(place[1] for place in places if places.count(place) > 1)
        raise ValueError(f"two parameters hold {name}: give the stages of a model the names that they have in the whole")
    return saved


def check_states(states: Sequence[Mapping[str, Any]], groups: int) -> None:
    """Raises ValueError unless they are what `state_dict` returned, of an optimizer with as many param_groups."""
    if not states or any(not {"groups", "progress", "boxes"} <= state.keys() for state in states):
        raise ValueError("the state is not what state_dict of a ZeroOptimizer returned: give those of all ranks")
    if len(states[0]["groups"]) != groups:
        raise ValueError(f"the state has other param_groups than the {groups} here: make them as they were saved")


def fill(found: Iterable[StateBox], saved: Sequence[Mapping[str, Any]]) -> None:
    """Writes into each box what the saved ones have in common with it. Raises ValueError, before anything is written, for boxes that the
    saved ones do not cover, and for logical tensors of another shape."""
    by_name: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for told in saved:
        by_name.setdefault((told["kind"], told["name"]), []).append(told)
    values = [(box, _cut(box, by_name.get((box.kind, box.piece.name), []))) for box in found]
    for box, value in values:
        box.write(value)


def _cut(box: StateBox, saved: Sequence[Mapping[str, Any]]) -> Tensor:
    """The values of `box` from those that were saved."""
    piece, filled = box.piece, 0
    value = torch.empty(piece.box, dtype=torch.float32, device=box.read().device)
    for other in saved:
        if tuple(other["shape"]) != piece.shape:
            raise ValueError(f"the saved {box.kind} {piece.name} has shape {other['shape']} and here {list(piece.shape)}: load its own")
        stop = [a + n for a, n in zip(other["start"], other["values"].shape, strict=True)]
        common = piece.overlap(other["start"], stop)
        if common is not None:
            part = other["values"][common[1]]
            value[common[0]] = part
            filled += part.numel()
    if filled != piece.numel:
        what = f"{filled} of the {piece.numel} elements needed of {box.kind} {piece.name}"
        raise ValueError(f"the saved state has {what}: give the states of all ranks")
    return value
