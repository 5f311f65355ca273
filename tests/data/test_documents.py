"""Streaming readers: packed files are the plain ones, cut ones are refused, tables are their rows, memory does not hold a file."""

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest

from megapar.data.documents import FileDocuments, find_files

TEXTS = ["one\u2028still one", "", "zwei ß", "three\n" * 2000]


def lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def packed(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        half = len(content) // 2
        # Two frames, as parallel compressors write them.
        content = b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines(tmp_path, name):
    reader = FileDocuments(packed(tmp_path / name, lines(TEXTS) + b"  \n"))
    assert list(reader) == TEXTS and reader.position == reader.size
    assert list(reader) == TEXTS, "read anew"
    other = FileDocuments(packed(tmp_path / name, lines(TEXTS, "body")), field="body")
    assert list(other) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_texts(tmp_path, name):
    assert list(FileDocuments(packed(tmp_path / name, b"eins\r\nzwei\n"))) == ["eins\r\nzwei\n"]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_cut_files_are_refused_wherever_they_are_cut(tmp_path, kind):
    """The library's own zstd reader takes a cut file for one that ends there."""
    path = packed(tmp_path / f"a.jsonl.{kind}", lines(TEXTS))
    whole = path.read_bytes()
    reader = FileDocuments(path)
    accepted = []
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        try:
            list(reader)
            accepted.append(size)
        except ValueError as error:
            # A cut JSON line is refused before the end of the file is come to.
            assert "is not a whole" in str(error) or "is not JSON" in str(error)
    # Between two frames it is a whole file.
    assert len(accepted) <= (kind == "zst")
    path.write_bytes(b"PAR1" + whole[4:])
    with pytest.raises(ValueError, match=r"a.jsonl.\w+ is not a whole .* file .*: compress it again"):
        list(reader)


@pytest.mark.parametrize(
    "content,told",
    [
        (lines(["a"]) + b'{"text": "\xff"}', "has byte 0xff at offset 24, which is not UTF-8"),
        (lines(["a"]) + b"{", "line 2 is not JSON"),
        (lines(["a"]) + b'{"text": 1}', "line 2 has no string field text"),
        (b'{"text": "\\ud800"}', r"line 1 has the lone surrogate U\+D800"),
    ],
)
def test_bad_lines(tmp_path, content, told):
    with pytest.raises(ValueError, match=told):
        list(FileDocuments(packed(tmp_path / "a.jsonl.gz", content)))


def test_parquet_and_saved_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i}" for i in range(1000)]
    table = pyarrow.table({"id": list(range(1000)), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    reader = FileDocuments(tmp_path / "a.parquet")
    assert list(reader) == texts and reader.position == reader.size
    with pytest.raises(ValueError, match="columns id, text and not body"):
        list(FileDocuments(tmp_path / "a.parquet", field="body"))
    with pytest.raises(ValueError, match="row 0 has no string field id"):
        list(FileDocuments(tmp_path / "a.parquet", field="id"))

    # As `datasets` saves one: a stream a shard, listed in state.json. The files' names do not tell the order.
    saved = tmp_path / "saved"
    saved.mkdir()
    for name, part in (("z.arrow", table.slice(0, 600)), ("a.arrow", table.slice(600))):
        with pyarrow.OSFile(str(saved / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(part, max_chunksize=100)
    (saved / "dataset_info.json").write_text("{}")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "z.arrow"}, {"filename": "a.arrow"}]}))
    assert [text for path in find_files(str(saved)) for text in FileDocuments(path)] == texts
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(ValueError, match="name the folder of one of them, train test"):
        find_files(str(tmp_path))

    for name in ("a.parquet", "saved/z.arrow"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
        with pytest.raises(ValueError, match="cannot be read from row"):
            list(FileDocuments(tmp_path / name))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"zst needs zstandard, which is not installed: pip install 'megapar\[data\]'"):
        list(FileDocuments(tmp_path / "a.txt.zst"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_memory_does_not_hold_the_file(tmp_path, name):
    reader = FileDocuments(packed(tmp_path / name, lines([random.Random(i).randbytes(2500).hex() for i in range(4000)])))
    tracemalloc.start()
    try:
        assert sum(map(len, reader)) == 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.txt.gz", "b.jsonl.zst"])
def test_an_empty_packed_file_was_cut(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"file .*{name} is empty, and no packed file"):
        list(FileDocuments(tmp_path / name))


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        find_files(str(tmp_path))
