"""Prefix language modelling: the text is cut at a point, read in both directions before it and predicted after it.

T5 (arXiv:1910.10683, section 3.2.1). The prefix's last token predicts the first one after it: it is inside the prefix and has a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megapar.objectives.randomness import Generator
from megapar.objectives.sample import Ids, Objective, Sample


@dataclass(frozen=True, kw_only=True)
class PrefixLM(Objective):
    """n tokens of text are cut at a point uniform in [1, n - 1], as T5 does, or so that `target_ratio` of them are predicted.

    mode: ids that open the prefix (UL2's mode token), which make the sample longer and are never predicted.
    """

    target_ratio: float | None = None
    mode: tuple[int, ...] = ()
    name: str = "prefix_lm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_needed < 2:
            least = len(self.mode) + 1
            raise ValueError(f"sequence_length={self.sequence_length} is too short for 2 tokens of text: give {least} or more")
        if self.target_ratio is not None and not 0 < self.target_ratio < 1:
            raise ValueError(f"target_ratio={self.target_ratio} must be between 0 and 1: give for example 0.25, or none for a random cut")

    @property
    def tokens_needed(self) -> int:
        """Tokens of text that fill a sample beside the mode."""
        return self.sequence_length + 1 - len(self.mode)

    def __call__(self, tokens: Ids, generator: Generator) -> Sample:
        """The sample of `tokens`, integers [n] with 2 <= n <= tokens_needed. Raises ValueError for any others."""
        tokens = self.check(tokens)
        n = len(tokens)
        if self.target_ratio is None:
            cut = 1 + int(generator.below(n - 1, 1)[0])
        else:
            cut = n - min(max(round(n * self.target_ratio), 1), n - 1)
        return Sample.of(np.concatenate([np.array(self.mode, np.int64), tokens]), self.name, len(self.mode) + cut)
