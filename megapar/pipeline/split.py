"""Which layers go to which stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    """Sizes whose most expensive stage is cheapest, and of those the ones with the least sum of squares. O(stages layers^2)."""
    layers, sums = len(costs), list(accumulate(costs, initial=0.0))
    # best[i]: (slowest, sum of squares, sizes) of the first i layers in as many stages as there have been rounds.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(1, stages + 1):
        longer: dict[int, tuple[float, float, list[int]]] = {}
        for stop in range(stage, layers - (stages - stage) + 1):
            choices = []
            for start, (slowest, squares, sizes) in best.items():
                if start < stop:
                    cost = sums[stop] - sums[start]
                    choices.append((max(slowest, cost), squares + cost * cost, [*sizes, stop - start]))
            longer[stop] = min(choices)
        best = longer
    return best[layers][2]
