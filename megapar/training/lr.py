"""Learning rate and weight decay over a run, as functions of where an update ends.

n is the run's position at the end of the update, in the caller's unit (steps, samples or tokens): in (0, total]. So in steps the first
update of a warm-up of w has peak / w, update w has the peak and the last update has exactly the floor; in samples or tokens the last update
has it too, however the batch size changed on the way. There is no update with rate 0, unless the floor is 0.

    n <= w         peak n / w
    constant       peak
    linear         floor + (peak - floor) (1 - x)                   x = (n - w) / (total - w)
    cosine         floor + (peak - floor) (1 + cos(pi x)) / 2       arXiv:1608.03983
    inverse_sqrt   max(floor, peak sqrt(w / n))                     arXiv:1706.03762
    wsd            peak until total - decay, then floor + (peak - floor) f(y), y = (n - (total - decay)) / decay      arXiv:2404.06395
                   f: linear 1 - y, cosine (1 + cos(pi y)) / 2, exponential 2 * 0.5^y - 1, one_minus_sqrt 1 - sqrt(y)

After the total it is the floor; constant and inverse_sqrt, which do not know the total, go on as they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
DecayShape = Literal["linear", "cosine", "exponential", "one_minus_sqrt"]
DecayKind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class RateSchedule:
    """peak, floor: learning rates. total, warmup and decay (wsd: its last part): in the caller's unit.

    Raises ValueError for numbers that are negative or not finite, a floor above the peak, parts longer than the run, inverse_sqrt without
    a warm-up and wsd without a decay, which define it.
    """

    kind: Kind
    peak: float
    total: float
    floor: float = 0.0
    warmup: float = 0.0
    decay: float = 0.0
    decay_shape: DecayShape = "linear"

    def __post_init__(self) -> None:
        _check_name(self.kind, get_args(Kind), "learning rate schedule")
        _check_name(self.decay_shape, get_args(DecayShape), "decay shape")
        _check_numbers(peak=self.peak, floor=self.floor, total=self.total, warmup=self.warmup, decay=self.decay)
        if self.total == 0:
            raise ValueError("total=0 leaves the schedule no update: make the run longer")
        if self.floor > self.peak:
            raise ValueError(f"the lowest learning rate, {self.floor}, is above the peak, {self.peak}: lower it, or raise the peak")
        if self.warmup > self.total:
            raise ValueError(f"warmup={self.warmup} is longer than the run, {self.total}: shorten it, or make the run longer")
        if self.kind == "inverse_sqrt" and self.warmup == 0:
            raise ValueError("inverse_sqrt has its peak at the end of the warm-up, and warmup=0: give it one, or take another schedule")
        if self.kind == "wsd" and self.decay == 0:
            raise ValueError("wsd decays at its end, and decay=0: give it a decay, or take constant")
        if self.kind == "wsd" and self.warmup + self.decay > self.total:
            parts = f"warmup={self.warmup} and decay={self.decay}"
            raise ValueError(f"{parts} are longer than the run together, {self.total}: shorten them, or make the run longer")

    @staticmethod
    def of(
        kind: Kind,
        peak: float,
        total: float,
        *,
        floor: float = 0.0,
        warmup: float = 0.0,
        decay: float = 0.0,
        decay_shape: DecayShape = "linear",
    ) -> RateSchedule:
        """With warm-up and decay as shares of the total, rounded to whole units, where they are below 1, as counts from 1 on."""
        return RateSchedule(kind, peak, total, floor, _count(warmup, total), _count(decay, total), decay_shape)

    def rate(self, position: float) -> float:
        """The rate of the update that ends at `position`. Raises ValueError for a position of 0 or less: no update ends there."""
        _check_position(position)
        if position <= self.warmup:
            return self.peak * (position / self.warmup)
        if self.kind == "constant":
            return self.peak
        if self.kind == "inverse_sqrt":
            return max(self.floor, self.peak * math.sqrt(self.warmup / position))
        if position >= self.total:
            return self.floor
        left = self._left(position)
        return self.peak * left + self.floor * (1 - left)  # exact at both ends

    def _left(self, position: float) -> float:
        """How much of the way down from the peak to the floor is left, 1 to 0."""
        if self.kind != "wsd":
            return _shape(self.kind, (position - self.warmup) / (self.total - self.warmup))
        flat = self.total - self.decay
        return 1.0 if position <= flat else _shape(self.decay_shape, (position - flat) / self.decay)


@dataclass(frozen=True)
class WeightDecaySchedule:
    """From `start` to `end`, which the update at `total` and those after it have: constant (both are the same), linear, or half a cosine
    (Megatron-LM's). Raises ValueError for numbers that are negative or not finite, and a constant that changes."""

    start: float
    end: float
    kind: DecayKind
    total: float

    def __post_init__(self) -> None:
        _check_name(self.kind, get_args(DecayKind), "weight decay schedule")
        _check_numbers(start=self.start, end=self.end, total=self.total)
        if self.total == 0:
            raise ValueError("total=0 leaves the schedule no update: make the run longer")
        if self.kind == "constant" and self.start != self.end:
            raise ValueError(f"a constant weight decay cannot go from {self.start} to {self.end}: take linear or cosine, or one value")

    def value(self, position: float) -> float:
        """The weight decay of the update that ends at `position`. Raises ValueError for a position of 0 or less."""
        _check_position(position)
        if self.kind == "constant" or position >= self.total:
            return self.end
        left = _shape(self.kind, position / self.total)
        return self.start * left + self.end * (1 - left)


def _shape(name: str, x: float) -> float:
    """From 1 at x = 0 to 0 at x = 1."""
    if name == "linear":
        return 1 - x
    if name == "cosine":
        return (1 + math.cos(math.pi * x)) / 2
    if name == "exponential":
        return float(2 * 0.5**x - 1)
    return 1 - math.sqrt(x)


def _count(length: float, total: float) -> float:
    return round(length * total) if 0 < length < 1 else length


def _check_name(name: str, known: tuple[str, ...], what: str) -> None:
    if name not in known:
        raise ValueError(f'"{name}" is no {what}: use one of {", ".join(known)}')


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number of 0 or more: change it")


def _check_position(position: float) -> None:
    if not (math.isfinite(position) and position > 0):
        raise ValueError(f"position={position} is the end of no update: give where it ends, which is more than 0")
