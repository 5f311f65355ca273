"""What a rank updates: of every parameter a shard of weight, moments and master, and where that lies in the logical tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megapar.ops.adamw import join, split
from megapar.optim.precision import Precision
from megapar.params import Interval, ParamSpec, Piece
from megapar.zero.layout import boxes

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateBox:
    """A box of a logical tensor of one kind ("weight", "exp_avg", "exp_avg_sq") that this rank holds.

    owned: whether it is this rank's to save. read: its values, fp32 where training has them in fp32. write: takes such values.
    """

    kind: str
    piece: Piece
    owned: bool
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


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
        """Everything that this rank holds. weights: its shards of them. saves: whether they are its to save, of equal copies."""
        for index, (spec, (start, stop)) in enumerate(zip(self.specs, self.intervals, strict=True)):
            for piece, at in boxes(spec, start, stop):
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
            return (join(weight, master) if self.how.master == "remainder" else master.detach()).view(piece.box)

        def write(value: Tensor) -> None:
            flat = value.reshape(-1)
            if self.how.master == "remainder":
                high, low = split(flat.float())
                weight.copy_(high)
                master.copy_(low)
            else:
                master.copy_(flat)
                weight.copy_(master)

        return StateBox("weight", piece, owned, read, write)


def _box(kind: str, piece: Piece, owned: bool, flat: Tensor) -> StateBox:
    def write(value: Tensor) -> None:
        flat.copy_(value.reshape(-1))

    return StateBox(kind, piece, owned, lambda: flat.detach().view(piece.box), write)


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
