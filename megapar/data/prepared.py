"""Prepared corpora as a run names them: `data/wiki`, or `0.7:data/wiki 0.3:data/code`, each a NAME.bin and NAME.idx."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapar.data.blend import Blend, split_documents
from megapar.data.indexed import IndexedDataset
from megapar.data.sampler import check_shares
from megapar.data.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer

HASHED_ENDS = 1 << 20


def parse_corpora(text: str) -> list[tuple[float, Path]] | None:
    """The weights and names of prepared corpora, or None for a text that is tokenized when the run starts.

    Raises ValueError for weights that are not above 0, and for what could be both.
    """
    words = [_weighted(word) for word in text.split()]
    found = [word for word in words if word is not None]
    if not found:
        prepared, path = Path(text + ".idx").is_file(), Path(text)
        if path.suffix in (".bin", ".idx") and path.is_file():
            raise ValueError(f"data.corpus is {text}: give the name without {path.suffix}")
        if prepared and path.exists():
            raise ValueError(f"data.corpus {text} is a text, and prepared with .idx: rename one, or write 1:{text} for the latter")
        return [(1.0, path)] if prepared else None
    if len(found) < len(words):
        raise ValueError(f'data.corpus is "{text}": every corpus of a blend has a weight, such as 0.7:data/wiki 0.3:data/code')
    Blend(tuple(weight for weight, _ in found))
    return found


def _weighted(word: str) -> tuple[float, Path] | None:
    weight, colon, name = word.partition(":")
    try:
        return (float(weight), Path(name)) if colon and name else None
    except ValueError:
        return None


@dataclass(frozen=True)
class PreparedCorpus:
    """NAME.bin and NAME.idx, mapped. train, held_out, test: [t], the tokens of the documents up to two shares at the end, and of those.

    fingerprint: of the lengths of all sequences and documents, of where the tokens begin and end, and of their number: no run reads
    terabytes first.
    """

    name: Path
    weight: float
    train: np.ndarray
    held_out: np.ndarray
    test: np.ndarray
    documents: int
    fingerprint: str


def open_corpus(name: Path, weight: float, held_out: float, test: float = 0.0) -> PreparedCorpus:
    """Raises ValueError for files that are missing or damaged or not of one run, and if a part would have no document."""
    dataset = IndexedDataset(name)
    facts = _facts(name)
    counts = [len(dataset), len(dataset.tokens)]
    if facts and [facts.get("documents"), facts.get("tokens")] != counts:
        told = f"{facts.get('documents')} documents of {facts.get('tokens')} tokens, and {name}.idx of {counts[0]} of {counts[1]}"
        raise ValueError(f"{name}.json tells of {told}: they are not of one run, prepare it again")
    check_shares(held_out, test)
    parts = split_documents(len(dataset), (1 - held_out - test, held_out, test))
    cut, end = (int(dataset.document_starts[part.stop]) for part in parts[:2])
    digest = hashlib.sha256(f"{dataset.dtype.name} {counts}".encode())
    for lengths in (dataset.sequence_lengths, dataset.document_indices):
        digest.update(np.ascontiguousarray(lengths).data)
    tokens = dataset.tokens
    for some in (tokens[:HASHED_ENDS], tokens[-HASHED_ENDS:]):
        digest.update(np.ascontiguousarray(some).data)
    return PreparedCorpus(name, weight, tokens[:cut], tokens[cut:end], tokens[end:], len(dataset), digest.hexdigest())


def tokenizer_of(name: Path, spec: str) -> Tokenizer:
    """The tokenizer beside a corpus; for one of Megatron's own, which has none, the file `spec`.

    Raises ValueError if there is none, and for a file that is another than the one beside.
    """
    beside = name.with_name(name.name + ".tokenizer.json")
    named = None if spec == "bpe" else ByteTokenizer() if spec == "bytes" else read_tokenizer(Path(spec))
    if not beside.is_file():
        if named is None:
            raise ValueError(f"{name} has no {beside.name} beside it: give data.tokenizer, the file of the tokenizer that made it")
        return named
    tokenizer, facts = read_tokenizer(beside), _facts(name)
    if facts and facts.get("tokenizer_sha256") != tokenizer.sha256:
        raise ValueError(f"{beside} is not the tokenizer that {name}.json tells of: prepare the corpus again")
    if named is not None and named.sha256 != tokenizer.sha256:
        raise ValueError(f"data.tokenizer {spec} is not {beside}, which made the corpus: leave it out")
    return tokenizer


def _facts(name: Path) -> dict[str, object]:
    path = name.with_name(name.name + ".json")
    facts = json.loads(path.read_text()) if path.is_file() else {}
    return facts if isinstance(facts, dict) else {}
