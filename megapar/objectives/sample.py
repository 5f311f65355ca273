"""What an objective makes of text: a Sample, and the batch that samples are stacked into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapar.batch import TokenBatch
from megapar.objectives.randomness import Generator

IGNORED = -100
"""The target of a position that has nothing to predict."""

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence: what the model is given, what it is to predict, what may attend to what.

    tokens: int64 [s].
    targets: int64 [s]; targets[i] is what the logits at i predict, IGNORED where nothing is. Already shifted.
    position_ids: int64 [s].
    segment_ids: int64 [s]; a token attends only within its own segment.
    prefix_end: int64 [s]; the tokens of a segment before this index of the sequence attend to each other in both directions.
    objective: the name of what made it.
    """

    tokens: Ids
    targets: Ids
    position_ids: Ids
    segment_ids: Ids
    prefix_end: Ids
    objective: str

    @staticmethod
    def of(text: Ids, objective: str, prefix_len: int = 0) -> Sample:
        """The sample of s + 1 tokens: each but the first is predicted from those before it, but for the bidirectional prefix's.

        The last token of the prefix predicts the first after it, and is the first to predict anything: the ones before it have seen
        their successors.
        """
        s = len(text) - 1
        targets = text[1:].copy()
        targets[: max(prefix_len - 1, 0)] = IGNORED
        return Sample(text[:-1], targets, np.arange(s), np.zeros(s, np.int64), np.full(s, prefix_len), objective)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A pure function of (tokens, generator): text of up to `tokens_needed` tokens to a Sample of up to `sequence_length`.

    sequence_length: s, of the samples. vocab_size: the text's ids are in [0, vocab_size).
    """

    sequence_length: int
    vocab_size: int
    name: str

    def __post_init__(self) -> None:
        for name in ("sequence_length", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more: raise it")

    @property
    def names(self) -> tuple[str, ...]:
        """What samples may have for `objective`."""
        return (self.name,)

    @property
    def tokens_needed(self) -> int:
        """Tokens of text that fill a sample."""
        return self.sequence_length + 1

    @abstractmethod
    def __call__(self, tokens: Ids, generator: Generator) -> Sample:
        """The sample of `tokens`, integers [n] with 2 <= n <= tokens_needed. Raises ValueError for any others."""

    def check(self, tokens: Ids) -> Ids:
        """`tokens` as int64 [n]; raises ValueError for what no sample can be made of."""
        ids = self.check_ids(tokens)
        if not 2 <= len(ids) <= self.tokens_needed:
            raise ValueError(
                f"the text has {len(ids)} tokens and a sample takes 2 to {self.tokens_needed}: "
                + ("leave it out or join it with another" if len(ids) < 2 else "cut it into windows or raise sequence_length")
            )
        return ids

    def check_ids(self, tokens: Ids) -> Ids:
        """`tokens` as int64 [n], for any n; raises ValueError for ids that are not the text's."""
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens are {tokens.dtype} of shape {tokens.shape} and must be integers [n]: flatten or convert them")
        low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token ids run from {low} to {high} and must be in [0, {self.vocab_size}): give the vocab_size they are of")
        return tokens.astype(np.int64)


def pack(samples: Iterable[Sample], length: int) -> list[Sample]:
    """Joins samples into sequences of at most `length` tokens, each into the first that has room for it (first fit).

    Each keeps its positions, and attends only within itself. Raises ValueError for a sample longer than `length`.
    """
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        size = len(sample.tokens)
        if size > length:
            raise ValueError(f"a sample of {size} tokens does not fit into sequences of {length}: cut the text or raise sequence_length")
        chosen = next((i for i, free in enumerate(room) if size <= free), len(bins))
        if chosen == len(bins):
            bins.append([])
            room.append(length)
        bins[chosen].append(sample)
        room[chosen] -= size
    return [_joined(parts) for parts in bins]


def _joined(samples: Sequence[Sample]) -> Sample:
    starts = np.cumsum([0] + [len(sample.tokens) for sample in samples])
    segments = np.cumsum([0] + [sample.segment_ids.max() + 1 for sample in samples])
    return Sample(
        np.concatenate([sample.tokens for sample in samples]),
        np.concatenate([sample.targets for sample in samples]),
        np.concatenate([sample.position_ids for sample in samples]),
        np.concatenate([sample.segment_ids + first for sample, first in zip(samples, segments[:-1], strict=True)]),
        np.concatenate([sample.prefix_end + start for sample, start in zip(samples, starts[:-1], strict=True)]),
        "+".join(dict.fromkeys(sample.objective for sample in samples)),
    )


def collate(samples: Sequence[Sample], length: int, names: Sequence[str] = ()) -> TokenBatch:
    """The batch, with targets, of samples of at most `length` = s tokens, padded at the end by tokens that nothing attends to.

    Plain causal samples make a causal batch: what the batch does not need to say of its mask, it does not say. names: the objectives
    that `objective_ids` number; without them it has none. Raises ValueError for no samples, for one that is too long, and for one of an
    objective that is not named.
    """
    longest = max((len(sample.tokens) for sample in samples), default=0)
    if not 1 <= longest <= length:
        raise ValueError(f"{len(samples)} samples of at most {longest} tokens do not make a batch of {length}: give some that fit")

    if names and (unknown := {sample.objective for sample in samples} - {*names}):
        raise ValueError(f"samples are of {sorted(unknown)} and the objectives are {list(names)}: name all of them")

    def stacked(name: str, fill: int) -> Tensor:
        rows = np.full((len(samples), length), fill, dtype=np.int64)
        for row, sample in zip(rows, samples, strict=True):
            row[: len(sample.tokens)] = getattr(sample, name)
        return torch.from_numpy(rows)

    # Padding is a segment of its own; being last, it is hidden from causal samples without one.
    segmented = any(sample.segment_ids.any() for sample in samples)
    prefixed = any((sample.prefix_end > np.arange(len(sample.tokens))).any() for sample in samples)
    return TokenBatch(
        len(samples),
        length,
        stacked("tokens", 0).flatten(),
        stacked("position_ids", 0).flatten(),
        stacked("segment_ids", -1).flatten() if segmented else None,
        stacked("prefix_end", 0).flatten() if prefixed else None,
        stacked("targets", IGNORED).flatten(),
        torch.tensor([names.index(sample.objective) for sample in samples]) if names else None,
    )
