"""What Triton's interpreter sees a kernel do to memory: bytes moved, accesses outside of any tensor, and races between programs.

The interpreter runs programs one after the other, so a result says nothing about programs that disturb each other on a GPU. Here each
access is remembered with its program, and a launch in which one program reads or overwrites what another has written is an error.

    TRITON_INTERPRET=1 MEGAPAR_BACKEND=triton python -m benchmarks.watched

prints, as JSON, the bytes that each case of benchmarks/gpu_cases.py loads and stores, over those of its formula.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from benchmarks.gpu_cases import Case, Sizes, all_cases

EVEN = Sizes(t=64, h=1024, f=1024, v=4096, q_heads=2, kv_heads=1, tensors=2, numel=65536)
"""Small enough for the interpreter; whole tiles, so that what is beyond the formula is no edge."""


@dataclass
class Access:
    """By byte: addresses, the program that touched each, and the value that a store left there."""

    addresses: list[np.ndarray] = field(default_factory=list)
    programs: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def add(self, at: np.ndarray, width: int, program: int, values: np.ndarray | None = None) -> None:
        bytes_at = (at.reshape(-1, 1).astype(np.int64) + np.arange(width)).reshape(-1)
        self.addresses.append(bytes_at)
        self.programs.append(np.full(len(bytes_at), program))
        if values is not None:
            self.values.append(np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(-1))

    def whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(np.concatenate(x) if x else np.zeros(0, np.int64) for x in (self.addresses, self.programs, self.values))  # type: ignore


@dataclass
class Seen:
    """Of all launches: bytes that programs loaded and stored, each as often as it was."""

    loaded: int = 0
    stored: int = 0
    launches: int = 0
    names: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """Raises AssertionError where a kernel launched inside leaves its tensors, or its programs race."""
    seen, loads, stores = Seen(), Access(), Access()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    ranges, outside = list[tuple[np.ndarray, np.ndarray]](), list[str]()
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def program(self: Any) -> int:
        x, y, z = self.grid_idx
        return (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    def inside(what: str, pointers: Any, mask: Any) -> Any:
        """The mask without what lies outside of every tensor: that is told, and not done."""
        at, (begins, ends) = pointers.data.astype(np.int64), ranges[0]
        index = np.searchsorted(begins, at, side="right") - 1
        lies_in = (index >= 0) & (at + pointers.get_element_ty().primitive_bitwidth // 8 <= ends[np.maximum(index, 0)])
        wanted = np.broadcast_to(mask.data, at.shape)
        if (wanted & ~lies_in).any():
            outside.append(f"{what} {int((wanted & ~lies_in).sum())} elements outside of every tensor")
        return interpreter.TensorHandle(wanted & lies_in, mask.dtype)

    def watching_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        mask = inside("reads", pointers, mask)
        result = load(self, pointers, mask, *rest)
        at, width = pointers.data[mask.data], result.data.dtype.itemsize
        seen.loaded += at.size * width
        loads.add(at, width, program(self))
        return result

    def watching_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask = inside("writes", pointers, mask)
        at, values = pointers.data[mask.data], np.broadcast_to(value.data, pointers.data.shape)[mask.data]
        seen.stored += at.size * values.dtype.itemsize
        stores.add(at, values.dtype.itemsize, program(self), values)
        return store(self, pointers, value, mask, *rest)

    def watching_run(self: Any, *args: Any, **options: Any) -> Any:
        for access in (loads, stores):
            access.__init__()  # type: ignore[misc]
        ranges[:], outside[:] = [_ranges()], []
        name = self.fn.__name__
        result = run(self, *args, **options)
        assert not outside, f"{name} {outside[0]}"
        seen.launches += 1
        seen.names.append(name)
        _check(name, loads.whole(), stores.whole())
        return result

    with (
        mock.patch.object(builder, "create_masked_load", watching_load),
        mock.patch.object(builder, "create_masked_store", watching_store),
        mock.patch.object(executor, "__call__", watching_run),
    ):
        yield seen


def _ranges() -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of the memory of every tensor that lives, sorted."""
    found = set()
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.layout == torch.strided:
            storage = x.untyped_storage()
            if storage.nbytes():
                found.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return tuple(np.array(column, dtype=np.int64) for column in zip(*sorted(found), strict=True))  # type: ignore[return-value]


def _check(name: str, loads: tuple[np.ndarray, ...], stores: tuple[np.ndarray, ...]) -> None:
    at, program, value = stores
    order = np.argsort(at, kind="stable")
    at, program, value = at[order], program[order], value[order]
    same = at[1:] == at[:-1]
    # Several programs may store the same value, a flag.
    wrong = same & (program[1:] != program[:-1]) & (value[1:] != value[:-1])
    assert not wrong.any(), f"{name}: programs {program[:-1][wrong][0]} and {program[1:][wrong][0]} write one address"
    read_at, reader, _ = loads
    found = np.searchsorted(at, read_at)
    hit = (found < len(at)) & (at[np.minimum(found, len(at) - 1)] == read_at) if len(at) else np.zeros(len(read_at), bool)
    writer = program[found[hit]]
    raced = writer != reader[hit]
    assert not raced.any(), f"{name}: program {reader[hit][raced][0]} reads what program {writer[raced][0]} writes in the same launch"


def moved(case: Case) -> float:
    """Bytes loaded and stored, over the formula's, or as they are where it has none."""
    inputs = case.make("cpu")
    with watched() as seen:
        case.ours(inputs)
    return (seen.loaded + seen.stored) / max(case.bytes, 1)


if __name__ == "__main__":
    print(json.dumps({case.title: moved(case) for case in all_cases(EVEN)}))
