"""From a corpus to what the loop eats: a tokenizer, training samples in their order, held-out windows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor

from megapar.collectives import check_same, raise_together
from megapar.data.corpus import load_corpus
from megapar.data.sampler import Sampler, held_out_windows, split_held_out
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
    sampler: Sampler
    description: str
    corpus_sha256: str

    def samples(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets), int64 [count, s], of samples first to first + count - 1 of the run."""
        windows = torch.from_numpy(self.sampler.batch(first, count))
        return windows[:, :-1], windows[:, 1:]

    def held_out_samples(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets), int64 [w, s], that cover every held-out target once."""
        inputs, targets = held_out_windows(self.held_out, self.sampler.sequence_length)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def load_text(config: DataConfig, seed: int) -> Text:
    """Loads, tokenizes and splits the corpus. Raises ValueError for whatever is wrong with it."""
    corpus = load_corpus(config.corpus, config.max_bytes)
    tokenizer = load_tokenizer(config.tokenizer, corpus, config.vocab_size)
    train, held_out = split_held_out(tokenize(corpus, tokenizer), config.held_out)
    sampler = Sampler(train, config.sequence_length, seed)
    if len(held_out) < 2:
        raise ValueError(f"corpus {config.corpus} leaves {len(held_out)} held-out tokens of 2 needed: give more or raise data.held_out")
    description = (
        f"corpus {corpus.source}: {corpus.num_bytes:,} bytes, sha256 {corpus.sha256[:16]}; tokenizer {tokenizer.name}: "
        f"{tokenizer.vocab_size:,} ids; {len(train):,} training and {len(held_out):,} held-out tokens"
    )
    return Text(tokenizer, train, held_out, sampler, description, corpus.sha256)


def load_text_together(config: DataConfig, seed: int, mesh: ParallelMesh) -> Text:
    """`load_text` on every rank, rank 0 first so that the others find its cache; an error on one is raised on all."""
    text, error = None, None
    for turn in (range(1), range(1, mesh.world.size)):
        if mesh.world.rank in turn:
            try:
                text = load_text(config, seed)
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
