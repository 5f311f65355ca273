"""Spans of noise: which stretches of a text an objective corrupts, as an explicit list from which inputs and targets are built.

    noise = clamp(round(n r), 1, n - 1)         n tokens of text at ratio r, in float64, halves to even
    spans = max(round(noise / mu), 1)           of mean length mu, no more than there are noise tokens or tokens of text between them

T5's formula (arXiv:1910.10683, section 3.1.4), clamped alike wherever it is used.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megapar.objectives.randomness import Generator
from megapar.objectives.sample import Ids

LONGEST_POISSON = 500.0


@dataclass(frozen=True, kw_only=True)
class SpanNoise:
    """A sampler of spans.

    ratio: of the tokens that are noise. mean_span: mean length of a span.
    lengths: "composition", uniform over all ways to write the noise as a sum of spans of 1 or more (T5); or "poisson" (BART,
        arXiv:1910.13461, section 2.2), drawn until the noise is used up, the last one trimmed; spans of length 0 are insertions.
    placement: "uniform", over all ways to place the spans with text between them; or "t5", which starts with text and ends with noise, so
        that the first token is never noise, the last one always is, and a single span has only one place.
    """

    ratio: float = 0.15
    mean_span: float = 3.0
    lengths: Literal["composition", "poisson"] = "composition"
    placement: Literal["uniform", "t5"] = "uniform"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must be between 0 and 1: give for example 0.15")
        if not 1 <= self.mean_span < math.inf:
            raise ValueError(f"mean_span={self.mean_span} must be 1 or more and finite: raise it")
        # spans <= n (1 - r): each needs text on one side.
        if self.mean_span < self.ratio / (1 - self.ratio) * (1 - 1e-9):
            least = math.ceil(self.ratio / (1 - self.ratio) * 100) / 100
            raise ValueError(
                f"ratio={self.ratio} with mean_span={self.mean_span} leaves less text than spans to separate: give a mean_span of {least}"
            )
        if self.lengths == "poisson" and self.mean_span > LONGEST_POISSON:
            raise ValueError(f"mean_span={self.mean_span} of a Poisson distribution must be {LONGEST_POISSON:.0f} or less: lower it")

    def counts(self, n: int) -> tuple[int, int]:
        """(noise tokens, spans) of n >= 2 tokens: both exact, but for Poisson lengths the most spans there can be."""
        noise = min(max(round(n * self.ratio), 1), n - 1)
        spans = noise if self.lengths == "poisson" else max(round(noise / self.mean_span), 1)
        return noise, min(spans, noise, n - noise)

    def draw(self, n: int, generator: Generator) -> NDArray[np.int64]:
        """[k, 2]: start and stop of every span, ascending, at least one token of text between any two."""
        noise, spans = self.counts(n)
        if self.lengths == "poisson":
            lengths = self._poisson(noise, spans, generator)
        else:
            lengths = np.diff(generator.subset(noise - 1, spans - 1) + 1, prepend=0, append=noise)
        text, k = n - noise, len(lengths)
        # The text before each span; all different, so that no two spans touch.
        if self.placement == "t5":
            before = np.append(generator.subset(text - 1, k - 1) + 1, text)
        else:
            before = generator.subset(text + 1, k)
        stops = before + np.cumsum(lengths)
        return np.stack([stops - lengths, stops], axis=1)

    def _poisson(self, noise: int, most: int, generator: Generator) -> NDArray[np.int64]:
        """At most `most` lengths that add up to `noise`; the last one is what is left of it."""
        values = np.arange(1, int(self.mean_span + 12 * self.mean_span**0.5 + 20))
        mass = np.exp(-self.mean_span + np.cumsum(np.log(self.mean_span / values)))
        cumulative = math.exp(-self.mean_span) + np.cumsum(np.append(0.0, mass))
        lengths = np.searchsorted(cumulative, generator.uniform(most), side="right").astype(np.int64)
        used = np.minimum(np.cumsum(lengths), noise)
        used[-1] = noise
        k = int(np.argmax(used == noise)) + 1
        return np.diff(used[:k], prepend=0)


def inputs_and_targets(n: int, noise: SpanNoise) -> tuple[int, int]:
    """Lengths of the inputs and targets that n >= 2 tokens become with one sentinel a span, and an end token each."""
    tokens, spans = noise.counts(n)
    return n - tokens + spans + 1, tokens + spans + 1


def t5_lengths(inputs_length: int, noise: SpanNoise) -> tuple[int, int]:
    """(tokens of text, targets) that give inputs of at most `inputs_length`: T5's random_spans_helper.

    512 at 0.15 and 3 give (568, 114). At a ratio of 0.5, targets that would be longer than the inputs are shortened by a token.
    Raises ValueError where not even 2 tokens fit.
    """
    least = inputs_and_targets(2, noise)[0]
    if inputs_length < least:
        raise ValueError(f"inputs_length={inputs_length} is too short for any text: give {least} or more")
    candidates = range(2, int((inputs_length + 2) / (1 - noise.ratio)) + 4)
    # Non-decreasing in the text: a token more is noise or text, and a span more comes only with one of noise or of text.
    tokens = candidates[bisect.bisect_right(candidates, inputs_length, key=lambda n: inputs_and_targets(n, noise)[0]) - 1]
    inputs, targets = inputs_and_targets(tokens, noise)
    return (tokens - 1, targets - 1) if noise.ratio == 0.5 and targets > inputs else (tokens, targets)


def marked(tokens: Ids, at: NDArray[np.int64], marks: Ids) -> Ids:
    """`tokens` [n] with marks[i] put before tokens[at[i]]; `at` ascending in [0, n]."""
    out = np.empty(len(tokens) + len(marks), np.int64)
    is_mark = np.zeros(len(out), bool)
    is_mark[at + np.arange(len(at))] = True
    out[is_mark], out[~is_mark] = marks, tokens
    return out


def is_noise(n: int, spans: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n]: whether a token lies in a span."""
    steps = np.bincount(spans[:, 0], minlength=n + 1) - np.bincount(spans[:, 1], minlength=n + 1)
    return np.cumsum(steps[:n]) > 0


def split_by_sentinels(tokens: Ids, spans: NDArray[np.int64], sentinels: Ids) -> tuple[Ids, Ids]:
    """(text with sentinels[i] in place of span i, every span after its sentinel): together the tokens, whatever the spans."""
    noise = is_noise(len(tokens), spans)
    lengths = spans[:, 1] - spans[:, 0]
    noise_before = np.cumsum(lengths) - lengths
    return marked(tokens[~noise], spans[:, 0] - noise_before, sentinels), marked(tokens[noise], noise_before, sentinels)
