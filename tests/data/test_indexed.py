"""The .bin/.idx format: bytes against its description, documents back, Megatron's own reader and writer, damaged files."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.data.indexed import DocumentStream, IndexedDataset, IndexedWriter, smallest_dtype

DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16"]
Documents = list[list[list[int]]]
documents = st.lists(st.lists(st.lists(st.integers(0, 127), max_size=6), max_size=3), max_size=5)
THREE: Documents = [[[1, 2], [3]], [], [[4, 5, 6]]]


def write(prefix: Path, content: Documents, dtype: str = "uint16") -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in content:
            writer.add_document(document)
    return prefix


def test_bytes(tmp_path):
    write(tmp_path / "a.b", THREE)
    assert (tmp_path / "a.b.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    assert len(header) == 34
    assert (tmp_path / "a.b.idx").read_bytes() == header + struct.pack("<3i3q4q", 2, 1, 3, 0, 4, 6, 0, 2, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]


@settings(max_examples=300, deadline=None)
@given(content=documents, dtype=st.sampled_from(DTYPES))
def test_documents_come_back(tmp_path_factory, content, dtype):
    dataset = IndexedDataset(write(tmp_path_factory.mktemp("d") / "x", content, dtype))
    assert len(dataset) == len(content) and dataset.dtype == np.dtype(dtype)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[t for seq in document for t in seq] for document in content]
    assert dataset.sequence_lengths.tolist() == [len(seq) for document in content for seq in document]
    assert dataset.tokens.tolist() == [t for document in content for seq in document for t in seq]
    with pytest.raises(IndexError):
        dataset[len(content)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_ours_and_we_read_megatrons(tmp_path, dtype):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    generator = np.random.default_rng(0)
    content: Documents = [[generator.integers(0, 128, n).tolist() for n in lengths] for lengths in ([5, 1], [3], [700, 1, 2], [1])]
    write(tmp_path / "ours", content, dtype)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [seq for document in content for seq in document]
    assert theirs.document_indices.tolist() == [0, 2, 3, 6, 7] and theirs[0].dtype == np.dtype(dtype)

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for document in content:
        builder.add_document([t for seq in document for t in seq], [len(seq) for seq in document])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedDataset(tmp_path / "theirs")
    assert [ours[i].tolist() for i in range(len(ours))] == [[t for seq in document for t in seq] for document in content]
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == (tmp_path / f"ours{suffix}").read_bytes()


@pytest.mark.parametrize(
    "sequence,told",
    [
        ([65536], r"token ids run from 65536 to 65536 and must be in \[0, 65535\]"),
        ([-1, 2], "token ids run from -1 to 2"),
        ([1.5], "a sequence is float64"),
        ([[1]], r"of shape \(1, 1\) and must be integers \[n\]"),
    ],
)
def test_bad_sequences_write_nothing(tmp_path, sequence, told):
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        with pytest.raises(ValueError, match=told):
            writer.add_document([[7], sequence])
        writer.add_document([[8]])
    assert IndexedDataset(tmp_path / "x").tokens.tolist() == [8]


def test_vocabulary(tmp_path):
    with IndexedWriter(tmp_path / "x", "int32", vocab_size=50) as writer:
        writer.add_document([[49]])
        with pytest.raises(ValueError, match=r"must be in \[0, 49\]"):
            writer.add_document([[50]])
    assert [smallest_dtype(v).name for v in (65499, 65500)] == ["uint16", "int32"]


def test_refusals_of_the_writer(tmp_path):
    with pytest.raises(ValueError, match="dtype float32 is none of uint8, "):
        IndexedWriter(tmp_path / "x", "float32")
    write(tmp_path / "x", THREE)
    (tmp_path / "x.bin").unlink()
    with pytest.raises(ValueError, match=r"x.idx exists, and a corpus is not overwritten"):
        IndexedWriter(tmp_path / "x", "uint16")
    assert [path.name for path in tmp_path.iterdir()] == ["x.idx"]


class Full(io.RawIOBase):
    def write(self, data):
        raise OSError(28, "No space left on device")


def test_a_full_disk_or_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space left"), IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([[1]])
        writer._bin.close()
        writer._bin = Full()
        writer.add_document([[2]])
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([[1]])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def damaged(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "suffix,change,told",
    [
        (".idx", lambda b: b[:20], "is not an index: it must have 34 bytes or more"),
        (".idx", lambda b: b"", "is not an index"),
        (".idx", lambda b: b"PAR1" + b[4:], "is not an index"),
        (".idx", lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "is of version 2 with dtype code 8"),
        (".idx", lambda b: b[:17] + b"\x07" + b[18:], "is of version 1 with dtype code 7"),
        (".idx", lambda b: b[:-1], "has 101 bytes and 3 sequences in 3 documents take 102: it is truncated"),
        (".idx", lambda b: b + b"\0\0\0", "damaged, or multimodal"),
        (".idx", lambda b: b[:34] + struct.pack("<i", 3) + b[38:], "does not describe documents back to back"),
        (".idx", lambda b: b[:-8] + struct.pack("<q", 2), "does not describe documents back to back"),
        (".idx", lambda b: b[:-16] + struct.pack("<q", 1) + b[-8:], "does not describe documents back to back"),
        (".idx", lambda b: b[:17] + b"\x04" + b[18:], "does not describe documents back to back"),
        (".bin", lambda b: b[:-1], "x.bin has 11 bytes and its .idx describes 12: the two are not of one corpus"),
        (".bin", lambda b: b + b"\0\0", "has 14 bytes"),
    ],
)
def test_damaged_files_are_refused(tmp_path, suffix, change, told):
    damaged(write(tmp_path / "x", THREE).with_suffix(suffix), change)
    with pytest.raises(ValueError, match=told):
        IndexedDataset(tmp_path / "x")


def test_missing_files_are_refused(tmp_path):
    write(tmp_path / "x", THREE)
    with pytest.raises(ValueError, match=r"x.bin.bin does not exist: give the name without .bin"):
        IndexedDataset(tmp_path / "x.bin")


@settings(max_examples=300, deadline=None)
@given(content=documents, data=st.data())
def test_streams(tmp_path_factory, content, data):
    dataset = IndexedDataset(write(tmp_path_factory.mktemp("d") / "x", content))
    order = np.array(data.draw(st.permutations(range(len(content)))), np.int64)[: data.draw(st.integers(0, len(content)))]
    stream = DocumentStream(dataset, order)
    whole = [t for number in order for seq in content[number] for t in seq]
    assert len(stream) == len(whole)
    first = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - first))
    assert stream.read(first, count).tolist() == whole[first : first + count]
    at, offsets = stream.locate(np.arange(len(whole)))
    assert [int(dataset[order[i]][offset]) for i, offset in zip(at, offsets, strict=True)] == whole
    for bad in [(-1, 1), (0, len(whole) + 1), (1, -1)]:
        with pytest.raises(ValueError, match="are asked for and the stream has"):
            stream.read(*bad)


def test_streams_refuse_unknown_documents(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "x", THREE))
    with pytest.raises(ValueError, match="documents 0 to 3 are asked for and there are 3"):
        DocumentStream(dataset, np.array([0, 3]))


def test_sample_index_is_megatrons(tmp_path):
    helpers = pytest.importorskip("megatron.core.datasets.helpers", reason="megatron-core is not installed")
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 9, 40)
    dataset = IndexedDataset(write(tmp_path / "x", [[[1] * n] for n in lengths]))
    for s in (1, 3, 7, 20):
        order = generator.permutation(40)
        stream = DocumentStream(dataset, order)
        samples = (len(stream) - 1) // s
        theirs = helpers.build_sample_idx(lengths.astype(np.int32), order.astype(np.int32), s, 1, int(lengths.sum()), True, True)
        at, offsets = stream.locate(np.arange(samples + 1) * s)
        assert np.stack([at, offsets], 1).tolist() == theirs.tolist()


def test_an_index_that_cannot_have_its_name_leaves_no_data_either(tmp_path):
    writer = IndexedWriter(tmp_path / "x", "uint8")
    writer.add_document([[1, 2]])
    (tmp_path / "x.idx").mkdir()
    with pytest.raises(OSError):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["x.idx"]
