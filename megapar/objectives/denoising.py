"""Denoising: the model is given corrupted text and writes what was corrupted, or all of the text.

    [mode] inputs end | targets end         inputs read in both directions, losses on what comes after them

| style    | inputs: a span becomes                              | targets             | source                               |
|----------|-----------------------------------------------------|---------------------|--------------------------------------|
| sentinel | one sentinel of its own                             | the spans, each after its sentinel | T5, arXiv:1910.10683, 3.1.4 |
| infill   | one mask token                                      | the text            | BART, arXiv:1910.13461, 2.2          |
| mask     | each token masked, random or kept, 80 / 10 / 10     | the text            | BERT, arXiv:1810.04805, 3.1          |
| replace  | random other tokens                                 | the text            |                                      |
| delete   | nothing                                             | the text            | BART                                 |
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from megapar.objectives.randomness import Generator
from megapar.objectives.sample import Ids, Objective, Sample
from megapar.objectives.spans import SpanNoise, is_noise, marked, split_by_sentinels, t5_lengths

Style = Literal["sentinel", "infill", "mask", "replace", "delete"]


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """Text corrupted by `noise` in one of the styles above.

    end_id: ends inputs and targets. sentinels: their ids in the order of use, e.g. T5's descending range. mask_id: of "infill" and "mask".
    Both lie outside the text's [0, vocab_size), so that what was corrupted can be told. mask_rate, random_rate: of "mask"; the rest is
    kept. mode: ids that open the inputs. inputs_length: T5's; where it is not given, the text is the longest that fits sequence_length.
    """

    end_id: int
    noise: SpanNoise = field(default_factory=SpanNoise)
    style: Style = "sentinel"
    sentinels: range = range(0)
    mask_id: int | None = None
    mask_rate: float = 0.8
    random_rate: float = 0.1
    mode: tuple[int, ...] = ()
    inputs_length: int | None = None
    name: str = "denoising"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_rate < 0 or self.random_rate < 0 or self.mask_rate + self.random_rate > 1:
            rates = f"mask_rate={self.mask_rate} and random_rate={self.random_rate}"
            raise ValueError(f"{rates} must be 0 or more and add up to 1 at most: lower or raise one")
        if self.style in ("mask", "replace") and self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size} has no other token to put in a token's place: give 2 or more")
        if self.style in ("infill", "mask") and self.mask_id is None:
            raise ValueError(f"style={self.style} needs a mask token and mask_id is none: give its id, {self.vocab_size} or more")
        self._check_lengths()
        if self.end_id < 0:
            raise ValueError(f"end_id={self.end_id} must be 0 or more: give the end-of-text id")
        specials = [*self.sentinels, *([] if self.mask_id is None else [self.mask_id])]
        inside = [special for special in specials if special < self.vocab_size]
        if inside or len(set(specials)) < len(specials) or self.end_id in specials:
            raise ValueError(
                f"the sentinels {self.sentinels} and mask_id={self.mask_id} must be ids of their own outside the text's "
                f"[0, {self.vocab_size}) and not end_id={self.end_id}: give ids of {self.vocab_size} or more"
            )
        if self.style == "sentinel" and len(self.sentinels) < (needed := self.noise.counts(self.tokens_needed)[1]):
            raise ValueError(
                f"{self.tokens_needed} tokens at ratio={self.noise.ratio} and mean_span={self.noise.mean_span} take {needed} sentinels and "
                f"there are {len(self.sentinels)}: give {needed} sentinels, a longer mean_span or a shorter text"
            )

    def _check_lengths(self) -> None:
        shortest = self._length(2) - 1
        if self.sequence_length < shortest:
            raise ValueError(f"sequence_length={self.sequence_length} is too short for 2 tokens of text: give {shortest} or more")
        if self.inputs_length is None:
            return
        if self.style != "sentinel":
            raise ValueError(f"inputs_length={self.inputs_length} is T5's and style={self.style}: leave it out, or use style=sentinel")
        needed = self._length(self.tokens_needed) - 1
        if needed > self.sequence_length:
            raise ValueError(
                f"inputs_length={self.inputs_length} makes samples of {needed} tokens, sequence_length={self.sequence_length} is shorter: "
                f"give a sequence_length of {needed}, or lower inputs_length"
            )

    def lengths(self, n: int) -> tuple[int, int]:
        """Lengths of the inputs, mode and end token included, and of the targets of n >= 2 tokens of text.

        Exact, but for Poisson lengths, whose number of spans varies: the most there can be.
        """
        tokens, spans = self.noise.counts(n)
        inputs = {"sentinel": n - tokens + spans, "infill": n - tokens + spans, "delete": n - tokens}.get(self.style, n)
        return len(self.mode) + inputs + 1, (tokens + spans if self.style == "sentinel" else n) + 1

    def _length(self, n: int) -> int:
        return sum(self.lengths(n))

    @cached_property
    def tokens_needed(self) -> int:
        """Tokens of text that fill a sample."""
        if self.inputs_length is not None:
            return t5_lengths(self.inputs_length, self.noise)[0]
        candidates = range(2, self.sequence_length + 2)
        return candidates[bisect.bisect_right(candidates, self.sequence_length + 1, key=self._length) - 1]

    def __call__(self, tokens: Ids, generator: Generator) -> Sample:
        """The sample of `tokens`, integers [n] with 2 <= n <= tokens_needed. Raises ValueError for any others."""
        inputs, targets = self.corrupt(self.check(tokens), generator)
        mode, end = np.array(self.mode, np.int64), np.array([self.end_id])
        return Sample.of(np.concatenate([mode, inputs, end, targets, end]), self.name, len(mode) + len(inputs) + 1)

    def corrupt(self, tokens: Ids, generator: Generator) -> tuple[Ids, Ids]:
        """(inputs, targets) of int64 tokens [n >= 2], without mode and end tokens."""
        n = len(tokens)
        spans = self.noise.draw(n, generator)
        if self.style == "sentinel":
            return split_by_sentinels(tokens, spans, np.array(self.sentinels[: len(spans)], np.int64))
        noise = is_noise(n, spans)
        if self.style == "delete":
            return tokens[~noise], tokens
        if self.style == "infill":
            noise_before = np.cumsum(spans[:, 1] - spans[:, 0]) - (spans[:, 1] - spans[:, 0])
            return marked(tokens[~noise], spans[:, 0] - noise_before, np.full(len(spans), self.mask_id)), tokens
        # A shift by 1 to vocab_size - 1: never the token itself, all others alike.
        other = (tokens + 1 + generator.below(max(self.vocab_size - 1, 1), n)) % self.vocab_size
        if self.style == "replace":
            return np.where(noise, other, tokens), tokens
        choice = generator.uniform(n)
        random_or_kept = np.where(choice < self.mask_rate + self.random_rate, other, tokens)
        masked = np.where(choice < self.mask_rate, np.array(self.mask_id), random_or_kept)
        return np.where(noise, masked, tokens), tokens
