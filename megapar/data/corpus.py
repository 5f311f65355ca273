"""The corpus: an ordered tuple of documents and the hash that names it."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megapar.data.documents import FileDocuments, find_files


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order; `sha256` (hex) covers their text and their boundaries."""

    source: str
    documents: tuple[str, ...]
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Return the size of all documents in UTF-8 bytes."""
        return sum(len(document.encode()) for document in self.documents)


def load_corpus(source: str, max_bytes: int | None = None) -> Corpus:
    """Read the documents of `source`, in order, up to `max_bytes` UTF-8 bytes (the last one is cut to fit).

    `source` is what `find_files` takes: "stdlib" (the running interpreter's standard library, one document a `.py` file), the path of
    a text file (one document), of a `.jsonl` file (one document a line, its `text` field; blank lines are skipped), of either with
    `.gz` or `.zst`, of a Parquet or Arrow file, or of a folder of them. Empty documents are left out.

    Raises ValueError for what `find_files` and `FileDocuments` do, a corpus without text, and `max_bytes` below 1.
    """
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"max_bytes is {max_bytes}, it must be at least 1: raise it, or leave it out for all text")
    found = (document for path in find_files(source) for document in FileDocuments(path))
    documents = tuple(_take_bytes(found, max_bytes))
    if not documents:
        limit = "" if max_bytes is None else f" in its first {max_bytes} bytes"
        raise ValueError(f"corpus {source} has no text{limit}, one character is needed: give a source with text")
    return Corpus(source=source, documents=documents, sha256=_hash_documents(documents))


def _hash_documents(documents: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode()
        # The length makes ("ab", "c") and ("a", "bc") different corpora.
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()


def _take_bytes(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    remaining = max_bytes
    for document in documents:
        if remaining is not None:
            encoded = document.encode()
            # A cut can only split the last character, which "ignore" then drops.
            document = encoded[:remaining].decode(errors="ignore")
            remaining -= len(encoded)
        if document:
            yield document
        if remaining is not None and remaining <= 0:
            return
