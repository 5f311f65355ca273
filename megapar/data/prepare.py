"""Text into tokens on disk: inputs of any size to NAME.bin and NAME.idx, in Megatron's format, with the tokenizer and a NAME.json beside.

One thread reads and writes, two hand batches to the tokenizer, whose library has threads of its own: it never waits for a file.
(As fast as worker processes, on two cores, and there is no text to send to them.)
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megapar.data.documents import FileDocuments, find_files
from megapar.data.indexed import smallest_dtype
from megapar.data.partial import PartialCorpus, Progress, Settings
from megapar.data.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer, check_bpe_size, read_tokenizer, train_bpe

BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 20, 4096
IN_FLIGHT = 3


@dataclass(frozen=True)
class Preparation:
    """What is made. inputs: as `find_files` takes them, in order. tokenizer: `bpe`, `bytes`, `characters` or a tokenizer file.

    bpe is trained on the first documents of every file, train_bytes of characters in all. workers: threads of the tokenizer, none: one a
    core; it counts only in a process that has not used it yet. commit_seconds: how much a killed run may have to do again.
    """

    inputs: tuple[str, ...]
    out: Path
    tokenizer: str = "bpe"
    vocab_size: int = 32000
    field: str = "text"
    workers: int | None = None
    train_bytes: int = 200_000_000
    commit_seconds: float = 5.0


def prepare(asked: Preparation, restart: bool = False, told: Callable[[Progress, float], None] = lambda progress, share: None) -> Progress:
    """Makes asked.out, or goes on with it, and returns what it holds. told: called now and then with the share of the input bytes.

    Raises ValueError for inputs that cannot be read, with file and place, and for what `PartialCorpus` refuses; OSError for a full disk.
    Either leaves nothing under the final names.
    """
    if asked.workers is not None:
        if asked.workers < 1:
            raise ValueError(f"workers is {asked.workers}, it must be at least 1: raise it")
        os.environ["RAYON_NUM_THREADS"] = str(asked.workers)
    if asked.tokenizer == "bpe":
        check_bpe_size(asked.vocab_size)
    files = list(chain.from_iterable(map(find_files, asked.inputs)))
    settings = _settings(asked, files)
    with PartialCorpus(asked.out, settings, restart) as partial:
        tokenizer = _tokenizer(asked, files, partial)
        dtype = smallest_dtype(tokenizer.vocab_size)
        partial.begin(dtype.itemsize)
        _write(_Inputs(files, asked.field, partial.progress), tokenizer, dtype, partial, asked.commit_seconds, told)
        if not partial.progress.documents:
            raise ValueError(f"{' '.join(asked.inputs)} has no text, one character is needed: give inputs with text")
        partial.finish(dtype, tokenizer, _facts(partial.progress, tokenizer, dtype, settings))
        return partial.progress


class _Inputs:
    """Batches of the documents that come after `progress`, with where each ends. done: bytes of the files that are read."""

    def __init__(self, files: Sequence[Path], field: str, progress: Progress) -> None:
        self.files, self.field, self.progress = files, field, progress
        sizes = [path.stat().st_size for path in files]
        self.done, self.total = sum(sizes[: progress.file]), max(sum(sizes), 1)

    def __iter__(self) -> Iterator[tuple[list[str], Progress]]:
        batch: list[str] = []
        characters, empty, file = 0, self.progress.empty, self.progress.file
        for file in range(self.progress.file, len(self.files)):
            reader, row, before = FileDocuments(self.files[file], self.field), 0, self.done
            skip = self.progress.row if file == self.progress.file else 0
            for row, document in enumerate(reader, start=1):
                self.done = before + reader.position
                if row <= skip:
                    continue
                if document:
                    batch.append(document)
                else:
                    empty += 1
                characters += len(document)
                if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
                    yield batch, replace(self.progress, file=file, row=row, empty=empty)
                    batch, characters = [], 0
            self.done = before + reader.size
        if self.progress.file < len(self.files):
            yield batch, replace(self.progress, file=len(self.files), row=0, empty=empty)


def _write(
    inputs: _Inputs, tokenizer: Tokenizer, dtype: np.dtype, partial: PartialCorpus, every: float, told: Callable[[Progress, float], None]
) -> None:
    waiting: deque[tuple[Future[tuple[NDArray[np.integer], NDArray[np.int64]]], Progress, int]] = deque()
    committed = time.monotonic()

    def add_first() -> None:
        nonlocal committed
        future, place, done = waiting.popleft()
        tokens, lengths = future.result()
        was = partial.progress
        now = replace(place, documents=was.documents + len(lengths), tokens=was.tokens + len(tokens))
        partial.add(tokens, lengths, now)
        if time.monotonic() - committed >= every:
            partial.commit()
            committed = time.monotonic()
        told(now, done / inputs.total)

    with ThreadPoolExecutor(IN_FLIGHT - 1) as pool:
        try:
            for batch, place in inputs:
                waiting.append((pool.submit(_encode, tokenizer, batch, dtype), place, inputs.done))
                if len(waiting) == IN_FLIGHT:
                    add_first()
            while waiting:
                add_first()
        finally:
            for future, _, _ in waiting:
                future.cancel()


def _encode(tokenizer: Tokenizer, documents: list[str], dtype: np.dtype) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """The documents' ids of that dtype, each followed by the end of text, and their lengths with it."""
    encoded, end = tokenizer.encode_batch(documents), np.array([tokenizer.end_of_text], np.int32)
    tokens = np.concatenate([np.empty(0, np.int32), *chain.from_iterable((ids, end) for ids in encoded)])
    most = min(tokenizer.vocab_size - 1, int(np.iinfo(dtype).max))
    # A cast would wrap silently.
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() <= most:
        raise ValueError(f"token ids run from {tokens.min()} to {tokens.max()} and must be in [0, {most}]: the tokenizer is damaged")
    return tokens.astype(dtype), np.array([len(ids) + 1 for ids in encoded], np.int64)


def _tokenizer(asked: Preparation, files: Sequence[Path], partial: PartialCorpus) -> Tokenizer:
    """The tokenizer of the run that is gone on with; for a new one it is made and kept."""
    path = partial.tokenizer_path
    if not partial.resumed:
        if asked.tokenizer == "bpe":
            train_bpe(_some(files, asked.field, asked.train_bytes), asked.vocab_size, path)
        else:
            _named(asked, files).save(path)
    return read_tokenizer(path)


def _named(asked: Preparation, files: Sequence[Path]) -> Tokenizer:
    if asked.tokenizer == "bytes":
        return ByteTokenizer()
    if asked.tokenizer == "characters":
        return CharacterTokenizer(set().union(*chain.from_iterable(FileDocuments(path, asked.field) for path in files)))
    return read_tokenizer(Path(asked.tokenizer))


def _some(files: Sequence[Path], field: str, characters: int) -> Iterator[str]:
    """The first documents of each file: an equal share of all characters."""
    share = max(1, characters // max(len(files), 1))
    for path in files:
        left = share
        for document in FileDocuments(path, field):
            yield document[:left]
            left -= len(document)
            if left <= 0:
                break


def _settings(asked: Preparation, files: Iterable[Path]) -> Settings:
    files = list(files)
    names, times = (json.dumps(told) for told in ([[str(p), p.stat().st_size] for p in files], [p.stat().st_mtime_ns for p in files]))
    tokenizer = asked.tokenizer
    if tokenizer == "bpe":
        tokenizer = f"bpe of {asked.vocab_size} ids and {asked.train_bytes} bytes"
    elif tokenizer not in ("bytes", "characters"):
        tokenizer = read_tokenizer(Path(tokenizer)).sha256
    hashed = {key: hashlib.sha256(text.encode()).hexdigest() for key, text in (("inputs", names), ("times of the inputs", times))}
    return {**hashed, "tokenizer": tokenizer, "field": asked.field}


def _facts(progress: Progress, tokenizer: Tokenizer, dtype: np.dtype, settings: Settings) -> Settings:
    counts = {key: value for key, value in asdict(progress).items() if key in ("documents", "empty", "tokens")}
    made = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text, "tokenizer_sha256": tokenizer.sha256}
    return {"version": 1, **counts, "dtype": dtype.name, **made, "inputs_sha256": settings["inputs"], "field": settings["field"]}
