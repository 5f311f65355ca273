"""Text in, token batches out: corpora, tokenizers, the data order and the losses a model must beat."""

from megapar.data.baselines import bigram_loss, unigram_loss
from megapar.data.corpus import Corpus, load_corpus
from megapar.data.sampler import Sampler, split_held_out
from megapar.data.tokenizer import Tokenizer, load_tokenizer, read_tokenizer, tokenize

__all__ = [
    "Corpus",
    "Sampler",
    "Tokenizer",
    "bigram_loss",
    "load_corpus",
    "load_tokenizer",
    "read_tokenizer",
    "split_held_out",
    "tokenize",
    "unigram_loss",
]
