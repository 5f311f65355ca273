"""Counting models: the losses that a trained model must beat to have learned anything."""

import numpy as np
from numpy.typing import NDArray


def unigram_loss(train: NDArray[np.integer], held_out: NDArray[np.integer], vocab_size: int) -> float:
    """Return the mean nats per target held_out[1:] under P(w) = (count(w) + 1) / (t + vocab_size).

    `train` `[t]` and `held_out` `[h]` hold ids in [0, vocab_size); counts are of `train`. Raises ValueError for
    an id outside that range, an empty `train`, or fewer than 2 held-out tokens.
    """
    _check_tokens(train, held_out, vocab_size)
    return float(-np.log(_unigram(train, vocab_size)[held_out[1:]]).mean())


def bigram_loss(train: NDArray[np.integer], held_out: NDArray[np.integer], vocab_size: int) -> float:
    """Return the mean nats per target held_out[1:] under a bigram with Witten-Bell smoothing.

    P(w | c) = lambda(c) * count(c, w) / N(c) + (1 - lambda(c)) * P(w), lambda(c) = N(c) / (N(c) + T(c)): N(c)
    counts the pairs of `train` that start with c, T(c) the distinct tokens that follow c, and P(w) is the
    add-one unigram of `unigram_loss`, used alone after a context that `train` lacks. Witten and Bell 1991, "The
    zero-frequency problem"; in this form, Chen and Goodman 1998, "An empirical study of smoothing techniques
    for language modeling", section 2.5. Shapes and errors are those of `unigram_loss`.
    """
    _check_tokens(train, held_out, vocab_size)
    contexts, targets = held_out[:-1].astype(np.int64), held_out[1:].astype(np.int64)
    # One int64 code a pair, so that memory grows with the pairs seen and not with vocab_size squared.
    pairs, counts = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    num_pairs = np.bincount(train[:-1], minlength=vocab_size)[contexts]
    num_followers = np.bincount(pairs // vocab_size, minlength=vocab_size)[contexts]
    pair_counts = _lookup(pairs, counts, contexts * vocab_size + targets)

    unigram = _unigram(train, vocab_size)[targets]
    # The formula above over the common denominator N(c) + T(c), which is 0 only for an unseen context.
    seen = num_pairs > 0
    denominator = np.where(seen, num_pairs + num_followers, 1)
    probabilities = np.where(seen, (pair_counts + num_followers * unigram) / denominator, unigram)
    return float(-np.log(probabilities).mean())


def _unigram(train: NDArray[np.integer], vocab_size: int) -> NDArray[np.float64]:
    return (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)


def _lookup(keys: NDArray[np.int64], values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the value of each wanted key, 0 where the sorted keys lack it."""
    if len(keys) == 0:
        return np.zeros(len(wanted), dtype=np.int64)
    positions = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[positions] == wanted, values[positions], 0)


def _check_tokens(train: NDArray[np.integer], held_out: NDArray[np.integer], vocab_size: int) -> None:
    if len(train) < 1 or len(held_out) < 2:
        raise ValueError(
            f"there are {len(train)} train and {len(held_out)} held-out tokens, at least 1 and 2 are needed: "
            "give more text"
        )
    low = min(train.min(), held_out.min())
    high = max(train.max(), held_out.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids run from {low} to {high}, they must be in [0, {vocab_size}): "
            "pass the vocab_size of the tokenizer that made them"
        )
