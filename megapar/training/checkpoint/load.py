"""Loading: each rank reads the files that hold something of its own, FILES_AT_ONCE, and copies what its boxes have in common with theirs.

The bytes that are hashed are the bytes that are used. Beside its shard a rank needs room for so many files and boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from megapar.collectives import raise_together
from megapar.mesh import ParallelMesh
from megapar.training.checkpoint.manifest import Entry, by_tensor, problem, read_manifest
from megapar.training.checkpoint.tensor_file import read_tensors
from megapar.training.checkpoint.write import FILES_AT_ONCE
from megapar.zero.state import StateBox


def load_checkpoint(
    folder: Path, boxes: Iterable[StateBox], mesh: ParallelMesh, accept: Callable[[dict[str, Any]], None] = lambda state: None
) -> dict[str, Any]:
    """Fills the boxes from the folder, whatever layout wrote it, and returns its state.

    `accept` is given the state first and may raise ValueError to refuse it. Raises ValueError on every rank, naming the file or the first
    tensor, when anything is missing, cut short, edited or of another shape. Nothing was filled then, unless a file is not what the
    manifest says: some of the boxes may have been.
    """
    state: dict[str, Any] = {}
    error: Exception | None = None
    try:
        state.update(_read(folder, list(boxes), accept))
    except (OSError, ValueError) as caught:
        error = caught
    raise_together(error, mesh.world)
    return state


def _read(folder: Path, boxes: list[StateBox], accept: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    accept(manifest["state"])
    parts = _parts(folder, boxes, by_tensor(manifest))
    largest = max((manifest["files"][name]["bytes"] for name in parts), default=0)
    buffers: SimpleQueue[bytearray] = SimpleQueue()
    for _ in range(min(FILES_AT_ONCE, len(parts))):
        buffers.put(bytearray(largest))

    def copy(name: str) -> None:
        buffer = buffers.get()
        try:
            _copy(folder / name, read_tensors(folder / name, manifest["files"][name], buffer), parts[name])
        finally:
            buffers.put(buffer)

    pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="checkpoint")
    try:
        for _ in pool.map(copy, parts):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return dict(manifest["state"])


def _copy(path: Path, tensors: dict[str, Tensor], parts: list[Part]) -> None:
    for entry, box, target, source in parts:
        values = tensors.get(entry["key"])
        if values is None or list(values.shape) != [b - a for a, b in zip(entry["start"], entry["stop"], strict=True)]:
            raise ValueError(f"{path} has no {entry['key']} of the manifest's shape: use another checkpoint")
        box.write(values[source], target)


Part = tuple[Entry, StateBox, tuple[slice, ...], tuple[slice, ...]]
"""A stored box, one of this rank's, and where in the latter and in the former lies what they have in common."""


def _parts(folder: Path, boxes: list[StateBox], stored: dict[tuple[str, str], list[Entry]]) -> dict[str, list[Part]]:
    """What is to be copied, by file. Every element of every box is there, once: else ValueError."""
    parts: dict[str, list[Part]] = {}
    checked: set[tuple[str, str]] = set()
    for box in boxes:
        piece, key = box.piece, (box.kind, box.piece.name)
        entries, filled = stored.get(key, []), 0
        for entry in entries:
            if tuple(entry["shape"]) != piece.shape:
                shapes = f"of shape {entry['shape']} and the model has {list(piece.shape)}"
                raise ValueError(f"{folder} holds {box.kind} {piece.name} {shapes}: check the config")
        if entries and key not in checked:
            checked.add(key)
            if wrong := problem(entries):
                raise ValueError(f"{folder}: {box.kind} {piece.name} {wrong}: use another checkpoint")
        for entry in entries:
            if (common := piece.overlap(entry["start"], entry["stop"])) is not None:
                target, source = common
                parts.setdefault(entry["file"], []).append((entry, box, target, source))
                filled += _count(target)
        if filled != piece.numel:
            told = f"{filled} of the {piece.numel} elements needed of {box.kind} {piece.name}"
            raise ValueError(f"{folder} holds {told}: it is another model's")
    return parts


def _count(index: tuple[slice, ...]) -> int:
    count = 1
    for part in index:
        count *= part.stop - part.start
    return count
