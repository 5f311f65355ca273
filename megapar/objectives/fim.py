"""Fill in the middle (Bavarian et al. 2022, arXiv:2207.14255): a document's middle is moved to its end, and causal training goes on.

    PSM     <PRE> prefix <SUF> suffix <MID> middle <END>
    SPM     <PRE> <SUF> suffix <MID> prefix middle <END>        their variant 2, which shares PSM's structure

Losses are on all of it, end token included: that is what leaves the plain language model unharmed (their section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np

from megapar.objectives.causal_lm import CausalLM
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import Ids, Sample

BROKEN = "\ufffd"
"""What bytes that are no UTF-8 are decoded to."""
FRAGMENT = 3
"""Most tokens that the end of a window leaves of a character, which has up to 4 bytes."""


class TextCodec(Protocol):
    """What character-level cuts need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, U+FFFD for bytes that are no UTF-8."""


@dataclass(frozen=True, kw_only=True)
class FillInTheMiddle(CausalLM):
    """CausalLM over a window in which every document has been transformed with probability `rate`, to SPM order with probability
    `spm_rate`, else to PSM order.

    end_id: ends a document, and what it becomes. prefix_id, suffix_id, middle_id: the sentinels, in the order of the formulas above.
    level: the two cuts are uniform over a document's characters (the paper's way; needs the `tokenizer`, the three parts are encoded
        apart), or over its tokens. Bytes that a window has cut off their character stay at the document's ends; a document with more
        broken bytes than that is cut between tokens, so that none changes.

    This is the paper's context-level form. Its document-level form is `document`, applied before the text is cut into windows.
    """

    prefix_id: int
    suffix_id: int
    middle_id: int
    rate: float = 0.5
    spm_rate: float = 0.5
    level: Literal["character", "token"] = "character"
    tokenizer: TextCodec | None = field(default=None, compare=False)
    name: str = "fim"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1: give for example 0.5")
        if self.end_id is None:
            raise ValueError("end_id is none, and a document's middle needs an end: give the end-of-text id")
        ids = [self.prefix_id, self.suffix_id, self.middle_id, self.end_id]
        if len(set(ids)) < len(ids) or min(ids) < 0:
            raise ValueError(f"prefix_id, suffix_id, middle_id and end_id are {ids} and must be different and 0 or more: give each its own")
        if self.level == "character" and self.tokenizer is None:
            raise ValueError("level=character cuts text and there is no tokenizer to read and write it: give one, or use level=token")

    def check_tokenizer(self, tokens: Ids) -> None:
        """Cuts some text [n] in two in many places, and raises ValueError for a tokenizer that would not give it back."""
        if self.level == "token" or not self.rate:
            return
        assert self.tokenizer is not None
        text = self.tokenizer.decode([token for token in tokens.tolist() if token != self.end_id]).strip(BROKEN)
        spaces = [place for place, character in enumerate(text) if character.isspace()][:50]
        for place in {*spaces, *(space + 1 for space in spaces), *range(0, len(text), 1 + len(text) // 50)}:
            self._encoded(text, [place])

    def _encoded(self, text: str, places: list[int]) -> list[list[int]]:
        """The ids of the parts of a text that is cut in these places."""
        assert self.tokenizer is not None
        parts = [self.tokenizer.encode(text[start:stop]) for start, stop in pairwise([0, *places, len(text)])]
        if "".join(map(self.tokenizer.decode, parts)) != text:
            raise ValueError("the tokenizer does not give back text that it encoded in parts: use one that does, or level=token")
        return parts

    def __call__(self, tokens: Ids, generator: Generator) -> Sample:
        """The sample of a window, integers [n] with 2 <= n <= tokens_needed. Raises ValueError for any others."""
        return self.sample(self.window(self.check(tokens), generator), self.name)

    def window(self, tokens: Ids, generator: Generator) -> Ids:
        """A window of text [n], its documents transformed, to [n]; shorter only where text takes fewer ids when encoded in parts.

        What the sentinels leave no room for is taken from the end of the last document's suffix, as if the window had ended earlier: its
        middle stays whole. A suffix that is too short for that leaves the document as it was. How a document is transformed depends on
        its number in the window, not on its neighbours.
        """
        room, parts = len(tokens), []
        for number, document in enumerate(np.split(tokens, np.flatnonzero(tokens == self.end_id) + 1)):
            transformed = self._transformed(document[document != self.end_id], generator.child(number))
            excess = sum(map(len, transformed)) - room if transformed else 0
            if transformed and excess <= len(transformed[1]):
                before, suffix, after = transformed
                document = np.concatenate([before, suffix[: len(suffix) - max(excess, 0)], after])
            parts.append(document[:room])
            room -= len(parts[-1])
        return np.concatenate(parts)

    def document(self, tokens: Ids, generator: Generator) -> Ids:
        """One document, integers [n] without its end token, transformed with probability `rate`, and the end token after it."""
        ids = self.check_ids(tokens)
        if (ids == self.end_id).any():
            raise ValueError(f"the document holds end_id={self.end_id}, which is put after it: leave it out, or split the document there")
        return np.concatenate(self._transformed(ids, generator) or [ids, self._special(self.end_id)])

    def check_ids(self, tokens: Ids) -> Ids:
        """`tokens` as int64 [n]; raises ValueError for ids that are not the text's."""
        ids = super().check_ids(tokens)
        sentinels = [self.prefix_id, self.suffix_id, self.middle_id]
        if np.isin(ids, sentinels).any():
            raise ValueError(f"the text holds one of the sentinels {sentinels}, which mark its parts: give sentinels that it lacks")
        return ids

    def _transformed(self, document: Ids, generator: Generator) -> list[Ids] | None:
        """[what is before the suffix, suffix, what is after it, to the end token]; None for a document that stays as it is."""
        chance, order, *cuts = generator.uniform(4).tolist()
        if len(document) == 0 or chance >= self.rate:
            return None
        prefix, middle, suffix = self._parts(document, cuts)
        if order < self.spm_rate:
            before, after = [self._special(self.prefix_id, self.suffix_id)], [self._special(self.middle_id), prefix, middle]
        else:
            before, after = [self._special(self.prefix_id), prefix, self._special(self.suffix_id)], [self._special(self.middle_id), middle]
        return [np.concatenate(before), suffix, np.concatenate([*after, self._special(self.end_id)])]

    def _parts(self, document: Ids, cuts: list[float]) -> list[Ids]:
        """[prefix, middle, suffix] of a document, cut at these fractions of its characters or tokens."""
        if self.level == "character":
            assert self.tokenizer is not None
            first, last = self._whole_characters(document)
            text = self.tokenizer.decode(document[first:last].tolist())
            if BROKEN not in text:
                prefix, middle, suffix = (np.array(part, np.int64) for part in self._encoded(text, _places(cuts, len(text))))
                return [np.concatenate([document[:first], prefix]), middle, np.concatenate([suffix, document[last:]])]
        return np.split(document, _places(cuts, len(document)))

    def _whole_characters(self, document: Ids) -> tuple[int, int]:
        """[first, last) of the tokens without what a window's ends may have left of a character."""
        assert self.tokenizer is not None
        first, last = 0, len(document)
        while first < min(FRAGMENT, last) and self.tokenizer.decode(document[first:].tolist()).startswith(BROKEN):
            first += 1
        while last > max(first, len(document) - FRAGMENT) and self.tokenizer.decode(document[first:last].tolist()).endswith(BROKEN):
            last -= 1
        return first, last

    def _special(self, *ids: int | None) -> Ids:
        return np.array(ids, np.int64)


def _places(cuts: list[float], n: int) -> list[int]:
    """Two places in [0, n], ascending: each of them as likely as any other."""
    return sorted(int(cut * (n + 1)) for cut in cuts)
