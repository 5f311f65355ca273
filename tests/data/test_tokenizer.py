import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megapar.data.corpus import Corpus, load_corpus
from megapar.data.tokenizer import Tokenizer, load_tokenizer, read_tokenizer, tokenize

DOCUMENTS = ("the cat sat on the mat. " * 20, "déjà vu ", "the dog sat <|endoftext|> there. " * 20)


def make_corpus(folder: Path, *documents: str) -> Corpus:
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return load_corpus(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return make_corpus(folder, *DOCUMENTS)


@pytest.fixture(scope="module", params=["bpe", "bytes", "characters"])
def tokenizer(request: pytest.FixtureRequest, corpus: Corpus, folder: Path) -> Tokenizer:
    return load_tokenizer(request.param, corpus, vocab_size=300, cache_dir=folder)


@pytest.fixture(scope="module")
def byte_tokenizers(corpus: Corpus, folder: Path) -> list[Tokenizer]:
    return [load_tokenizer(spec, corpus, vocab_size=300, cache_dir=folder) for spec in ("bpe", "bytes")]


def write_word_tokenizer(path: Path, tokens: list[str]) -> str:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({token: 2 * i for i, token in enumerate(tokens)}, "?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.enable_truncation(max_length=3)
    model.enable_padding(length=16)
    model.save(str(path))
    return str(path)


@given(text=st.text())
def test_round_trip_of_any_text(byte_tokenizers: list[Tokenizer], text: str) -> None:
    for tokenizer in byte_tokenizers:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_spells_end_of_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("sat <|endoftext|> there")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "sat <|endoftext|> there"
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_documents_are_encoded_apart_and_each_ends_with_end_of_text(tokenizer: Tokenizer) -> None:
    documents = ["the cat"] * 70 + ["dog", "a"]
    tokens = tokenizer.encode_documents(documents)
    expected = [token for document in documents for token in [*tokenizer.encode(document), tokenizer.end_of_text]]
    assert tokens.dtype == np.int32
    assert tokens.tolist() == expected


def test_ids_stay_in_the_vocabulary(tokenizer: Tokenizer, corpus: Corpus) -> None:
    tokens = tokenizer.encode_documents(corpus.documents)
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size


def test_saved_tokenizer_reads_back_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokenizer.json"
    tokenizer.save(path)
    copy = read_tokenizer(path)
    assert (copy.sha256, copy.vocab_size, copy.end_of_text) == (
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert copy.encode(DOCUMENTS[2]) == tokenizer.encode(DOCUMENTS[2])
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]


def test_byte_ids_are_the_bytes(corpus: Corpus) -> None:
    tokenizer = load_tokenizer("bytes", corpus)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_character_ids_follow_code_points_with_end_of_text_last(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("characters", make_corpus(tmp_path, "ba😀", "éa"))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (5, 4)
    assert tokenizer.encode("abé😀") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"'c' \(U\+0063\).*use the bytes tokenizer"):
        tokenizer.encode("abc")
    with pytest.raises(ValueError, match=r"U\+1F601"):
        tokenizer.encode("😁")


def test_bpe_compresses_and_honours_the_vocabulary_size(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bpe", corpus, vocab_size=280, cache_dir=tmp_path)
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode(DOCUMENTS[0])) < len(DOCUMENTS[0]) / 2


def test_bpe_is_trained_once_for_a_corpus_and_settings(corpus: Corpus, tmp_path: Path) -> None:
    first = load_tokenizer("bpe", corpus, vocab_size=280, cache_dir=tmp_path)
    (file,) = tmp_path.glob("bpe-*.json")
    written = file.stat().st_mtime_ns
    assert load_tokenizer("bpe", corpus, vocab_size=280, cache_dir=tmp_path).sha256 == first.sha256
    assert file.stat().st_mtime_ns == written
    load_tokenizer("bpe", corpus, vocab_size=281, cache_dir=tmp_path)
    load_tokenizer("bpe", make_corpus(tmp_path, "other"), vocab_size=280, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("bpe-*"))) == 3


def test_cache_defaults_to_the_xdg_folder(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_tokenizer("bpe", corpus, vocab_size=260)
    assert len(list((tmp_path / "megapar").glob("bpe-*.json"))) == 1


def test_bpe_is_the_same_for_any_thread_count_and_survives_a_fork_quietly(tmp_path: Path) -> None:
    script = """if True:
        import os, sys
        from pathlib import Path
        from megapar.data.corpus import load_corpus
        from megapar.data.tokenizer import load_tokenizer
        corpus = load_corpus("stdlib", 200_000)
        tokenizer = load_tokenizer("bpe", corpus, vocab_size=1000, cache_dir=Path(sys.argv[1]))
        tokenizer.encode_documents(corpus.documents)
        child = os.fork()
        if child == 0:
            tokenizer.encode_documents(corpus.documents)
            os._exit(0)
        print(tokenizer.sha256, os.waitpid(child, 0)[1])
    """
    outputs = set()
    for threads in ("1", "4"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("TOKENIZERS_PARALLELISM", None)
        command = [sys.executable, "-c", script, str(tmp_path / threads)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert "TOKENIZERS_PARALLELISM" not in done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1 and outputs.pop().endswith(" 0\n")


def test_tokenizer_file_is_used_without_its_truncation_and_padding(corpus: Corpus, tmp_path: Path) -> None:
    path = write_word_tokenizer(tmp_path / "words.json", ["?", "a", "b", "</s>"])
    tokenizer = load_tokenizer(path, corpus)
    assert tokenizer.encode("a b a b a") == [2, 4, 2, 4, 2]
    # The ids have gaps: 4 tokens, the largest id is 6.
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (7, 6)


def test_end_of_text_is_chosen_in_order(corpus: Corpus, tmp_path: Path) -> None:
    names = ["<|end_of_text|>", "<eos>", "</s>", "<|endoftext|>"]
    for first in range(4):
        path = write_word_tokenizer(tmp_path / "words.json", ["?", *names[: first + 1]])
        assert load_tokenizer(path, corpus).end_of_text == 2 * (first + 1)


def test_tokenizer_file_without_end_of_text_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    path = write_word_tokenizer(tmp_path / "words.json", ["?", "a"])
    with pytest.raises(ValueError, match=r"words.json has no end-of-text token.*</s>.*add one"):
        load_tokenizer(path, corpus)


def test_missing_tokenizer_file_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"tokenizer bp is not a file.*bpe, bytes, characters or.*correct it"):
        load_tokenizer("bp", corpus)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"model', b"\xff", b'{"megapar_tokenizer": "characters"}', b'{"megapar_tokenizer": "x"}']
)
def test_invalid_tokenizer_file_is_refused(corpus: Corpus, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"t\.json is not a whole tokenizer.*replace it"):
        load_tokenizer(str(tmp_path / "t.json"), corpus)


def test_corrupt_cached_bpe_is_refused_and_left_alone(corpus: Corpus, tmp_path: Path) -> None:
    load_tokenizer("bpe", corpus, vocab_size=280, cache_dir=tmp_path)
    (file,) = tmp_path.glob("bpe-*.json")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file.name} is not a whole tokenizer.*delete"):
        load_tokenizer("bpe", corpus, vocab_size=280, cache_dir=tmp_path)


def test_too_small_vocabulary_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 256.*needs 257.*raise it"):
        load_tokenizer("bpe", corpus, vocab_size=256, cache_dir=tmp_path)
    tokenizer = load_tokenizer("bpe", corpus, vocab_size=257, cache_dir=tmp_path)
    assert tokenizer.decode(tokenizer.encode("naïve")) == "naïve" and tokenizer.vocab_size == 257


def test_unknown_id_and_lone_surrogate_are_refused(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(
            ValueError, match=rf"token id {token} is outside \[0, {tokenizer.vocab_size}\).*decode with"
        ):
            tokenizer.decode([0, token])
    with pytest.raises(ValueError, match=r"U\+DC80.*remove it"):
        tokenizer.encode("a\udc80")


def test_tokens_are_cached_and_read_back(tokenizer: Tokenizer, corpus: Corpus, tmp_path: Path) -> None:
    first = tokenize(corpus, tokenizer, tmp_path)
    (file,) = tmp_path.iterdir()
    np.save(file, first[::-1].copy())
    # Reversed tokens come back, so the second call reads the file.
    assert tokenize(corpus, tokenizer, tmp_path).tolist() == first[::-1].tolist()
    tokenize(make_corpus(tmp_path, "the"), tokenizer, tmp_path)
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 2


def test_bad_cached_tokens_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes", corpus)
    tokens = tokenize(corpus, tokenizer, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()

    def refused(rule: str) -> None:
        with pytest.raises(ValueError, match=rf"{file.name}.*{rule}.*delete the file"):
            tokenize(corpus, tokenizer, tmp_path)

    for data in (b"", whole[:-10], b"not an array"):
        file.write_bytes(data)
        refused("not a whole .npy file")
    for array in (tokens.astype(np.int64), tokens[None]):
        np.save(file, array)
        refused("not int32 of one dimension")
    for array in (tokens[:0], tokens[:-1]):
        np.save(file, array)
        refused("the corpus has 3 documents")
    for token in (-1, 257):
        changed = tokens.copy()
        changed[0] = token
        np.save(file, changed)
        refused(r"must be in \[0, 257\)")
    np.savez(tmp_path / "archive.npz", tokens=tokens)
    os.replace(tmp_path / "archive.npz", file)
    refused("not int32 of one dimension")
