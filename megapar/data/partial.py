"""A corpus that is being written: it can be killed at any moment, goes on where it was, and has its names only when it is whole.

    .NAME.partial.bin        tokens       } never shorter than the journal says; what is longer is cut off when the run goes on
    .NAME.partial.lengths    int32 each   }
    .NAME.partial.json       the journal: of what settings, and how far they are on disk; replaced whole

It ends with renames, NAME.idx last: that is the commit. Whoever finds a NAME.bin without it has no corpus, and a run that goes on takes
that NAME.bin back. Files that have their names are never written over, so no .bin is ever beside an .idx of another run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megapar.data.indexed import LONGEST_SEQUENCE, sync, write_index
from megapar.data.tokenizer import Tokenizer

SUFFIXES = (".bin", ".idx", ".json", ".tokenizer.json")
KINDS = ("json", "bin", "idx", "tokenizer.json", "tokenizer.json.new", "facts", "lengths")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """How far a run is. file, row: the place in the inputs, files that are done and documents of the next. empty: documents left out."""

    file: int = 0
    row: int = 0
    documents: int = 0
    empty: int = 0
    tokens: int = 0


class PartialCorpus:
    """NAME.* under way. settings: whatever decides its content, as JSON; only a run with the same goes on.

    resumed: whether there was one to go on with. restart: throw it away instead. As a context manager it is closed at the end.
    Raises ValueError for a NAME that exists, one that another process writes, and one begun with other settings.
    """

    def __init__(self, name: Path, settings: Settings, restart: bool = False) -> None:
        self.paths = {suffix: name.with_name(name.name + suffix) for suffix in SUFFIXES}
        self._hidden = {kind: name.with_name(f".{name.name}.partial.{kind}") for kind in KINDS}
        self.name, self.settings, self.progress = name, json.loads(json.dumps(settings)), Progress()
        name.parent.mkdir(parents=True, exist_ok=True)
        self._lengths = _open(self._hidden["lengths"])
        try:
            fcntl.flock(self._lengths, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lengths.close()
            raise ValueError(f"{name} is being written by another process: wait for it, or choose another name") from error
        try:
            self.resumed = self._resume(restart)
            self._bin = _open(self._hidden["bin"])
        except BaseException:
            self._lengths.close()
            raise

    def _resume(self, restart: bool) -> bool:
        journal, found = self._hidden["json"], None
        # Beside a NAME.bin that is this run's own no hidden one is left: it was renamed.
        foreign = self.paths[".idx"].exists() or (self.paths[".bin"].exists() and self._hidden["bin"].exists())
        if restart and journal.exists() and not foreign:
            # What has its name already is this run's own. The journal goes after it: without one it would be no one's.
            for path in (*self.paths.values(), *(self._hidden[kind] for kind in KINDS[:-1])):
                path.unlink(missing_ok=True)
        elif journal.exists() and not restart:
            found = json.loads(journal.read_text())
            differ = sorted(key for key in {*found["settings"], *self.settings} if found["settings"].get(key) != self.settings.get(key))
            if differ:
                raise ValueError(f"{self.name} was begun with other {' and '.join(differ)}: give the same, or --restart")
        if found and not self._hidden["bin"].exists() and self.paths[".bin"].exists() and not self.paths[".idx"].exists():
            os.replace(self.paths[".bin"], self._hidden["bin"])
        elif found and self.paths[".idx"].exists():
            self._clean()
        for path in self.paths.values():
            # Of a run that goes on, these are its own and are written anew.
            if path.exists() and not (found and path.suffix == ".json"):
                if not journal.exists():  # else it is the state of a run that can go on
                    self._hidden["lengths"].unlink(missing_ok=True)
                raise ValueError(f"{path} exists, and a corpus is not overwritten: remove it or choose another name")
        if found:
            self.progress = Progress(**found["progress"])
        return found is not None

    def begin(self, itemsize: int) -> None:
        """Cuts both files to what the journal says. Raises ValueError if they are shorter: they were changed."""
        for file, size in ((self._bin, self.progress.tokens * itemsize), (self._lengths, self.progress.documents * 4)):
            if os.fstat(file.fileno()).st_size < size:
                raise ValueError(f"{file.name} is shorter than its journal says: give --restart to begin anew")
            file.truncate(size)
            file.seek(size)
        self.commit()

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer is until the corpus is whole."""
        return self._hidden["tokenizer.json"]

    def add(self, tokens: NDArray[np.integer], lengths: NDArray[np.int64], progress: Progress) -> None:
        """Appends documents of `lengths`, end to end in `tokens` of the file's dtype; then the inputs are read up to `progress`."""
        if len(lengths) and int(lengths.max()) > LONGEST_SEQUENCE:
            raise ValueError(f"a document has {lengths.max()} tokens and {LONGEST_SEQUENCE} is the format's limit: split it")
        try:
            self._bin.write(tokens.tobytes())
            self._lengths.write(lengths.astype("<i4").tobytes())
        except OSError as error:
            raise self._told(error) from error
        self.progress = progress

    def commit(self) -> None:
        """Makes what was added last."""
        try:
            sync(self._bin)
            sync(self._lengths)
            _replace(self._hidden["json"], {"settings": self.settings, "progress": asdict(self.progress)})
        except OSError as error:
            raise self._told(error) from error

    def finish(self, dtype: np.dtype, tokenizer: Tokenizer, facts: Settings) -> None:
        """Gives all files their names. facts: what NAME.json says."""
        self.commit()
        count = self.progress.documents
        lengths = np.memmap(self._hidden["lengths"], "<i4", "r", shape=(count,)) if count else np.empty(0, np.int32)
        try:
            with open(self._hidden["idx"], "wb") as index:
                write_index(index, dtype, lengths)
                sync(index)
            named = {self._hidden["tokenizer.json.new"]: ".tokenizer.json", self._hidden["facts"]: ".json"}
            tokenizer.save(self._hidden["tokenizer.json.new"])
            _replace(self._hidden["facts"], facts)
            # All is written: a full disk cannot come between.
            for path, suffix in (named | {self._hidden["bin"]: ".bin", self._hidden["idx"]: ".idx"}).items():
                os.replace(path, self.paths[suffix])
        except OSError as error:
            raise self._told(error) from error
        _sync_folder(self.name.parent)
        self._clean()

    def _clean(self) -> None:
        for kind in ("json", "lengths", "tokenizer.json"):
            self._hidden[kind].unlink(missing_ok=True)

    def _told(self, error: OSError) -> OSError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        done = f"{self.progress.documents:,} documents"
        return OSError(f"the disk of {self.name} is full after {done}: free some of it, and the same command goes on")

    def __enter__(self) -> PartialCorpus:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in (self._bin, self._lengths):
            try:
                file.close()
            except OSError as caught:
                # What a full disk did not take: the error under way says so.
                if error is None:
                    raise self._told(caught) from caught


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _replace(path: Path, content: Settings) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
        sync(file)
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
