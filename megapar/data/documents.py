"""Documents read one at a time, from text, JSON lines, Parquet and Arrow files, packed or not: memory holds one document, not a file."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
PACKED_SUFFIXES = (".gz", ".zst")
TABLE_SUFFIXES = (".parquet", ".arrow")
ROWS_AT_ONCE = 256
PACKED_AT_ONCE, BUFFER = 1 << 14, 1 << 20

_STDLIB_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written by the interpreter's build, so they differ between machines that run the same version.
_STDLIB_GENERATED_PREFIXES = ("_sysconfigdata", "config-")


def find_files(source: str) -> list[Path]:
    """The files of `source`, in order: "stdlib" (the interpreter's own sources), a file, or a folder.

    A folder is a dataset that `datasets` saved (its Arrow files, in their order), or all its non-hidden files that have a suffix of
    TEXT_SUFFIXES, also packed, or of TABLE_SUFFIXES, in the order of their relative paths. Raises ValueError for one without any.
    """
    path = Path(source)
    if source == "stdlib":
        return _stdlib_files()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"corpus {path} does not exist, it must be stdlib, a file or a folder: correct the path")
    if (path / "dataset_dict.json").is_file():
        splits = " ".join(json.loads((path / "dataset_dict.json").read_text())["splits"])
        raise ValueError(f"folder {path} holds a dataset in splits: name the folder of one of them, {splits}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [path / part["filename"] for part in json.loads((path / "state.json").read_text())["_data_files"]]
    files: list[Path] = []
    for root, folders, names in os.walk(path, onerror=_raise):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        found = (Path(root, name) for name in names if not name.startswith("."))
        files += [file for file in found if _suffix(file) in TEXT_SUFFIXES + TABLE_SUFFIXES and file.is_file()]
    if not files:
        known = " ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
        raise ValueError(f"folder {path} has no text file, it needs one of {known} (or its .gz or .zst): add one")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _raise(error: OSError) -> None:
    raise error


class FileDocuments:
    """The documents of a file, read anew each time: a text file is one; a line of .jsonl is one, its `field`; so is a row of a table.

    position: bytes of the file that are read, of its `size`. Raises ValueError, with the place, for text that is not UTF-8, a broken
    packed file, a line or row without a string `field`, and a format whose package is not installed.
    """

    def __init__(self, path: Path, field: str = "text") -> None:
        self.path, self.field, self.size, self.position = path, field, path.stat().st_size, 0

    def __iter__(self) -> Iterator[str]:
        if _suffix(self.path) in TABLE_SUFFIXES:
            yield from self._rows()
        else:
            yield from self._texts()
        self.position = self.size

    def _texts(self) -> Iterator[str]:
        if self.size == 0 and self.path.suffix in (".gz", ".zst"):
            raise ValueError(f"file {self.path} is empty, and no packed file: pack it again, or remove it")
        with open(self.path, "rb") as file, _unpacked(self.path, file) as data:
            if _suffix(self.path) != ".jsonl":
                yield self._decoded(data.read(), 0)
                return
            start = 0
            # Lines end with \n alone: a JSON string may hold U+2028 and other breaks that are not line ends of the file.
            for number, line in enumerate(data, start=1):
                text, self.position = self._decoded(line, start), file.tell()
                if text.strip():
                    yield self._record(text, number)
                start += len(line)

    def _decoded(self, data: bytes, start: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"file {self.path} has byte 0x{data[error.start]:02x} at offset {start + error.start}, which is not UTF-8: "
                "convert the file to UTF-8"
            ) from error

    def _record(self, line: str, number: int) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"file {self.path} line {number} is not JSON ({error}): correct or remove the line") from error
        document = record.get(self.field) if isinstance(record, dict) else None
        if not isinstance(document, str):
            example = f'{{"{self.field}": "..."}}'
            raise ValueError(f"file {self.path} line {number} has no string field {self.field}: write it as {example} or remove it")
        # JSON can escape half a surrogate pair, which no UTF-8 text holds. Most texts are without: encoding finds that out fastest.
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"file {self.path} line {number} has the lone surrogate U+{ord(document[error.start]):04X} in its text, "
                "which is not Unicode text: remove the escape"
            ) from error
        return document

    def _rows(self) -> Iterator[str]:
        pyarrow = _optional("pyarrow", self.path)
        number = 0
        try:
            for table, share in _tables(self.path, self.field):
                self.position = int(self.size * share)
                for document in table.column(self.field).to_pylist():
                    if not isinstance(document, str):
                        raise ValueError(f"file {self.path} row {number} has no string field {self.field}: fill or remove it")
                    yield document
                    number += 1
        except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError, KeyError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"file {self.path} cannot be read from row {number} on ({error}): check the file and --field") from error


def _tables(path: Path, field: str) -> Iterator[tuple[Any, float]]:
    """(rows, the share of the file up to there)."""
    if path.suffix == ".parquet":
        parquet = _optional("pyarrow.parquet", path)
        with parquet.ParquetFile(path) as file:
            total, rows = file.metadata.num_rows, 0
            if field not in file.schema_arrow.names:
                raise KeyError(f"it has the columns {', '.join(file.schema_arrow.names)} and not {field}")
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[field]):
                rows += batch.num_rows
                yield batch, rows / total
        return
    pyarrow = _optional("pyarrow", path)
    with pyarrow.memory_map(str(path)) as file:
        total = max(file.size(), 1)
        for batch in pyarrow.ipc.open_stream(file):
            yield batch, file.tell() / total


@contextmanager
def _unpacked(path: Path, file: BinaryIO) -> Iterator[IO[bytes]]:
    if path.suffix == ".gz":
        with gzip.open(file) as data, _whole(path, "gzip", (gzip.BadGzipFile, EOFError, zlib.error)):
            yield data  # type: ignore[misc]
    elif path.suffix == ".zst":
        zstandard = _optional("zstandard", path)
        with _whole(path, "zstd", (zstandard.ZstdError, EOFError)):
            yield io.BufferedReader(_Zstd(file, path), BUFFER)
    else:
        yield file


class _Zstd(io.RawIOBase):
    """The text of a zstd file of one frame or several. The library's own reader takes a file that is cut for one that ends there."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._frames = file, _optional("zstandard", path).ZstdDecompressor()
        self._frame: Any = None
        self._text, self._packed = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._packed = self._packed or self._file.read(PACKED_AT_ONCE)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            self._frame = self._frame or self._frames.decompressobj()
            self._text, self._packed = self._frame.decompress(self._packed), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count


@contextmanager
def _whole(path: Path, kind: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise ValueError(f"file {path} is not a whole {kind} file ({error}): compress it again") from error


def _optional(name: str, path: Path) -> Any:
    # Not at the top: two of three corpora need neither package.
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise ValueError(f"{path} needs {name.partition('.')[0]}, which is not installed: pip install 'megapar[data]'") from error


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, names in os.walk(root):
        kept = [name for name in subfolders if name not in _STDLIB_EXCLUDED_FOLDERS]
        subfolders[:] = [name for name in kept if not name.startswith(_STDLIB_GENERATED_PREFIXES)]
        paths += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(_STDLIB_GENERATED_PREFIXES)]
    # Order by hash: any prefix is then a fair mix of the modules, and any tail a fair held-out set.
    ordered = sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest())
    # A source file may declare another encoding (PEP 263); a UTF-8 corpus excludes it by rule.
    return [path for path in ordered if _is_utf8(path)]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True
