"""Which layers go to which stage."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from megapar.params import Interval


def split_layers(costs: Sequence[float], stages: int, how: str = "balanced") -> list[Interval]:
    """Each stage's layers [start, stop), one layer or more; `costs` has the time of each layer, in any unit.

    how: "balanced" makes the slowest stage as fast as it can be; "even" gives all as many layers, the first ones the extra; "5,6,6,5"
    says how many each gets. The first layer's cost should include the embedding's, the last one's the output projection's and the loss's.
    Raises ValueError for fewer layers than stages, another word, and numbers that are not one a stage or do not add up.
    """
    layers = len(costs)
    if layers < stages:
        raise ValueError(f"{stages} stages need at least {stages} layers, the model has {layers}: lower pp or chunks")
    if how == "even":
        sizes = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    elif how == "balanced":
        sizes = _balanced(costs, stages)
    elif re.fullmatch(r"\d+(,\d+)*", how):
        sizes = [int(size) for size in how.split(",")]
        if len(sizes) != stages or min(sizes) < 1 or sum(sizes) != layers:
            rule = f"{stages} numbers of 1 or more, one a stage, that add up to the model's {layers} layers"
            raise ValueError(f'split="{how}" must be {rule}: correct it, or use balanced')
    else:
        raise ValueError(f'split="{how}" is not known: use balanced, even, or the layers of each stage as 5,6,6,5')
    return list(pairwise(accumulate(sizes, initial=0)))


def _balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Sizes whose most expensive stage is cheapest, and of those the ones with the least sum of squares. O(stages layers^2).

    One after the other: the first layers of the best split need not be split best themselves
    (tests/pipeline/test_split.py::test_the_first_stages_alone_may_be_worse_than_they_could_be).
    """
    sums = list(accumulate(costs, initial=0.0))
    slowest, _ = _least(sums, stages, lambda so_far, cost: max(so_far, cost))
    return _least(sums, stages, lambda so_far, cost: so_far + cost * cost if cost <= slowest else math.inf)[1]


def _least(sums: Sequence[float], stages: int, add: Callable[[float, float], float]) -> tuple[float, list[int]]:
    """The least value that `add`, of the value so far and a stage's cost, makes of all stages, and sizes that have it."""
    layers = len(sums) - 1
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # of the first layers, in as many stages as there have been rounds
    for stage in range(1, stages + 1):
        longer: dict[int, tuple[float, list[int]]] = {}
        for stop in range(stage, layers - (stages - stage) + 1):
            shorter = ((start, found) for start, found in best.items() if start < stop)
            longer[stop] = min((add(value, sums[stop] - sums[start]), [*sizes, stop - start]) for start, (value, sizes) in shorter)
        best = longer
    return best[layers]
