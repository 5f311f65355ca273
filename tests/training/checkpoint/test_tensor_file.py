"""The bytes of our safetensors files are the library's, both ways, and what is not whole is refused by name."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from megapar.training.checkpoint.tensor_file import CODES, header, memory, ordered, read_tensors

SHAPES = st.lists(st.integers(0, 5), max_size=3)
TENSORS = st.dictionaries(st.text(min_size=1, max_size=6), st.tuples(st.sampled_from(list(CODES)), SHAPES), min_size=1, max_size=6)


def drawn(told):
    generator = torch.Generator().manual_seed(1)
    values = {}
    for key, (dtype, shape) in told.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        values[key] = torch.randint(0, 255, (size,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)
    return values


def written(values, metadata=None) -> bytes:
    order = ordered([(key, value.dtype, tuple(value.shape)) for key, value in values.items()])
    return b"".join([header(order, metadata), *(memory(values[key]) for key, *_ in order)])


def told_of(content: bytes):
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def same(found, values) -> bool:
    return found.keys() == values.keys() and all(
        (a.dtype, a.shape) == (values[key].dtype, values[key].shape) and bytes(memory(a)) == bytes(memory(values[key]))
        for key, a in found.items()
    )


@settings(max_examples=200, deadline=None)
@given(told=TENSORS)
def test_written_and_read_as_by_the_library(told, tmp_path_factory):
    values = drawn(told)
    content = written(values)
    assert content == save(values)
    assert same(load(content), values)
    path = tmp_path_factory.getbasetemp() / "x.safetensors"
    path.write_bytes(content)
    assert same(read_tensors(path, told_of(content), bytearray(len(content) + 7)), values)


def test_metadata_is_the_library_s():
    values = {"a": torch.ones(3)}
    content = written(values, {"format": "pt"})
    assert content == save(values, {"format": "pt"})


def test_tensors_with_metadata_are_read(tmp_path):
    content = written({"a": torch.ones(3)}, {"format": "pt"})
    (tmp_path / "x").write_bytes(content)
    assert read_tensors(tmp_path / "x", told_of(content), bytearray(len(content))).keys() == {"a"}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},  # beyond the end
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        ["a"],
        {"a": 3},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entries):
    """Even if the hash is that of the file."""
    text = json.dumps(entries).encode()
    content = len(text).to_bytes(8, "little") + text + b"\0" * 8
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        read_tensors(path, told_of(content), bytearray(len(content)))


def test_a_longer_file_is_refused(tmp_path):
    content = written({"a": torch.ones(3)})
    (tmp_path / "x").write_bytes(content + b"!")
    with pytest.raises(ValueError, match="cut short or edited"):
        read_tensors(tmp_path / "x", told_of(content), bytearray(len(content)))
