"""Random numbers by counting: a sample is the same whatever rank or worker makes it, in whatever order, before or after a resume."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


class Generator:
    """A stream of random numbers that depends on nothing but `words`: (seed, epoch, index, objective) for a sample.

    It reads only Philox's raw stream, which numpy keeps across its versions as it does not keep what np.random.Generator makes of it
    (NEP 19).
    """

    def __init__(self, *words: int | str) -> None:
        self._words = words
        digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
        self._stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def child(self, word: int | str) -> Generator:
        """A stream of its own, which does not depend on what was drawn from this one."""
        return Generator(*self._words, word)

    def uniform(self, size: int) -> NDArray[np.float64]:
        """[size] in [0, 1), multiples of 2^-53."""
        bits: NDArray[np.uint64] = self._stream.random_raw(size)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, limit: int, size: int) -> NDArray[np.int64]:
        """[size] integers in [0, limit)."""
        return (self.uniform(size) * limit).astype(np.int64)

    def subset(self, limit: int, size: int) -> NDArray[np.int64]:
        """[size] distinct integers of [0, limit), ascending; every subset is as likely as any other."""
        if not 0 <= size <= limit:
            raise ValueError(f"{size} distinct integers below {limit} do not exist: ask for 0 to {limit}")
        order = np.argsort(self._stream.random_raw(limit), kind="stable")
        return np.sort(order[:size])
