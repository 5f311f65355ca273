"""From a corpus to tokens: a tokenizer, the training text, the held-out text; tokenized now, or before by `megapar prepare`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from megapar.collectives import check_same, raise_together
from megapar.data.corpus import load_corpus
from megapar.data.prepared import PreparedCorpus, open_corpus, parse_corpora, tokenizer_of
from megapar.data.sampler import split_held_out
from megapar.data.tokenizer import Tokenizer, load_tokenizer, tokenize
from megapar.mesh import ParallelMesh
from megapar.training.config import DataConfig

LONGEST_PREPARATION = timedelta(hours=6)
COUNTED_TOKENS = 20_000_000
"""Of prepared corpora, for the models that count."""


@dataclass(frozen=True)
class Text:
    """A tokenized corpus, or a blend. `held_out` and `test` are ids; `description` says in a line what it is.

    train: the training ids, for a prepared corpus a part of them: what the models that count are trained on. parts: all of them, each
    corpus's weight and ids, which may be a mapped file.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    test: np.ndarray
    description: str
    corpus_sha256: str
    parts: tuple[tuple[float, np.ndarray], ...]


def load_text(config: DataConfig) -> Text:
    """Loads, tokenizes and splits the corpus, or maps prepared ones. Raises ValueError for whatever is wrong with it."""
    prepared = parse_corpora(config.corpus)
    if prepared is not None:
        if config.max_bytes is not None:
            raise ValueError(f"data.max_bytes={config.max_bytes} is for text, and data.corpus {config.corpus} is prepared: leave it out")
        return _blend(config, [open_corpus(name, weight, config.held_out, config.test) for weight, name in prepared])
    corpus = load_corpus(config.corpus, config.max_bytes)
    tokenizer = load_tokenizer(config.tokenizer, corpus, config.vocab_size)
    train, held_out, test = split_held_out(tokenize(corpus, tokenizer), config.held_out, config.test)
    _check_parts(config, held_out, test)
    description = (
        f"corpus {corpus.source}: {corpus.num_bytes:,} bytes, sha256 {corpus.sha256[:16]}; tokenizer {tokenizer.name}: "
        f"{tokenizer.vocab_size:,} ids; {len(train):,} training and {len(held_out):,} held-out tokens"
    ) + (f", {len(test):,} test tokens" if len(test) else "")
    return Text(tokenizer, train, held_out, test, description, corpus.sha256, ((1.0, train),))


def _blend(config: DataConfig, corpora: list[PreparedCorpus]) -> Text:
    if config.held_out_tokens < 2:
        raise ValueError(f"data.held_out_tokens={config.held_out_tokens} must be 2 or more: raise it")
    tokenizers = [tokenizer_of(corpus.name, config.tokenizer) for corpus in corpora]
    for corpus, tokenizer in zip(corpora, tokenizers, strict=True):
        if tokenizer.sha256 != tokenizers[0].sha256:
            raise ValueError(f"{corpora[0].name} and {corpus.name} have different tokenizers: prepare both with --tokenizer, one file")
    total = sum(corpus.weight for corpus in corpora)
    shares = [corpus.weight / total for corpus in corpora]
    train = [corpus.train[: int(COUNTED_TOKENS * share)] for share, corpus in zip(shares, corpora, strict=True)]
    most = [max(2, int(config.held_out_tokens * share)) for share in shares]
    held_out = [corpus.held_out[:limit] for limit, corpus in zip(most, corpora, strict=True)]
    test = [corpus.test[:limit] for limit, corpus in zip(most, corpora, strict=True)]
    for ids in (*train, *held_out, *test):
        check_ids(ids, tokenizers[0], config.corpus)  # before a cast could wrap them
    counted, evaluated, tested = (np.concatenate(arrays).astype(np.int32) for arrays in (train, held_out, test))
    _check_parts(config, evaluated, tested)
    told = [f"{share:.3g} of {corpus.name}: {corpus.documents:,} documents, {len(corpus.train):,} training tokens, "
            f"fingerprint {corpus.fingerprint[:16]}" for share, corpus in zip(shares, corpora, strict=True)]  # fmt: skip
    description = (
        f"corpus {'; '.join(told)}; tokenizer {tokenizers[0].name}: {tokenizers[0].vocab_size:,} ids; "
        f"{len(evaluated):,} held-out and {len(tested):,} test tokens; models that count see {len(counted):,} training tokens"
    )
    digest = hashlib.sha256(repr([(share, corpus.fingerprint) for share, corpus in zip(shares, corpora, strict=True)]).encode())
    parts = tuple((share, corpus.train) for share, corpus in zip(shares, corpora, strict=True))
    return Text(tokenizers[0], counted, evaluated, tested, description, digest.hexdigest(), parts)


def _check_parts(config: DataConfig, held_out: np.ndarray, test: np.ndarray) -> None:
    for key, share, part in (("held_out", config.held_out, held_out), ("test", config.test, test)):
        if share and len(part) < 2:
            raise ValueError(f"corpus {config.corpus} leaves {len(part)} {key} tokens of 2 needed: give more text or raise data.{key}")


def check_ids(ids: np.ndarray, tokenizer: Tokenizer, corpus: str) -> None:
    """Raises ValueError for ids that the tokenizer does not have: another made the corpus."""
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        limits = f"run from {ids.min()} to {ids.max()} and must be in [0, {tokenizer.vocab_size})"
        raise ValueError(f"data.corpus {corpus}: token ids {limits}: give the tokenizer that made them")


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
