"""Tokenized corpora on disk, in Megatron's .bin/.idx format, byte for byte.

    NAME.bin    the tokens, little-endian, documents back to back
    NAME.idx    magic[9] | <Q version 1 | <B dtype code | <Q sequences | <Q documents + 1 |
                int32 length of each sequence | int64 its first byte in NAME.bin | int64 [documents + 1] first sequence of each document
"""

from __future__ import annotations

import os
import struct
import uuid
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
"""The format's codes. It has two for floats, which are no tokens."""
LONGEST_SEQUENCE = 2**31 - 1
WIDE_VOCABULARY = 65500
BLOCK = 1 << 20


def smallest_dtype(vocab_size: int) -> np.dtype:
    """uint16 or int32, by Megatron's rule: uint16 below 65500 ids."""
    return np.dtype("<u2") if vocab_size < WIDE_VOCABULARY else np.dtype("<i4")


def write_index(file: BinaryIO, dtype: np.dtype, lengths: NDArray[np.int32], documents: NDArray[np.int64] | None = None) -> None:
    """Writes an .idx. lengths: int32 [n], of each sequence. documents: the first sequence of each, and n; none: each sequence is one.

    In blocks: the lengths of a corpus that is larger than memory may be a mapped file.
    """
    count = len(lengths) + 1 if documents is None else len(documents)
    file.write(HEADER.pack(MAGIC, 1, _code(dtype), len(lengths), count))
    blocks = [lengths[start : start + BLOCK] for start in range(0, len(lengths), BLOCK)]
    for block in blocks:
        file.write(block.astype("<i4").tobytes())
    first = 0
    for block in blocks:
        ends = first + np.cumsum(block, dtype=np.int64)
        file.write(((ends - block) * dtype.itemsize).astype("<i8").tobytes())
        first = ends[-1]
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        part = np.arange(start, stop) if documents is None else documents[start:stop]
        file.write(part.astype("<i8").tobytes())


class IndexedWriter:
    """Writes NAME.bin and NAME.idx, which appear when it is closed and not before; both whole or neither.

    vocab_size: ids must be below it, if it is given. As a context manager it closes at the end, or leaves nothing behind after an error.
    Raises ValueError for files that exist, and for a dtype that the format does not have.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, vocab_size: int | None = None) -> None:
        self.paths = _paths(prefix)
        self.dtype, self.vocab_size = np.dtype(dtype).newbyteorder("<"), vocab_size
        _code(self.dtype)
        for path in self.paths:
            if path.exists():
                raise ValueError(f"{path} exists, and a corpus is not overwritten: remove it or choose another name")
        self._lengths, self._documents = array("i"), array("q", [0])
        unique = uuid.uuid4().hex
        self._temporary = [path.with_name(f".{path.name}.{unique}") for path in self.paths]
        self._bin = open(self._temporary[0], "xb")  # noqa: SIM115

    def add_document(self, sequences: Sequence[ArrayLike]) -> None:
        """Appends a document of any number of sequences, each integers [n] with n >= 0; most documents are one.

        Raises ValueError, and writes nothing, for what is not integers [n] and for ids outside the vocabulary or the dtype.
        """
        arrays = [self._checked(np.asarray(sequence)) for sequence in sequences]
        for ids in arrays:
            self._bin.write(ids.astype(self.dtype).tobytes())
        self._lengths.extend(map(len, arrays))
        self._documents.append(len(self._lengths))

    def _checked(self, ids: NDArray[np.generic]) -> NDArray[np.generic]:
        if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"a sequence is {ids.dtype} of shape {ids.shape} and must be integers [n]: flatten or convert it")
        if len(ids) > LONGEST_SEQUENCE:
            raise ValueError(f"a sequence has {len(ids)} tokens and {LONGEST_SEQUENCE} is the format's limit: split it")
        limits = np.iinfo(self.dtype)
        most = int(limits.max) if self.vocab_size is None else min(int(limits.max), self.vocab_size - 1)
        # A cast would wrap silently.
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) > most):
            raise ValueError(f"token ids run from {ids.min()} to {ids.max()} and must be in [0, {most}]: use a wider dtype or vocab_size")
        return ids

    def close(self) -> None:
        """Writes the index and gives both files their names, .idx last: data without an index is not read by anyone.

        A second call does nothing.
        """
        if self._bin.closed:
            return
        try:
            lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
            with open(self._temporary[1], "xb") as index:
                write_index(index, self.dtype, lengths, np.frombuffer(self._documents, np.int64))
                sync(index)
            sync(self._bin)
            self._bin.close()
            os.replace(self._temporary[0], self.paths[0])
            try:
                os.replace(self._temporary[1], self.paths[1])
            except OSError:
                self.paths[0].unlink()
                raise
        finally:
            self.abort()

    def abort(self) -> None:
        """Leaves nothing behind that close() has not named."""
        try:
            self._bin.close()
        finally:
            for temporary in self._temporary:
                temporary.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class IndexedDataset:
    """NAME.bin and NAME.idx, mapped into memory: a sequence of documents, each integers [n] of the file's dtype, read-only.

    tokens: [t], all of them. document_starts: int64 [documents + 1], where each document begins in `tokens`, and t.
    sequence_lengths: int32 [sequences]. document_indices: int64 [documents + 1], the first sequence of each document.
    Raises ValueError for a file that is missing, truncated or foreign, and for a .bin that does not match its .idx.
    """

    def __init__(self, prefix: str | Path) -> None:
        data, index = _paths(prefix)
        for path in (data, index):
            if not path.is_file():
                raise ValueError(f"{path} does not exist: give the name without .bin and .idx, and keep the two files together")
        self.dtype, self.sequence_lengths, pointers, self.document_indices = _read_index(index)
        starts = np.zeros(len(pointers) + 1, np.int64)
        np.cumsum(self.sequence_lengths, out=starts[1:])
        documents = self.document_indices
        in_order = documents[0] == 0 and documents[-1] == len(pointers) and (np.diff(documents) >= 0).all()
        if not in_order or (self.sequence_lengths < 0).any() or (starts[:-1] * self.dtype.itemsize != pointers).any():
            raise ValueError(f"{index} does not describe documents back to back: it is damaged, make it again")
        expected, size = int(starts[-1]) * self.dtype.itemsize, data.stat().st_size
        if size != expected:
            raise ValueError(f"{data} has {size} bytes and its .idx describes {expected}: the two are not of one corpus, make them again")
        # An empty file cannot be mapped.
        self.tokens = np.memmap(data, self.dtype, "r") if size else np.empty(0, self.dtype)
        self.document_starts = starts[documents]

    def __len__(self) -> int:
        return len(self.document_starts) - 1

    def __getitem__(self, number: int) -> NDArray[np.integer]:
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} is outside [0, {len(self)})")
        return self.tokens[self.document_starts[number] : self.document_starts[number + 1]]


class DocumentStream:
    """Some documents of a dataset in an order of one's own, end to end as one stream of tokens, read at any place.

    order: int64 [k], numbers of documents; a permutation of them, or a part of one, for an epoch of its own.
    """

    def __init__(self, dataset: IndexedDataset, order: NDArray[np.int64]) -> None:
        if len(order) and not 0 <= order.min() <= order.max() < len(dataset):
            raise ValueError(f"documents {order.min()} to {order.max()} are asked for and there are {len(dataset)}: number them from 0")
        self.dataset, self.order = dataset, order
        self._starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(np.diff(dataset.document_starts)[order], out=self._starts[1:])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(place in `order`, offset in that document) of tokens of the stream; with k * s for places, Megatron's sample index."""
        # The last document that starts there is the one that is not empty.
        at = np.searchsorted(self._starts, places, side="right") - 1
        return at, places - self._starts[at]

    def read(self, first: int, count: int) -> NDArray[np.int64]:
        """Tokens first to first + count - 1 of the stream, int64 [count]. Raises ValueError for any that it does not have."""
        if not 0 <= first <= first + count <= len(self):
            raise ValueError(f"tokens {first} to {first + count - 1} are asked for and the stream has {len(self)}: start another epoch")
        tokens = np.empty(count, np.int64)
        (at,), (offset,) = self.locate(np.array([first]))
        filled = 0
        while filled < count:
            part = self.dataset[self.order[at]][offset : offset + count - filled]
            tokens[filled : filled + len(part)] = part
            filled, at, offset = filled + len(part), at + 1, 0
        return tokens


def _read_index(path: Path) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """(dtype, lengths, pointers, document indices) of an .idx file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} is not an index: it must have {HEADER.size} bytes or more and start with {MAGIC!r}, check the name")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise ValueError(f"{path} is of version {version} with dtype code {code}: version 1 with one of {list(DTYPES)} can be read")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if documents < 1 or size != expected:
        told = "it is truncated, make it again" if size < expected else "it is damaged, or multimodal, which is not read"
        raise ValueError(f"{path} has {size} bytes and {sequences} sequences in {documents - 1} documents take {expected}: {told}")
    index = np.memmap(path, np.uint8, "r")
    parts = np.split(index[HEADER.size :], [4 * sequences, 12 * sequences])
    return DTYPES[code], parts[0].view("<i4"), parts[1].view("<i8"), parts[2].view("<i8")


def _paths(prefix: str | Path) -> tuple[Path, Path]:
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def _code(dtype: np.dtype) -> int:
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    raise ValueError(f"dtype {dtype} is none of {', '.join(str(d) for d in DTYPES.values())}: use uint16 or int32")


def sync(file: BinaryIO) -> None:
    """Has the disk hold all that was written to the file."""
    file.flush()
    os.fsync(file.fileno())
