"""One safetensors file: 8 bytes with the size of a JSON header, the header, and the tensors' bytes (github.com/huggingface/safetensors).

The library is not used here because it would copy every byte several times, with the interpreter locked: 70 ms to serialise 64 MiB and
150 ms to read them, where hashing takes 38 ms and writing 30. tests/training/checkpoint/test_tensor_file.py compares with it byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""In the order in which the library sorts tensors: wide ones first, so that all are aligned."""
DTYPES = {code: dtype for dtype, code in CODES.items()}

Told = tuple[str, torch.dtype, Sequence[int]]
"""A tensor as a header tells it: its key, dtype and shape."""


def ordered(tensors: Sequence[Told]) -> list[Told]:
    """In the order that they have in a file: by dtype, then by key."""
    ranks = list(CODES)
    return sorted(tensors, key=lambda told: (ranks.index(told[1]), told[0]))


def memory_size(told: Told) -> int:
    """Bytes of a tensor."""
    return math.prod(told[2]) * told[1].itemsize


def header(tensors: Sequence[Told], metadata: Mapping[str, str] | None = None) -> bytes:
    """What comes before the tensors' bytes, which follow in this order."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for key, dtype, shape in tensors:
        end = at + memory_size((key, dtype, shape))
        entries[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_tensors(path: Path, told: Mapping[str, Any], buffer: bytearray) -> dict[str, Tensor]:
    """The tensors of a file, in the memory of `buffer`, which must have room for all of it.

    What is checked against `told` (bytes, sha256) is what is returned: the file is read once. Raises ValueError, naming it, for any other.
    """
    whole = memoryview(buffer)[: told["bytes"]]
    try:
        with open(path, "rb", buffering=0) as file:
            size = 0
            while size < len(whole) and (more := file.readinto(whole[size:])):
                size += more
            size += len(file.read(1))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): use another checkpoint") from error
    if size != told["bytes"] or hashlib.sha256(whole).hexdigest() != told["sha256"]:
        raise ValueError(f"{path} was cut short or edited, its size or sha256 does not match: use another checkpoint")
    try:
        return _parse(whole)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error}): use another checkpoint") from error


def _parse(whole: memoryview) -> dict[str, Tensor]:
    begin = 8 + int.from_bytes(whole[:8], "little")
    entries = json.loads(bytes(whole[8:begin]))
    found = {}
    for key, entry in entries.items():
        if key == "__metadata__":
            continue
        dtype, (start, stop) = DTYPES[entry["dtype"]], entry["data_offsets"]
        count = math.prod(entry["shape"])
        if not 0 <= start <= stop <= len(whole) - begin or stop - start != count * dtype.itemsize:
            raise ValueError(f"{key} lies outside of it")
        flat = torch.frombuffer(whole, dtype=dtype, count=count, offset=begin + start) if count else torch.empty(0, dtype=dtype)
        found[key] = flat.view(entry["shape"])
    return found
