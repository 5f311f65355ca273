"""Tokenizers: text to token ids and back, and the cached tokens of a corpus."""

import hashlib
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers
from numpy.typing import NDArray

from megapar.data.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_CANDIDATES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>")

_NUM_BYTES = 256
# Bounds the memory of the tokenizers library, which keeps far more than the ids of a batch.
_DOCUMENTS_PER_BATCH = 64
_FORMAT_KEY = "megapar_tokenizer"


class Tokenizer(ABC):
    """Maps text to ids in [0, vocab_size) and back; `end_of_text` is the id that ends a document.

    Text that spells the end-of-text token is ordinary text: only `encode_documents` writes that id.
    """

    def __init__(self, name: str, vocab_size: int, end_of_text: int) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text

    @abstractmethod
    def to_json(self) -> str:
        """Return the whole tokenizer as JSON, the same string for the same tokenizer."""

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 (hex) of `to_json()`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without end of text; raises ValueError for text outside the tokenizer's reach."""
        surrogate = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
        if surrogate is not None:
            raise ValueError(f"text has the lone surrogate U+{ord(surrogate):04X}, it must be Unicode text: remove it")
        ids: list[int] = self._encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, without end of text; a subword tokenizer uses all cores."""
        return self._encode_batch(texts)

    def encode_documents(self, documents: Sequence[str]) -> NDArray[np.int32]:
        """Return the ids of all documents as int32 `[tokens]`, each document followed by `end_of_text`."""
        end = np.array([self.end_of_text], dtype=np.int32)
        parts = [np.empty(0, dtype=np.int32)]
        for start in range(0, len(documents), _DOCUMENTS_PER_BATCH):
            for ids in self.encode_batch(documents[start : start + _DOCUMENTS_PER_BATCH]):
                parts += [ids, end]
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD; raises ValueError for an unknown id."""
        known = [int(token) for token in ids]
        for token in known:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} is outside [0, {self.vocab_size}) of tokenizer {self.name}: "
                    "decode with the tokenizer that encoded it"
                )
        return self._decode(known)

    def save(self, path: Path) -> None:
        """Write `to_json()` to `path`, whole or not at all; `read_tokenizer` reads it back."""
        _write_atomically(path, lambda file: file.write(self.to_json().encode()))


class ByteTokenizer(Tokenizer):
    """One id per byte of the UTF-8 text, then end of text as id 256."""

    def __init__(self) -> None:
        super().__init__("bytes", vocab_size=_NUM_BYTES + 1, end_of_text=_NUM_BYTES)

    def to_json(self) -> str:
        """Return the tokenizer as JSON."""
        return json.dumps({_FORMAT_KEY: "bytes"})

    def _encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        pieces = (END_OF_TEXT.encode() if token == self.end_of_text else bytes([token]) for token in ids)
        return b"".join(pieces).decode(errors="replace")


class CharacterTokenizer(Tokenizer):
    """One id per distinct character of `characters`, by code point, then end of text as the last id."""

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = sorted(set(characters))
        self._code_points = np.array([ord(character) for character in self._characters], dtype=np.uint32)
        num_characters = len(self._characters)
        super().__init__("characters", vocab_size=num_characters + 1, end_of_text=num_characters)

    def to_json(self) -> str:
        """Return the tokenizer as JSON."""
        return json.dumps({_FORMAT_KEY: "characters", "characters": "".join(self._characters)})

    def _encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> NDArray[np.int32]:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = np.searchsorted(self._code_points, code_points)
        known = np.isin(code_points, self._code_points)
        if not known.all():
            unknown = chr(code_points[~known][0])
            raise ValueError(
                f"text has the character {unknown!r} (U+{ord(unknown):04X}), which the tokenizer's corpus lacks: "
                "remove it or use the bytes tokenizer"
            )
        return ids.astype(np.int32)

    def _decode(self, ids: list[int]) -> str:
        return "".join(END_OF_TEXT if token == self.end_of_text else self._characters[token] for token in ids)


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, name: str, model: tokenizers.Tokenizer, end_of_text: int) -> None:
        # A file may carry the truncation of the model it was made for, which would drop text unseen.
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        self._model = model
        # Ids may have gaps, so the largest one, not their number, sizes the embedding.
        super().__init__(name, vocab_size=max(model.get_vocab().values()) + 1, end_of_text=end_of_text)

    def to_json(self) -> str:
        """Return the tokenizer as JSON in the `tokenizers` library's own format."""
        return self._model.to_str()

    def _encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)


def load_tokenizer(spec: str, corpus: Corpus, vocab_size: int = 4096, cache_dir: Path | None = None) -> Tokenizer:
    """Return the tokenizer that `spec` names.

    "bpe" is a byte-level BPE of at most `vocab_size` ids trained on the corpus and kept in `cache_dir` (default
    `$XDG_CACHE_HOME/megapar`, else `~/.cache/megapar`); "bytes" and "characters" need no training; anything
    else is the path of a tokenizer file. Raises ValueError for `vocab_size` below 257 with "bpe", and for a
    file that is missing, not a tokenizer, or without an end-of-text token.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "characters":
        return CharacterTokenizer(set().union(*corpus.documents))
    if spec != "bpe":
        return read_tokenizer(Path(spec))
    check_bpe_size(vocab_size)
    path = _cache_path(cache_dir, "bpe", ".json", {"corpus": corpus.sha256, "vocab_size": vocab_size})
    if not path.exists():
        train_bpe(corpus.documents, vocab_size, path)
    # Read back even when just trained, so that the first run uses what every later run will.
    return _parse_tokenizer(path, name="bpe")


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a file written by `Tokenizer.save` or by the `tokenizers` library.

    Raises ValueError if it is missing, is no tokenizer, or has no end-of-text token.
    """
    if not path.is_file():
        raise ValueError(
            f"tokenizer {path} is not a file, it must be bpe, bytes, characters or a tokenizer JSON file: correct it"
        )
    return _parse_tokenizer(path, name=str(path))


def tokenize(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path | None = None) -> NDArray[np.int32]:
    """Return the corpus as int32 ids `[tokens]`, each document followed by end of text, cached in `cache_dir`.

    Raises ValueError if the cached file is not what this corpus and tokenizer wrote.
    """
    path = _cache_path(cache_dir, "tokens", ".npy", {"corpus": corpus.sha256, "tokenizer": tokenizer.sha256})
    if not path.exists():
        tokens = tokenizer.encode_documents(corpus.documents)
        _write_atomically(path, lambda file: np.save(file, tokens, allow_pickle=False))
        return tokens
    try:
        cached = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"cached tokens {path} are not a whole .npy file ({error}): delete the file") from error
    if not isinstance(cached, np.ndarray) or cached.dtype != np.int32 or cached.ndim != 1:
        raise ValueError(f"cached tokens {path} are not int32 of one dimension: delete the file")
    num_ends = np.count_nonzero(cached == tokenizer.end_of_text)
    if num_ends < len(corpus.documents):
        raise ValueError(
            f"cached tokens {path} hold {num_ends} ends of text, the corpus has {len(corpus.documents)} documents: "
            "delete the file"
        )
    if cached.min() < 0 or cached.max() >= tokenizer.vocab_size:
        raise ValueError(
            f"cached tokens {path} hold ids {cached.min()} to {cached.max()}, they must be in "
            f"[0, {tokenizer.vocab_size}): delete the file"
        )
    return cached


def check_bpe_size(vocab_size: int) -> None:
    """Raises ValueError for a vocabulary that byte-level BPE cannot have."""
    if vocab_size < _NUM_BYTES + 1:
        raise ValueError(
            f"vocab_size is {vocab_size}, byte-level BPE needs 257 (256 bytes and end of text): raise it to 257 or more"
        )


def train_bpe(documents: Iterable[str], vocab_size: int, path: Path) -> None:
    """Writes a byte-level BPE of at most `vocab_size` ids, trained on `documents`, which may be a stream; memory grows with their words."""
    check_bpe_size(vocab_size)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(documents, trainer)
    _write_atomically(path, lambda file: file.write(model.to_str().encode()))


def _parse_tokenizer(path: Path, name: str) -> Tokenizer:
    data = path.read_bytes()
    try:
        record = json.loads(data)
        kind = record.get(_FORMAT_KEY) if isinstance(record, dict) else None
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "characters":
            return CharacterTokenizer(record["characters"])
        model = tokenizers.Tokenizer.from_buffer(data)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tokenizer file {path} is not a whole tokenizer ({error}): delete or replace it") from error
    vocabulary = model.get_vocab()
    end_of_text = next((vocabulary[token] for token in END_OF_TEXT_CANDIDATES if token in vocabulary), None)
    if end_of_text is None:
        wanted = " ".join(END_OF_TEXT_CANDIDATES)
        raise ValueError(f"tokenizer file {path} has no end-of-text token, it needs one of {wanted}: add one to it")
    return SubwordTokenizer(name, model, end_of_text)


def _cache_path(cache_dir: Path | None, kind: str, suffix: str, settings: dict[str, str | int]) -> Path:
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megapar"
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"{kind}-{key[:32]}{suffix}"


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, since every rank may write the same cached file at once.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
