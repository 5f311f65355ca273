"""What benchmarks/objectives.py asks of fill in the middle: a model trained with it, and a plain one, are to write the same middles.

A document is a line of Python, its tokens are bytes, and a word stands in it twice: `self.offset = offset`. So what follows a middle often
says what belongs there, in a way that a model of a million parameters learns within minutes: lines of all kinds need longer training. One
document in five is transformed, always to SPM order, the nearest to plain text: the paper's half costs so small a model more of its plain
loss than it costs a large one.

A held-out document is cut in two uniform places. The loss of its middle is the mean over the middle's own bytes, among all bytes: of both
models it is asked which byte comes next, not whether the middle ends, which only the one trained with fim has to weigh. It is given

| form           | context                                              | of which model |
|----------------|------------------------------------------------------|----------------|
| SPM            | `<PRE>` `<SUF>` suffix `<MID>` prefix                | trained with fim |
| prefix         | prefix                                               | plain |
| suffix, prefix | suffix prefix                                        | plain |
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megapar.batch import TokenBatch
from megapar.data.corpus import load_corpus
from megapar.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import DecoderStage
from megapar.objectives.causal_lm import token_loss
from megapar.objectives.fim import FillInTheMiddle
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED, Ids, Sample, collate
from megapar.training.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from megapar.training.examples import Examples
from megapar.training.loop import Trained, train

SEQUENCE = 128
BATCH = 8
CORPUS = "corpus.jsonl"
BYTES = 256
"""The ids of the text; the end of a document and the sentinels follow."""
LossFn = Callable[[Tensor, TokenBatch], tuple[Tensor, int]]
SHORTEST, LONGEST = 10, 48
"""Characters of a document."""
RATE = 0.2
SPM, PREFIX, SUFFIX_PREFIX = "SPM", "prefix", "suffix, prefix"
PLAIN = "left to right"


@dataclass(frozen=True, eq=False)
class Middle:
    """A document in three parts, int64; of prefix and middle there is a token at least."""

    prefix: Ids
    middle: Ids
    suffix: Ids


def says_twice(line: str) -> bool:
    """Whether a word of four letters or more stands in it more than once."""
    return any(count > 1 for count in Counter(re.findall("[A-Za-z]{4,}", line)).values())


def write_corpus(path: Path) -> None:
    """Distinct lines of Python's standard library and of torch, of SHORTEST to LONGEST characters, as documents in a random order."""
    texts = (document for source in ("stdlib", *map(str, _sources())) for document in load_corpus(source).documents)
    found = {line for text in texts for line in (" ".join(words.split()) for words in text.splitlines())}
    lines = [line for line in found if SHORTEST <= len(line) <= LONGEST and says_twice(line)]
    lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def _sources() -> list[Path]:
    return sorted(path for path in Path(torch.__file__).parent.rglob("*.py") if path.stat().st_size)


def documents(text: Ids, end_id: int) -> list[Ids]:
    """The whole documents of a text [t] that may begin and end within one, int64, without end tokens."""
    return [document[:-1] for document in np.split(text.astype(np.int64), np.flatnonzero(text == end_id) + 1)[1:-1]]


def cut(document: Ids, generator: Generator) -> Middle:
    """A document [n >= 2] with two different uniform cuts in [1, n]."""
    first, last = (1 + generator.subset(len(document), 2)).tolist()
    return Middle(document[:first], document[first:last], document[last:])


def contexts(m: Middle, fim: FillInTheMiddle) -> dict[str, Ids]:
    """What stands before the middle, by form."""
    pre, suf, mid = (np.array([i]) for i in (fim.prefix_id, fim.suffix_id, fim.middle_id))
    return {
        SPM: np.concatenate([pre, suf, m.suffix, mid, m.prefix]),
        PREFIX: m.prefix,
        SUFFIX_PREFIX: np.concatenate([m.suffix, m.prefix]),
    }


def asked(context: Ids, middle: Ids, form: str) -> Sample:
    """The sample whose losses are those of the middle's tokens alone, after a context of a token or more."""
    sample = Sample.of(np.concatenate([context, middle]), form)
    targets = sample.targets.copy()
    targets[: len(context) - 1] = IGNORED
    return replace(sample, targets=targets)


def batches(samples: Sequence[Sample]) -> Iterator[TokenBatch]:
    for first in range(0, len(samples), 2 * BATCH):
        yield collate(samples[first : first + 2 * BATCH], SEQUENCE)


def byte_loss(stage: DecoderStage, hidden: Tensor, batch: TokenBatch) -> tuple[Tensor, int]:
    """The last stage's (fp32 sum of the losses in nats, number of targets), its distribution taken over bytes alone."""
    assert batch.targets is not None
    loss = vocab_parallel_linear_cross_entropy(hidden, stage.head.weight[:BYTES], batch.targets, tp=None, ignore_index=IGNORED)
    return loss, int((batch.targets != IGNORED).sum())


def config_of(kind: str, seed: int, steps: int, corpus: Path, out: Path) -> Config:
    """The run of one of the two objectives, "fim" or "causal_lm": a document attends to itself alone."""
    alone = {"reset_position_ids": True, "reset_attention_mask": True}
    fim = ObjectiveConfig(kind="fim", fim_level="token", fim_rate=RATE, spm_rate=1.0, **alone)
    return Config(
        model=DecoderConfig(hidden_size=128, layers=4, heads=4, kv_heads=4, ffn_size=336, init_std=0.05),
        data=DataConfig(corpus=str(corpus), tokenizer="bytes", sequence_length=SEQUENCE, held_out=0.02),
        objective=fim if kind == "fim" else ObjectiveConfig(**alone),
        optimizer=OptimizerConfig(lr=2.5e-3, min_lr=2e-4, warmup=0.02),
        run=RunConfig(steps=steps, batch_size=BATCH, seed=seed, sample_tokens=0, out=str(out)),
    )


def losses(trained: Trained, plain: Examples, fim: FillInTheMiddle, forms: Sequence[str]) -> dict[str, float]:
    """Mean nats a token: of the middles of the held-out documents by form, and of the held-out text from left to right."""

    def mean(found: Iterable[TokenBatch], loss: LossFn) -> float:
        totals = trained.model.runner.evaluate(list(found), loss)
        return float(totals.loss) / float(totals.count)

    stage = trained.model.stages[-1]
    whole = documents(plain.text.held_out, plain.text.tokenizer.end_of_text)
    middles = [cut(document, Generator("middle", number)) for number, document in enumerate(whole)]
    result = {PLAIN: mean(plain.evaluation("held_out", 2 * BATCH), partial(token_loss, stage))}
    for form in forms:
        result[form] = mean(batches([asked(contexts(m, fim)[form], m.middle, form) for m in middles]), partial(byte_loss, stage))
    return result


def train_one(seed: int, steps: int, folder: str) -> dict[str, float]:
    """Rank 0 trains with fim, rank 1 plainly, each by itself on one thread; the losses of its model. folder: holds corpus.jsonl."""
    kind, forms = (("fim", (SPM,)), ("causal_lm", (PREFIX, SUFFIX_PREFIX)))[dist.get_rank()]
    configs = {name: config_of(name, seed, steps, Path(folder) / CORPUS, Path(folder) / f"{name}-{seed}") for name in ("fim", "causal_lm")}
    trained = train(configs[kind], ParallelMesh.alone())
    plain, fim = (Examples(trained.examples.text, configs[name]) for name in ("causal_lm", "fim"))
    assert isinstance(fim.objective, FillInTheMiddle)
    return losses(trained, plain, fim.objective, forms)
