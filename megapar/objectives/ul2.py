"""UL2: a mixture of denoisers (arXiv:2205.05131), each sample opened by the mode token of its kind.

R: regular spans, few and short. X: extreme ones, long or many. S: sequential, a prefix LM.

| name | mode | mean span | ratio |
|------|------|-----------|-------|
| R1   | R    | 3         | 0.15  |
| R2   | R    | 8         | 0.15  |
| X1   | X    | 3         | 0.5   |
| X2   | X    | 8         | 0.5   |
| X3   | X    | 64        | 0.15  |
| X4   | X    | 64        | 0.5   |
| S    | S    | n / 4, one span at the end | 0.25 |

Table 1 of the paper. Its published code (section 9.2) cuts S's prefix at a uniform point, and draws all seven alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from megapar.objectives.denoising import Denoising
from megapar.objectives.prefix_lm import PrefixLM
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import Ids, Objective, Sample
from megapar.objectives.spans import SpanNoise


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A member of a mixture. mode: "R", "S" or "X", or a name of one's own, of the token that opens its samples.

    rate: its share of the samples, relative to the others'. noise: of a span denoiser; none: a prefix LM, cut at a uniform point, or so
    that `target_ratio` of the text is predicted.
    """

    name: str
    mode: str
    rate: float = 1.0
    noise: SpanNoise | None = None
    target_ratio: float | None = None


def ul2_denoisers(s_mode: Literal["uniform", "quarter"] = "uniform") -> tuple[Denoiser, ...]:
    """The paper's seven, at equal rates; S as the published code has it ("uniform"), or as the table ("quarter")."""
    settings = [("R1", 3, 0.15), ("R2", 8, 0.15), ("X1", 3, 0.5), ("X2", 8, 0.5), ("X3", 64, 0.15), ("X4", 64, 0.5)]
    spans = (Denoiser(name=name, mode=name[0], noise=SpanNoise(mean_span=mean, ratio=ratio)) for name, mean, ratio in settings)
    return (*spans, Denoiser(name="S", mode="S", target_ratio=0.25 if s_mode == "quarter" else None))


def ul2r_denoisers(s_mode: Literal["uniform", "quarter"] = "uniform") -> tuple[Denoiser, ...]:
    """UL2R's (arXiv:2210.11399, section 3.3): half S, a quarter R, a quarter X, the last shared by its two settings."""
    return (
        Denoiser(name="R", mode="R", rate=0.25, noise=SpanNoise(mean_span=3, ratio=0.15)),
        Denoiser(name="X1", mode="X", rate=0.125, noise=SpanNoise(mean_span=32, ratio=0.15)),
        Denoiser(name="X2", mode="X", rate=0.125, noise=SpanNoise(mean_span=3, ratio=0.5)),
        Denoiser(name="S", mode="S", rate=0.5, target_ratio=0.25 if s_mode == "quarter" else None),
    )


@dataclass(frozen=True, kw_only=True)
class UL2(Objective):
    """One of the denoisers for each sample, drawn by their rates.

    modes: the ids that spell each mode, by its name in `denoisers`: of one special token, or of the text "[R]". end_id, sentinels: as in
    Denoising. inputs_length: of the span denoisers, as in Denoising.
    """

    end_id: int
    modes: Mapping[str, tuple[int, ...]]
    sentinels: range
    denoisers: tuple[Denoiser, ...] = ul2_denoisers()
    inputs_length: int | None = None
    name: str = "ul2"

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [denoiser.name for denoiser in self.denoisers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"the denoisers are {names} and must be one or more of different names: rename or add one")
        rates = [denoiser.rate for denoiser in self.denoisers]
        if not all(0 < rate < np.inf for rate in rates):
            raise ValueError(f"the rates of {names} are {rates} and must be above 0 and finite: raise them, or leave a denoiser out")
        for denoiser in self.denoisers:
            if not self.modes.get(denoiser.mode):
                raise ValueError(f"denoiser {denoiser.name} opens with mode {denoiser.mode!r}, of which modes has no ids: give them")
            if denoiser.noise is not None and denoiser.target_ratio is not None:
                told = f"denoiser {denoiser.name} has noise and target_ratio={denoiser.target_ratio}"
                raise ValueError(f"{told}, which is a prefix LM's: give one of them")
        taken = {self.end_id, *self.sentinels}
        for mode, ids in self.modes.items():
            if min(ids, default=0) < 0 or taken & {*ids}:
                told = f"mode {mode!r} is spelled {ids}, which must be 0 or more and neither end_id={self.end_id} nor a sentinel"
                raise ValueError(f"{told}: give other ids")
        # Refused here and not at the first sample; the one of most spans first, whose number of sentinels does for all.
        for denoiser in sorted(self.denoisers, key=lambda d: d.noise.ratio / d.noise.mean_span if d.noise else 0.0, reverse=True):
            self._member(denoiser)

    def _member(self, denoiser: Denoiser) -> Objective:
        common: dict[str, object] = {
            "sequence_length": self.sequence_length,
            "vocab_size": self.vocab_size,
            "mode": tuple(self.modes[denoiser.mode]),
            "name": f"{self.name}/{denoiser.name}",
        }
        try:
            if denoiser.noise is None:
                return PrefixLM(target_ratio=denoiser.target_ratio, **common)  # type: ignore[arg-type]
            options = {"end_id": self.end_id, "sentinels": self.sentinels, "inputs_length": self.inputs_length}
            return Denoising(noise=denoiser.noise, **options, **common)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"denoiser {denoiser.name}: {error}") from error

    @cached_property
    def members(self) -> tuple[Objective, ...]:
        """What `denoisers` describe, in their order."""
        return tuple(self._member(denoiser) for denoiser in self.denoisers)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the members, in the order of `denoisers`."""
        return tuple(member.name for member in self.members)

    @property
    def tokens_needed(self) -> int:
        """Tokens of text that fill a sample of any denoiser."""
        return max(member.tokens_needed for member in self.members)

    def __call__(self, tokens: Ids, generator: Generator) -> Sample:
        """The sample of the first of `tokens`, integers [n] with 2 <= n <= tokens_needed: as many as the drawn denoiser needs.

        Raises ValueError for any others.
        """
        tokens = self.check(tokens)
        shares = np.cumsum([denoiser.rate for denoiser in self.denoisers])
        drawn = int(np.searchsorted(shares, generator.uniform(1)[0] * shares[-1], side="right"))
        member = self.members[drawn]
        return member(tokens[: member.tokens_needed], generator)
