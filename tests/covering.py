"""Covering arrays: few cases in which every combination of any two factors' values occurs, and of chosen larger groups of factors.

    cases = covering_array({"pp": (1, 2), "tp": (1, 2), "kind": ("gpipe", "1f1b")}, legal, [("pp", "tp", "kind")])
    assert not missing(cases, factors, legal, groups)

A combination counts as possible if some legal case holds it; all that are possible are covered.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Factors = Mapping[str, Sequence[Any]]
Legal = Callable[[Case], bool]
Groups = Iterable[tuple[str, ...]]


def covering_array(factors: Factors, legal: Legal, groups: Groups = ()) -> list[Case]:
    """Greedy: the case with the most combinations that are not covered yet, the first of equals, until none is left."""
    cases = list(legal_cases(factors, legal))
    number: dict[Any, int] = {}
    masks = [sum(1 << number.setdefault(c, len(number)) for c in combinations(case, factors, groups)) for case in cases]
    left, chosen = (1 << len(number)) - 1, []
    while left:
        best = max(range(len(cases)), key=lambda i: (masks[i] & left).bit_count())
        chosen.append(cases[best])
        left &= ~masks[best]
    return chosen


def missing(cases: Iterable[Case], factors: Factors, legal: Legal, groups: Groups = ()) -> set[Any]:
    """The possible combinations that no case holds."""
    groups = list(groups)
    possible = {c for case in legal_cases(factors, legal) for c in combinations(case, factors, groups)}
    return possible - {c for case in cases for c in combinations(case, factors, groups)}


def legal_cases(factors: Factors, legal: Legal) -> Iterable[Case]:
    """The full product, without what is not legal."""
    return (case for values in itertools.product(*factors.values()) if legal(case := dict(zip(factors, values, strict=True))))


def combinations(case: Case, factors: Factors, groups: Groups) -> list[Any]:
    """Those that the case holds: of every pair of factors and of the groups."""
    return [tuple((name, case[name]) for name in names) for names in [*itertools.combinations(factors, 2), *groups]]
