import gzip
import hashlib
import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.data.corpus import Corpus, load_corpus


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return str(path)


def error_of(source: str, max_bytes: int | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load_corpus(source, max_bytes)
    return str(caught.value)


def test_text_file_is_one_document_with_its_line_ends_kept(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path / "notes.txt", "eins\r\nzwei ß\n"))
    assert corpus.documents == ("eins\r\nzwei ß\n",)
    assert corpus.num_bytes == len("eins\r\nzwei ß\n".encode())


def test_named_file_needs_no_known_suffix(tmp_path: Path) -> None:
    assert load_corpus(write(tmp_path / "README", "hello")).documents == ("hello",)


def test_json_lines_give_one_document_a_line_and_split_at_newlines_only(tmp_path: Path) -> None:
    # U+2028 and U+0085 are line ends to str.splitlines but legal inside a JSON string.
    texts = ["first\nstill first", "second \u2028 still second \x85", "third"]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    corpus = load_corpus(write(tmp_path / "c.jsonl", "\n".join(lines) + "\n\n"))
    assert corpus.documents == tuple(texts)


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_gzip_reads_as_the_plain_file(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name, '{"text": "a"}\n{"text": "b"}\n')
    zipped = tmp_path / f"{name}.gz"
    zipped.write_bytes(gzip.compress(Path(source).read_bytes()))
    assert load_corpus(str(zipped)).documents == load_corpus(source).documents
    assert load_corpus(str(zipped)).sha256 == load_corpus(source).sha256


def test_folder_is_read_recursively_in_path_order_without_hidden_unknown_and_empty_files(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.md", "z")
    write(tmp_path / "a" / "lines.jsonl", '{"text": "one"}\n{"text": "two"}')
    (tmp_path / "c.py.gz").write_bytes(gzip.compress(b"c"))
    write(tmp_path / "empty.txt", "")
    write(tmp_path / ".hidden.txt", "hidden")
    write(tmp_path / ".git" / "x.txt", "hidden")
    write(tmp_path / "image.png", "png")
    assert load_corpus(str(tmp_path)).documents == ("one", "two", "z", "b", "c")


def test_hidden_parent_of_the_folder_does_not_hide_it(tmp_path: Path) -> None:
    write(tmp_path / ".cache" / "texts" / "a.txt", "a")
    assert load_corpus(str(tmp_path / ".cache" / "texts")).documents == ("a",)


def test_hash_depends_on_text_and_document_boundaries_only(tmp_path: Path) -> None:
    def corpus(name: str, *texts: str) -> Corpus:
        return load_corpus(write(tmp_path / name, "\n".join(json.dumps({"text": text}) for text in texts)))

    first = corpus("first.jsonl", "ab", "c")
    assert first.sha256 == corpus("copy.jsonl", "ab", "c").sha256
    assert first.sha256 != corpus("moved.jsonl", "a", "bc").sha256
    assert first.sha256 != corpus("swapped.jsonl", "c", "ab").sha256


@settings(max_examples=50, deadline=None)  # writes a file per example
@given(texts=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5), max_bytes=st.integers(4, 60))
def test_max_bytes_keeps_the_longest_prefix_of_whole_characters(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], max_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "c.jsonl"
    corpus = load_corpus(write(path, "\n".join(json.dumps({"text": text}) for text in texts)), max_bytes)
    joined, kept = "".join(texts), "".join(corpus.documents)
    assert joined.startswith(kept)
    assert corpus.num_bytes <= max_bytes
    assert kept == joined or len(joined[: len(kept) + 1].encode()) > max_bytes
    assert corpus.documents[:-1] == tuple(texts[: len(corpus.documents) - 1])


def test_files_past_max_bytes_do_not_change_the_corpus(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "aaaa")
    before = load_corpus(str(tmp_path), 4)
    write(tmp_path / "b.txt", "bbbb")
    assert load_corpus(str(tmp_path), 4) == before


def test_stdlib_prefix_is_stable_and_holds_no_test_or_generated_files() -> None:
    small, large = load_corpus("stdlib", 100_000), load_corpus("stdlib", 300_000)
    assert (small.num_bytes, large.num_bytes) == (100_000, 300_000)
    whole = len(small.documents) - 1
    assert small.documents[:whole] == large.documents[:whole]
    assert large.documents[whole].startswith(small.documents[whole])
    assert whole > 1


def test_stdlib_is_every_module_but_tests_site_packages_and_build_output() -> None:
    documents = set(load_corpus("stdlib").documents)
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "argparse.py").read_text() in documents
    assert (root / "json" / "decoder.py").read_text() in documents
    excluded = [
        *root.glob("_sysconfigdata*.py"),
        *root.glob("site-packages/pip/*.py"),
        *root.glob("test/test_[a-c]*.py"),
    ]
    texts = (path.read_bytes().decode(errors="replace") for path in excluded)
    # A few excluded files are short enough to equal a module, so only long ones tell.
    assert not [text for text in texts if len(text) > 500 and text in documents]


def test_stdlib_order_is_the_hash_of_the_relative_path() -> None:
    documents = load_corpus("stdlib").documents
    root = Path(sysconfig.get_path("stdlib"))
    names = [
        "argparse.py",
        "ast.py",
        "json/decoder.py",
        "json/encoder.py",
        "typing.py",
        "zipfile.py",
        "xml/sax/expatreader.py",
    ]
    names = [name for name in names if (root / name).is_file()]
    found = sorted(names, key=lambda name: documents.index((root / name).read_bytes().decode()))
    assert found == sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


@pytest.mark.parametrize("max_bytes", [0, -5])
def test_max_bytes_below_one_is_refused(max_bytes: int) -> None:
    message = error_of("stdlib", max_bytes)
    assert str(max_bytes) in message and "at least 1" in message and "raise it" in message


def test_missing_path_is_refused(tmp_path: Path) -> None:
    message = error_of(str(tmp_path / "nowhere.txt"))
    assert "nowhere.txt" in message and "does not exist" in message and "correct the path" in message


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "image.png", "png")
    message = error_of(str(tmp_path))
    assert str(tmp_path) in message and ".txt" in message and "add one" in message


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_empty_corpus_is_refused(tmp_path: Path, name: str) -> None:
    message = error_of(write(tmp_path / name, ""))
    assert name in message and "no text" in message and "give a source with text" in message


def test_limit_inside_the_first_character_is_refused(tmp_path: Path) -> None:
    assert "first 2 bytes" in error_of(write(tmp_path / "a.txt", "€"), 2)


def test_invalid_utf8_is_refused_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("äh caf".encode() + b"\xe9!")
    message = error_of(str(tmp_path))
    assert "latin.txt" in message and "0xe9" in message and "offset 7" in message and "convert" in message


@pytest.mark.parametrize("line", ["{not json", '{"text": 3}', '{"body": "x"}', '["text"]', '"text"', "[" * 100_000])
def test_bad_json_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    message = error_of(write(tmp_path / "c.jsonl", f'{{"text": "fine"}}\n\n{line}\n'))
    assert "c.jsonl line 3" in message and "remove" in message


def test_lone_surrogate_in_json_is_refused(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "c.jsonl", '{"text": "a\\ud800b"}'))
    assert "c.jsonl line 1" in message and "U+D800" in message and "remove" in message


def test_broken_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"text " * 1000)
    flipped = bytearray(whole)
    flipped[-6] ^= 0xFF
    broken = {
        "cut.txt.gz": whole[:-9],
        "plain.txt.gz": b"plain text",
        "checksum.txt.gz": bytes(flipped),
        "block.txt.gz": whole[:10] + b"\xff" * 20,
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        message = error_of(str(tmp_path / name))
        assert name in message and "gzip" in message and "compress it again" in message
