"""Which corpus each sample of a run comes from, at any place of the run and without a table; and which documents are held out.

Sample k of corpus i, of normalised weight w_i, is due at (k + 1/2) / w_i, and samples come in the order in which they are due (the
Webster/Sainte-Lague method). After n samples of N corpora, corpus i has given w_i n to within 1/2 + w_i N / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Blend:
    """Corpora mixed by `weights`, which need not add up to 1. Raises ValueError for none, and for weights that are not above 0."""

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.weights or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"the blend's weights are {self.weights} and must be above 0 and finite: raise them, or leave a corpus out")

    def draw(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(corpus, number of the sample in it), int64 [count] each, of samples first to first + count - 1 of the run."""
        if first < 0 or count < 0:
            raise ValueError(f"the samples start at {first} and are {count}, both must be 0 or more: correct first and count")
        corpora, numbers, skipped = self._due(first, count)
        chosen = slice(first - skipped, first - skipped + count)
        return corpora[chosen], numbers[chosen]

    def counts(self, n: int) -> NDArray[np.int64]:
        """int64 [corpora]: how many of a run's first n samples each corpus gives. It is all the state that reading them has."""
        corpora, numbers, skipped = self._due(n, 1)
        # The samples of a corpus come in order: its first one from n on has its count for a number.
        return np.array([numbers[n - skipped :][corpora[n - skipped :] == i][0] for i in range(len(self.weights))])

    def _due(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Corpora and numbers in order around samples first to first + count, and how many samples are left out before them.

        What is left out is due before any sample from `first` on: sample n is due at n to within N / 2. One of each corpus comes after.
        """
        weights = np.array(self.weights) / math.fsum(self.weights)
        margin = len(weights) / 2 + 2
        low = np.maximum(np.floor((first - margin) * weights - 1), 0).astype(np.int64)
        high = np.ceil((first + count + margin) * weights).astype(np.int64) + 1
        corpora = np.repeat(np.arange(len(weights)), high - low)
        numbers = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
        # Stable: of samples due at once the first corpus's comes first.
        order = np.argsort((numbers + 0.5) / weights[corpora], kind="stable")
        return corpora[order], numbers[order], int(low.sum())


def split_documents(documents: int, shares: Sequence[float]) -> list[range]:
    """Cuts documents [0, documents) into one range a share, in order: train, validation, test.

    The shares need not add up to 1 (Megatron's 969, 30, 1). Raises ValueError for shares that are negative or all 0, and for a share
    above 0 that gets no document.
    """
    total = math.fsum(shares)
    if not 0 < total < math.inf or min(shares) < 0:
        raise ValueError(f"the shares are {tuple(shares)} and must be 0 or more, one of them above 0: change them")
    bounds = [0, *(round(documents * (math.fsum(shares[: i + 1]) / total)) for i in range(len(shares)))]
    ranges = [range(a, b) for a, b in pairwise(bounds)]
    for share, part in zip(shares, ranges, strict=True):
        if share > 0 and not part:
            raise ValueError(f"{documents} documents leave none to the share {share} of {tuple(shares)}: raise it or give more documents")
    return ranges
