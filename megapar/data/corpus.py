"""The corpus: an ordered tuple of documents and the hash that names it."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")

_STDLIB_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written by the interpreter's build, so they differ between machines that run the same version.
_STDLIB_GENERATED_PREFIXES = ("_sysconfigdata", "config-")


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

    `source` is "stdlib" (the running interpreter's standard library, one document a `.py` file), or the path of
    a text file (one document), of a `.jsonl` file (one document a line, its `text` field; blank lines are
    skipped), of either with `.gz`, or of a folder, whose non-hidden files with a suffix in `TEXT_SUFFIXES`
    (or that suffix and `.gz`) are read in the order of their relative paths. Empty documents are left out.

    Raises ValueError for a missing path, a folder without text files, a corpus without text, text that is not
    UTF-8, a broken gzip file, a JSON line without a string `text`, and `max_bytes` below 1.
    """
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"max_bytes is {max_bytes}, it must be at least 1: raise it, or leave it out for all text")
    found = _stdlib_documents() if source == "stdlib" else _path_documents(Path(source))
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


def _stdlib_documents() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _STDLIB_EXCLUDED_FOLDERS and not name.startswith(_STDLIB_GENERATED_PREFIXES)
        ]
        paths += [
            Path(folder, name)
            for name in names
            if name.endswith(".py") and not name.startswith(_STDLIB_GENERATED_PREFIXES)
        ]

    # Order by hash: any prefix is then a fair mix of the modules, and any tail a fair held-out set.
    def path_hash(path: Path) -> str:
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()

    for path in sorted(paths, key=path_hash):
        try:
            yield path.read_bytes().decode()
        except UnicodeDecodeError:
            # A source file may declare another encoding (PEP 263); a UTF-8 corpus excludes it by rule.
            continue


def _path_documents(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from _file_documents(path)
    elif path.is_dir():
        files = _text_files(path)
        if not files:
            known = " ".join(TEXT_SUFFIXES)
            raise ValueError(f"folder {path} has no text file, it needs one of {known} (or its .gz): add one")
        for file in files:
            yield from _file_documents(file)
    else:
        raise ValueError(f"corpus {path} does not exist, it must be stdlib, a file or a folder: correct the path")


def _text_files(folder: Path) -> list[Path]:
    files = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and _text_suffix(path) in TEXT_SUFFIXES and path.is_file():
            files.append(path)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _text_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _file_documents(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"file {path} is not a whole gzip file ({error}): compress it again") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"file {path} has byte 0x{data[error.start]:02x} at offset {error.start}, which is not UTF-8: "
            "convert the file to UTF-8"
        ) from error
    if _text_suffix(path) == ".jsonl":
        yield from _json_line_documents(path, text)
    else:
        yield text


def _json_line_documents(path: Path, text: str) -> Iterator[str]:
    # Not str.splitlines: a JSON string may hold U+2028 and other breaks that are not line ends of the file.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"file {path} line {number} is not JSON ({error}): correct or remove the line") from error
        document = record.get("text") if isinstance(record, dict) else None
        if not isinstance(document, str):
            raise ValueError(
                f'file {path} line {number} has no string field text: write it as {{"text": "..."}} or remove it'
            )
        # JSON can escape half a surrogate pair, which no UTF-8 text holds.
        surrogate = next((character for character in document if "\ud800" <= character <= "\udfff"), None)
        if surrogate is not None:
            raise ValueError(
                f"file {path} line {number} has the lone surrogate U+{ord(surrogate):04X} in its text, "
                "which is not Unicode text: remove the escape"
            )
        yield document
