"""The data order, a pure function of the seed and the sample number."""

import hashlib

import numpy as np
from numpy.typing import NDArray


class Sampler:
    """Cuts `tokens` (integers, `[t]`) into samples and shuffles them anew each epoch, by `seed` alone.

    Slot i holds tokens[i*s : i*s + s + 1] for sequence length s: s inputs and the last one's target. An epoch
    visits each of its (t - 1) // s slots once. Raises ValueError if s < 1 or `tokens` is short of one sample.
    """

    def __init__(self, tokens: NDArray[np.integer], sequence_length: int, seed: int) -> None:
        _check_sequence_length(sequence_length)
        if len(tokens) < sequence_length + 1:
            raise ValueError(
                f"corpus has {len(tokens)} tokens, one sample needs {sequence_length + 1}: "
                "give more text or lower data.sequence_length"
            )
        self._tokens = tokens
        self.sequence_length = sequence_length
        self._seed = seed
        self._cached_epoch = -1
        self._cached_permutation = np.empty(0, dtype=np.int64)

    @property
    def samples_per_epoch(self) -> int:
        """Return the number of samples in one epoch."""
        return (len(self._tokens) - 1) // self.sequence_length

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """Return samples first .. first + count - 1 of the run, counted across epochs, as int64 `[count, s + 1]`.

        Raises ValueError if `first` is negative or `count` is below 1.
        """
        if first < 0 or count < 1:
            raise ValueError(
                f"batch starts at sample {first} and has {count}, it must start at 0 or later and have 1 or more: "
                "correct first and count"
            )
        numbers = np.arange(first, first + count)
        epochs, positions = np.divmod(numbers, self.samples_per_epoch)
        slots = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            slots[chosen] = self._permutation(int(epoch))[positions[chosen]]
        offsets = np.arange(self.sequence_length + 1)
        samples: NDArray[np.int64] = self._tokens[slots[:, None] * self.sequence_length + offsets].astype(np.int64)
        return samples

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._cached_epoch:
            self._cached_permutation = _permutation(self._seed, epoch, self.samples_per_epoch)
            self._cached_epoch = epoch
        return self._cached_permutation


Tokens = NDArray[np.integer]


def split_held_out(tokens: Tokens, held_out: float, test: float = 0.0) -> tuple[Tokens, Tokens, Tokens]:
    """Return views (train, held_out, test) of `tokens` `[t]`, the latter two of these shares at the end.

    Raises ValueError for shares that `check_shares` refuses.
    """
    check_shares(held_out, test)
    boundary, end = (int(len(tokens) * (1 - share)) for share in (held_out + test, test))
    return tokens[:boundary], tokens[boundary:end], tokens[end:]


def check_shares(held_out: float, test: float) -> None:
    """Raises ValueError unless training, held-out and, if one is asked for, test data have a share each."""
    if not (held_out > 0 and test >= 0 and held_out + test < 1):
        raise ValueError(
            f"data.held_out is {held_out} and data.test {test}, the first must be above 0 and both together below 1: "
            "use for example 0.05 and 0"
        )


def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    key = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:16], "big")
    # numpy keeps Philox's raw stream the same across versions, but not Generator.permutation's use of it.
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def _check_sequence_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise ValueError(f"data.sequence_length is {sequence_length}, it must be at least 1: raise it")
