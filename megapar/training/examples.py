"""The run's micro-batches: windows of the corpus, made samples by the objective.

Sample k is a function of the seed and k: its window is the sampler's, its random numbers are Generator(seed, epoch, place in the epoch,
objective). No rank, layout or resume changes it. A run takes them in order, without those that are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Literal, get_args

import numpy as np

from megapar.batch import TokenBatch
from megapar.data.blend import Blend
from megapar.data.intervals import Interval, Remaining, parse_intervals
from megapar.data.sampler import Sampler
from megapar.data.tokenizer import Tokenizer
from megapar.objectives.causal_lm import CausalLM
from megapar.objectives.denoising import Denoising
from megapar.objectives.fim import FillInTheMiddle
from megapar.objectives.prefix_lm import PrefixLM
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED, Ids, Objective, Sample, collate
from megapar.objectives.spans import SpanNoise
from megapar.objectives.ul2 import UL2, ul2_denoisers, ul2r_denoisers
from megapar.training.config import Config, ObjectiveConfig
from megapar.training.sections import batches_of, steps_of
from megapar.training.text import Text, check_ids

Part = Literal["held_out", "test"]
"""Of the text, that is evaluated on."""
COUNTED = 2000
"""Training samples whose targets the unigram baseline counts."""
PROBED = 4000
"""Tokens of the text on which a tokenizer is tried."""


class Examples:
    """What a run trains and is evaluated on. vocab_size: the tokenizer's ids and, after them, the objective's special tokens. mixture: the
    names of its objectives, if there are several.

    Raises ValueError for settings of the objective that cannot be met, and for a corpus that is short of one sample.
    """

    def __init__(self, text: Text, config: Config) -> None:
        self.text, self.seed, self.sequence_length = text, config.run.seed, config.data.sequence_length
        self.objective, self.vocab_size = make_objective(config.objective, self.sequence_length, text.tokenizer)
        self.kind, names = config.objective.kind, self.objective.names
        self.mixture = names if len(names) > 1 else ()
        self._corpus, stride = config.data.corpus, self.objective.tokens_needed - 1
        self._samplers = [Sampler(tokens, stride, self.seed) for _, tokens in text.parts]
        self._blend = Blend(tuple(weight for weight, _ in text.parts))
        self._always = parse_intervals(config.data.skip)
        self.remaining = Remaining(self._always)

    def leave_out(self, intervals: Iterable[Interval]) -> None:
        """From now on the run has no samples with these numbers, nor those of data.skip."""
        self.remaining = Remaining((*self._always, *intervals))

    def numbers(self, first: int, count: int) -> Interval:
        """[number of the run's sample `first`, one more than that of its sample first + count - 1)."""
        return self.remaining.number(first), self.remaining.number(first + count - 1) + 1

    def batch(self, first: int, count: int) -> TokenBatch:
        """The run's samples first to first + count - 1, of those that are not left out, with their targets."""
        samples = [sample for run in self.remaining.runs(first, count) for sample in self.samples(*run)]
        return self._collated(samples)

    def samples(self, first: int, count: int) -> list[Sample]:
        """Samples with the numbers first to first + count - 1."""
        found: list[Sample | None] = [None] * count
        corpora, numbers = self._blend.draw(first, count)
        for corpus, sampler in enumerate(self._samplers):
            places = np.flatnonzero(corpora == corpus)
            if not len(places):
                continue
            # A corpus's samples come in order, so those of a few numbers in a row are a few in a row of the corpus.
            start = int(numbers[places[0]])
            windows = sampler.batch(start, len(places))
            check_ids(windows, self.text.tokenizer, self._corpus)
            # Alone, a corpus needs no number.
            which = (corpus,) if len(self._samplers) > 1 else ()
            for place, number, window in zip(places, range(start, start + len(places)), windows, strict=True):
                found[place] = self._sample(window, *which, *divmod(number, sampler.samples_per_epoch))
        return [sample for sample in found if sample is not None]

    def evaluation(self, part: Part, count: int) -> Iterator[TokenBatch]:
        """Batches of at most `count` samples that cover that part of the text once."""
        samples = self.evaluation_samples(part)
        for first in range(0, len(samples), count):
            yield self._collated(samples[first : first + count])

    def evaluation_samples(self, part: Part) -> list[Sample]:
        """The samples of that part of the text: a window's last token is the next one's first."""
        return list(self._evaluated(part))

    def _evaluated(self, part: Part) -> Iterator[Sample]:
        tokens, stride = getattr(self.text, part), self.objective.tokens_needed - 1
        for number, start in enumerate(range(0, len(tokens) - 1, stride)):
            yield self._sample(tokens[start : start + stride + 1], part, number)

    def epochs(self, samples: int) -> float:
        """How often a run of so many samples reads its corpus; of a blend, the corpus that it reads most often."""
        counts = self._blend.counts(self.numbers(0, samples)[1] if samples else 0)
        return max(float(count) / sampler.samples_per_epoch for count, sampler in zip(counts, self._samplers, strict=True))

    def check(self, config: Config) -> None:
        """Raises ValueError for a run that would fail later: text that the objective cannot take apart or has no targets in; and for one
        that reads its corpus more than data.max_epochs times."""
        if isinstance(self.objective, FillInTheMiddle):
            self.objective.check_tokenizer(self.text.train[:PROBED])
        for part in get_args(Part):
            if len(getattr(self.text, part)) and not any(_targets(sample).size for sample in self._evaluated(part)):
                raise ValueError(f"data.{part} leaves text in which objective {self.kind} has no target: raise it")
        samples = batches_of(config).samples_after(steps_of(config))
        epochs, most = self.epochs(samples), config.data.max_epochs
        if most is not None and not epochs <= most:
            told = f"the run's {samples:,} samples read data.corpus {epochs:.2f} times and data.max_epochs is {most}"
            raise ValueError(f"{told}: make the run shorter, give more text, or raise it")

    def unigram_loss(self) -> float:
        """Mean nats of the held-out targets under the add-one unigram of the first training samples' targets."""
        counts = np.ones(self.vocab_size)
        for sample in self.samples(0, min(COUNTED, sum(sampler.samples_per_epoch for sampler in self._samplers))):
            counts += np.bincount(_targets(sample), minlength=self.vocab_size)
        held_out = np.concatenate([_targets(sample) for sample in self.evaluation_samples("held_out")])
        return float(-np.log(counts / counts.sum())[held_out].mean())

    def _collated(self, samples: list[Sample]) -> TokenBatch:
        return collate(samples, self.sequence_length, self.mixture)

    def _sample(self, window: Ids, *place: int | str) -> Sample:
        return self.objective(window, Generator(self.seed, *place, self.kind))


def _targets(sample: Sample) -> Ids:
    return sample.targets[sample.targets != IGNORED]


KEYS = {
    "causal_lm": {"reset_position_ids", "reset_attention_mask", "eod_mask_loss"},
    "prefix_lm": {"target_ratio"},
    "fim": {"fim_rate", "spm_rate", "fim_level", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"},
    "denoising": {"style", "noise_ratio", "mean_span", "span_lengths", "sentinels"},
    "ul2": {"denoisers", "s_mode", "sentinels"},
}
"""What each kind of objective reads of its section."""


def make_objective(config: ObjectiveConfig, sequence_length: int, tokenizer: Tokenizer) -> tuple[Objective, int]:
    """The objective, and the size of the vocabulary with its special tokens, which follow the tokenizer's ids.

    Raises ValueError for settings that cannot be met, and for a key of another kind of objective, which would change nothing.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name != "kind" and field.name not in KEYS[config.kind] and value != field.default:
            kinds = " and ".join(kind for kind, keys in KEYS.items() if field.name in keys)
            raise ValueError(f"objective.{field.name}={value} is for {kinds}, and objective.kind is {config.kind}: leave it out")
    try:
        return _made(config, sequence_length, tokenizer)
    except ValueError as error:
        raise ValueError(f"[objective] {error}") from error


def _made(config: ObjectiveConfig, sequence_length: int, tokenizer: Tokenizer) -> tuple[Objective, int]:
    first, end = tokenizer.vocab_size, tokenizer.end_of_text
    resets = {name: getattr(config, name) for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")}
    if config.kind == "causal_lm":
        return CausalLM(sequence_length=sequence_length, vocab_size=first, end_id=end, **resets), first
    if config.kind == "prefix_lm":
        return PrefixLM(sequence_length=sequence_length, vocab_size=first, target_ratio=config.target_ratio), first
    if config.kind == "fim":
        fim = FillInTheMiddle(
            sequence_length=sequence_length,
            vocab_size=first,
            end_id=end,
            prefix_id=first,
            suffix_id=first + 1,
            middle_id=first + 2,
            rate=config.fim_rate,
            spm_rate=config.spm_rate,
            level=config.fim_level,
            tokenizer=tokenizer,
            **resets,
        )
        return fim, first + 3
    sentinels = range(first, first + config.sentinels)
    if config.kind == "denoising":
        denoising = Denoising(
            sequence_length=sequence_length,
            vocab_size=first,
            end_id=end,
            noise=SpanNoise(ratio=config.noise_ratio, mean_span=config.mean_span, lengths=config.span_lengths),
            style=config.style,
            sentinels=sentinels,
            mask_id=sentinels.stop,
        )
        return denoising, sentinels.stop + 1
    modes = {mode: (sentinels.stop + place,) for place, mode in enumerate("RSX")}
    denoisers = (ul2_denoisers if config.denoisers == "ul2" else ul2r_denoisers)(config.s_mode)
    ul2 = UL2(
        sequence_length=sequence_length, vocab_size=first, end_id=end, modes=modes, sentinels=sentinels, denoisers=denoisers
    )
    return ul2, sentinels.stop + len(modes)
