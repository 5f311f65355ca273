"""From a corpus to tokens: a tokenizer, the training text, the held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from megapar.collectives import check_same, raise_together
from megapar.data.corpus import load_corpus
from megapar.data.sampler import split_held_out
from megapar.data.tokenizer import Tokenizer, load_tokenizer, tokenize
from megapar.mesh import ParallelMesh
from megapar.training.config import DataConfig

LONGEST_PREPARATION = timedelta(hours=6)


@dataclass(frozen=True)
class Text:
    """A tokenized corpus. `train` and `held_out` are int32 ids; `description` says in a line what it is."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    description: str
    corpus_sha256: str


def load_text(config: DataConfig) -> Text:
    """Loads, tokenizes and splits the corpus. Raises ValueError for whatever is wrong with it."""
    corpus = load_corpus(config.corpus, config.max_bytes)
    tokenizer = load_tokenizer(config.tokenizer, corpus, config.vocab_size)
    train, held_out = split_held_out(tokenize(corpus, tokenizer), config.held_out)
    if len(held_out) < 2:
        raise ValueError(f"corpus {config.corpus} leaves {len(held_out)} held-out tokens of 2 needed: give more or raise data.held_out")
    description = (
        f"corpus {corpus.source}: {corpus.num_bytes:,} bytes, sha256 {corpus.sha256[:16]}; tokenizer {tokenizer.name}: "
        f"{tokenizer.vocab_size:,} ids; {len(train):,} training and {len(held_out):,} held-out tokens"
    )
    return Text(tokenizer, train, held_out, description, corpus.sha256)


def load_text_together(config: DataConfig, mesh: ParallelMesh) -> Text:
    """`load_text` on every rank, rank 0 first so that the others find its cache; an error on one is raised on all."""
    text, error = None, None
    for turn in (range(1), range(1, mesh.world.size)):
        if mesh.world.rank in turn:
            try:
                text = load_text(config)
            except (ValueError, OSError) as caught:
                error = caught
            if mesh.store is not None:
                mesh.store.set(f"megapar/text/{mesh.world.rank}", "1")
        if mesh.store is not None and turn:
            # A large corpus takes longer than a collective may wait.
            mesh.store.wait([f"megapar/text/{rank}" for rank in turn], LONGEST_PREPARATION)
        raise_together(error, mesh.world)
    assert text is not None
    check_same([text.corpus_sha256, text.tokenizer.sha256], mesh.world, "[corpus, tokenizer] sha256")
    return text
