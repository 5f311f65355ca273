"""One rank's files of a checkpoint: its boxes in safetensors files of about FILE_BYTES, written and hashed from the tensors' memory."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapar.training.checkpoint.disk import Disk
from megapar.training.checkpoint.manifest import Entry
from megapar.training.checkpoint.tensor_file import header, memory, ordered
from megapar.zero.state import StateBox

FILE_BYTES = 64 << 20
FILES_AT_ONCE = 2
"""One is hashed while another is on its way to the disk, or from it."""


Held = list[tuple[StateBox, Tensor]]


class RankFiles:
    """Writes the boxes that this rank owns into `folder`, which it makes: by `run`, in this thread or another.

    snapshot: `run` first copies them all to host memory, and then sets `copied`: from then on nobody needs the boxes.
    Afterwards `error` is what went wrong, and `entries` and `files` are this rank's part of the manifest.
    """

    def __init__(
        self, folder: Path, boxes: Iterable[StateBox], rank: int, disk: Disk, *, file_bytes: int = FILE_BYTES, snapshot: bool = False
    ) -> None:
        self.folder, self.disk, self.rank, self.snapshot = folder, disk, rank, snapshot
        self.copied = threading.Event()
        self.error: BaseException | None = None
        self.entries: list[Entry] = []
        self.files: dict[str, dict[str, Any]] = {}
        self._copied_sizes: list[int] = []
        self._groups = list(grouped([box for box in boxes if box.owned], file_bytes))
        self._stream: Any = None
        if torch.cuda.is_initialized():
            # Not the stream that the next step runs on, but not before what that one has been given so far.
            self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    @property
    def snapshot_bytes(self) -> int:
        """Of the copies that are not written yet."""
        return sum(self._copied_sizes)

    def run(self) -> None:
        """What goes wrong is kept in `error`; an interrupt of the main thread is raised too."""
        try:
            self.disk.make_folder(self.folder)
            groups = self._copies() if self.snapshot else (partial(self._read, group) for group in self._groups)
            self._groups = []
            self._write_all(groups)
            self.disk.sync(self.folder, f"the files of rank {self.rank}")
        except BaseException as error:
            self.error = error
            if threading.current_thread() is threading.main_thread() and not isinstance(error, Exception):
                raise
        finally:
            self._copied_sizes = []
            self.copied.set()

    def _copies(self) -> Iterator[Callable[[], Held]]:
        """Copies of all boxes, made now; each group is let go when it is written."""
        copies: deque[Held] = deque()
        for group in self._groups:
            copies.append(self._read(group, copy=True))
            self._copied_sizes.append(sum(box.bytes for box in group))
        self.copied.set()
        return (partial(_same, copies.popleft()) for _ in range(len(copies)))

    def _read(self, group: Sequence[StateBox], copy: bool = False) -> Held:
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return [(box, box.read().detach().to("cpu", copy=copy).contiguous()) for box in group]

    def _write_all(self, groups: Iterator[Callable[[], Held]]) -> None:
        pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="checkpoint")
        try:
            for name, entries, told in pool.map(self._write, itertools.count(), groups):
                self.entries += entries
                self.files[name] = told
                self._copied_sizes = self._copied_sizes[1:]
        finally:
            pool.shutdown(cancel_futures=True)

    def _write(self, number: int, group: Callable[[], Held]) -> tuple[str, list[Entry], dict[str, Any]]:
        """One file: its name, and what the manifest says of it and of what is in it."""
        name = f"rank-{self.rank:05d}-{number:05d}.safetensors"
        entries: dict[str, Entry] = {}
        values: dict[str, Tensor] = {}
        for box, tensor in group():
            piece, key = box.piece, f"{box.kind}/{box.piece.name}@{','.join(map(str, box.piece.start))}"
            if key in values:
                raise ValueError(f"two parameters hold {piece.name}: give the stages of a model the names that they have in the whole")
            place = {"shape": list(piece.shape), "start": list(piece.start), "stop": list(piece.stop)}
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries[key], values[key] = {"kind": box.kind, "name": piece.name, **place, "dtype": dtype, "file": name, "key": key}, tensor
        order = ordered([(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in values.items()])
        hashed, size = hashlib.sha256(), 0

        def parts() -> Iterator[memoryview | bytes]:
            nonlocal size
            contents: list[memoryview | bytes] = [header(order), *(memory(values[key]) for key, *_ in order)]
            for part in contents:
                hashed.update(part)
                size += len(part)
                yield part

        self.disk.write(self.folder / name, parts())
        return name, list(entries.values()), {"bytes": size, "sha256": hashed.hexdigest()}


def grouped(boxes: Iterable[StateBox], file_bytes: int) -> Iterator[list[StateBox]]:
    """In their order, of at most `file_bytes` together, but one at least."""
    group: list[StateBox] = []
    size = 0
    for box in boxes:
        if group and size + box.bytes > file_bytes:
            yield group
            group, size = [], 0
        group.append(box)
        size += box.bytes
    if group:
        yield group


def _same(held: Held) -> Held:
    return held
