"""The batch size over a run: stages that begin at so many samples, however many steps those took.

A step that starts when c samples have been consumed has the batch size of the last stage whose threshold is at most c. So no step straddles
a threshold, a stage begins at the first step that starts at or after its own, and one that is over before any step starts is skipped.
Which samples a step takes is a function of c: a resumed run needs no other state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

Scaling = Literal["none", "sqrt", "linear"]
EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
"""Of the ratio of batch sizes, by how the learning rate follows it."""

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMBT]?)")


class Run(NamedTuple):
    """Steps of one batch size, up to the next Run's."""

    first_step: int
    first_sample: int
    batch_size: int


@dataclass(frozen=True)
class BatchSchedule:
    """stages: (threshold in samples, batch size in samples), the first threshold 0, each after the one before. Sizes may fall as well as
    rise. Raises ValueError for anything else."""

    stages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        _check_stages(self.stages, "samples")

    @staticmethod
    def parse(text: str | int, sequence_length: int = 1) -> BatchSchedule:
        """`16`, or stages as `0:64 2M:128 10M:256`, thresholds in samples, or in tokens: `0:64 250M:128 tokens`. A token threshold is
        that of the first sample that starts at or after it, samples being `sequence_length` long. Raises ValueError for other texts."""
        if isinstance(text, int):
            return BatchSchedule(((0, text),))
        words, unit, length = _unit(text, sequence_length)
        if not words:
            raise ValueError(f'"{text}" gives no batch size: write one, as 16, or stages of samples, as 0:64 2M:128')
        if len(words) == 1 and ":" not in words[0]:
            if text.split() != words:
                raise ValueError(f'"{text}" names a unit, which is for thresholds, and has none: write {words[0]}, which are samples')
            return BatchSchedule(((0, parse_amount(words[0])),))
        stages = []
        for word in words:
            threshold, colon, size = word.partition(":")
            if not colon:
                raise ValueError(f'"{text}": "{word}" is no stage: write threshold:batch_size, as 2M:128, and samples or tokens at the end')
            stages.append((parse_amount(threshold), parse_amount(size)))
        _check_stages(stages, unit)
        # Of thresholds within one sample the last one holds.
        return BatchSchedule(tuple({_ceil(threshold, length): size for threshold, size in stages}.items()))

    @staticmethod
    def ramp(text: str, batch_size: int, sequence_length: int = 1) -> BatchSchedule:
        """From `start increment samples`, as `16 8 1M`, or `16 8 2B tokens`, up to `batch_size` in steps of equal length (Megatron's):

            start + increment * floor(consumed / (samples / ((batch_size - start) / increment)))

        and batch_size from `samples` on. Raises ValueError for other texts, and sizes that increments do not reach.
        """
        words, _, length = _unit(text, sequence_length)
        if len(words) != 3:
            raise ValueError(f'"{text}" is no ramp-up: write start, increment and over how many samples, as 16 8 1M, or 16 8 2B tokens')
        start, increment, over = (parse_amount(word) for word in words)
        for name, value in (("start", start), ("increment", increment), ("length", over), ("batch size", batch_size)):
            if value < 1:
                raise ValueError(f'the {name} of ramp-up "{text}" is {value} and must be at least 1: raise it')
        if start > batch_size or (batch_size - start) % increment:
            reached = start + max(0, batch_size - start) // increment * increment
            told = f'ramp-up "{text}" does not reach batch size {batch_size} from {start} in increments of {increment}'
            raise ValueError(f"{told}: take batch size {reached} or {reached + increment}, or another start or increment")
        count = (batch_size - start) // increment
        later = {_ceil(k * over, count * length): start + k * increment for k in range(1, count + 1)}
        return BatchSchedule(((0, start), *later.items()))

    def __str__(self) -> str:
        """What `parse` reads."""
        return " ".join(f"{threshold}:{size}" for threshold, size in self.stages) if len(self.stages) > 1 else str(self.last)

    @property
    def last(self) -> int:
        """The batch size that the run ends with, if it is long enough."""
        return self.stages[-1][1]

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The stages in which a step starts, by steps."""
        found, step, consumed = [], 0, 0
        for (_, size), (end, _) in pairwise(self.stages):
            if consumed < end:
                found.append(Run(step, consumed, size))
                taken = _ceil(end - consumed, size)
                step, consumed = step + taken, consumed + taken * size
        return (*found, Run(step, consumed, self.last))

    def batch_at(self, consumed: int) -> int:
        """The batch size of the step that starts when so many samples have been consumed."""
        _refuse_negative(consumed, "samples")
        return next(size for threshold, size in reversed(self.stages) if threshold <= consumed)

    def samples_after(self, steps: int) -> int:
        """How many samples the first `steps` steps consume."""
        _refuse_negative(steps, "steps")
        first_step, first_sample, size = next(run for run in reversed(self.runs) if run.first_step <= steps)
        return first_sample + (steps - first_step) * size

    def steps(self, samples: int) -> int:
        """How many whole steps so many samples are enough for; they consume `samples_after(steps(samples))`, less than a step fewer."""
        _refuse_negative(samples, "samples")
        first_step, first_sample, size = next(run for run in reversed(self.runs) if run.first_sample <= samples)
        return first_step + (samples - first_sample) // size

    def check(self, dp: int, micro_batch_size: int, for_count: Callable[[int], object] | None = None) -> None:
        """Raises ValueError unless every stage, reached or not, is whole micro-batches on every replica. for_count: is called with each
        stage's number of micro-batches a replica, and may raise ValueError: for a pipeline schedule."""
        unit = dp * micro_batch_size
        for number, (threshold, size) in enumerate(self.stages):
            which = f"batch size {size}" + (f" (stage {number}, from sample {threshold})" if len(self.stages) > 1 else "")
            if size % unit:
                below = size // unit * unit
                told = f"{below} or {below + unit}" if below else f"{unit}"
                rule = f"a multiple of dp={dp} x micro_batch_size={micro_batch_size}, {unit} samples"
                raise ValueError(f"{which} must be {rule}: take {told}, or another micro_batch_size")
            try:
                if for_count is not None:
                    for_count(size // unit)
            except ValueError as error:
                raise ValueError(f"{which} is {size // unit} micro-batches: {error}") from error

    def lr_factor(self, batch_size: int, kind: Scaling) -> float:
        """What the learning rate is multiplied by while the batch has this size: 1, or the root of its ratio to the last stage's
        (OLMo-core), or the ratio, so that the configured rate is the last stage's."""
        if kind not in EXPONENTS:
            raise ValueError(f'"{kind}" scales no learning rate: use {", ".join(EXPONENTS)}')
        return float((batch_size / self.last) ** EXPONENTS[kind])


def parse_amount(text: str) -> int:
    """The whole number in a text such as 2000, 250K, 1.5M, 2B or 1T (decimal: K is 1000). Raises ValueError for other texts."""
    found = _AMOUNT.fullmatch(text.strip().upper())
    if found is None:
        raise ValueError(f'"{text}" is no amount: write a number, and K, M, B or T for thousands to trillions, as 250M')
    value = Fraction(found[1]) * _SUFFIXES[found[2]]
    if value.denominator != 1:
        raise ValueError(f'"{text}" is {float(value)} and must be a whole number: add K, M, B or T, or take {round(value)}')
    return int(value)


def _unit(text: str, sequence_length: int) -> tuple[list[str], str, int]:
    """The words before the unit, the unit, and how many of it a sample has."""
    words = text.split()
    unit = words.pop() if words and words[-1] in ("samples", "tokens") else "samples"
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1: raise it")
    return words, unit, sequence_length if unit == "tokens" else 1


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _check_stages(stages: Sequence[tuple[int, int]], unit: str) -> None:
    if not stages or stages[0][0] != 0:
        told = f"{stages[0][0]} {unit}" if stages else "nowhere"
        raise ValueError(f"the first batch size begins at {told} and must begin at 0: write it as 0:64")
    for (before, _), (threshold, size) in pairwise(stages):
        if threshold <= before:
            raise ValueError(f"batch size {size} begins at {threshold} {unit}, not after the one before it, at {before}: put them in order")
    for threshold, size in stages:
        if size < 1:
            raise ValueError(f"the batch size from {threshold} {unit} on is {size} and must be at least 1: raise it")


def _refuse_negative(count: int, what: str) -> None:
    if count < 0:
        raise ValueError(f"{count} {what} is negative: count from 0")
